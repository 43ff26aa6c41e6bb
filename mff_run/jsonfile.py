"""JSON that anybody may have altered, read with bounds and compared with what its reader needs.

A kind says what a value must be: int, float (an int will do), str, bool, list or dict; [kind], for a list of
such; {"name": kind}, for an object that has these names, but for "name?", which it may lack; a tuple of
kinds, for any of them; a function that tells whether it is right, and whose docstring says what is expected.
"""

import contextlib
import itertools
import json
import os
from types import FunctionType

from mff_min.errors import UserError, printable
from mff_run.files import check_regular

MOST_BYTES = 2 ** 25                                                    # of a file that is read as a whole
MOST_LINE, MOST_LINES = 2 ** 20, 2 ** 28                                # bytes of a line, and of all of them
MOST_NESTED, LARGEST = 50, 1e30                                         # and of numbers, which are drawn
NAMES = {dict: "an object", list: "a list", str: "a text", int: "a whole number", bool: "true or false",
         float: f"a number below {LARGEST:g}", type(None): "null"}
HINT = "restore it, or move it away"


def parse_json(content, made=lambda found: found):
    """The value that bytes hold. ValueError with the reason where they hold none, or one that is a trap.

    A whole number of more than 18 digits becomes a float. made(found) takes the place of each object, the
    innermost first, so that a large file need not be held as dicts.
    """
    try:
        text = content.decode("utf-8-sig")                              # some editors write a mark in front
        value = json.loads(text, parse_int=whole_number,
                           object_pairs_hook=lambda pairs: made(named_once(pairs)))
    except UnicodeDecodeError:
        raise ValueError("it is no UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if is_deep(value, MOST_NESTED):
        raise ValueError("it is nested too deeply")
    return value


def whole_number(digits):
    return int(digits) if len(digits) <= 18 else float(digits)


def named_once(pairs):
    """A dict of these pairs. Raises ValueError where a name stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {printable(twice[:40])} twice")
    return found


def is_deep(value, most):
    """Whether lists and dicts are nested in one another more than so many times."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return most < 0 or any(is_deep(each, most - 1) for each in inside if isinstance(each, dict | list))


def read_json(path, kind=dict, hint=HINT, most=MOST_BYTES):
    """The value in a JSON file, which is of this kind. UserError, with the hint, where it is not."""
    with opened(path, most) as file:
        content = file.read(most + 1)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}; expected JSON: {hint}") from None
    if problem := misfit(value, kind):
        raise UserError(f"{path} holds {problem}; {hint}")
    return value


def read_lines(path, most=MOST_LINE, most_lines=MOST_LINES):
    """(number, bytes, value) of each line of a file of JSON lines; the value of what is no JSON is None.

    Raises UserError where the file cannot be read or is too long to be one of ours.
    """
    with opened(path, most_lines) as file:
        for number in itertools.count(1):
            line = file.readline(most + 1)
            if not line:
                return
            if len(line) > most:
                raise UserError(f"{path} has over {most} bytes in line {number}: expected JSON; remove the "
                                f"line")
            value = None
            with contextlib.suppress(ValueError):
                value = parse_json(line)
            yield number, line, value


@contextlib.contextmanager
def opened(path, most):
    """A regular file of so many bytes at most, open. UserError where it is none, or cannot be read."""
    check_regular(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise UserError(f"{path} has {size} bytes: expected {most} at most; {HINT}")
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def is_number(value):
    """Whether a value is a number that can be drawn: finite, and none that overflows when it is squared."""
    return type(value) in (int, float) and abs(value) < LARGEST


def is_path(value):
    """a path"""
    return isinstance(value, str) and "\0" not in value and value.isascii() | (
        not any(0xD800 <= ord(letter) < 0xDC80 or 0xDCFF < ord(letter) < 0xE000 for letter in value))


def misfit(value, kind, name=""):
    """How a value differs from its kind, as text: "rows[2].acc1, "x": expected a finite number"; or ""."""
    if isinstance(kind, tuple):
        found = [misfit(value, each, name) for each in kind]
        return found[-1] if all(found) else ""
    if isinstance(kind, FunctionType):
        good, expected = kind(value), kind.__doc__
    elif kind is float:
        good, expected = is_number(value), NAMES[float]
    else:
        plain = type(kind) if isinstance(kind, list | dict) else kind
        good, expected = type(value) is plain, NAMES[plain]
    if not good:
        shown = f"a {type(value).__name__}" if isinstance(value, list | dict) else json.dumps(value)[:60]
        return f"{f'{name}: ' if name else ''}{shown}: expected {expected}"
    inside = []
    if isinstance(kind, list):
        inside = ((each, kind[0], f"{name}[{i}]") for i, each in enumerate(value))
    elif isinstance(kind, dict):
        lacks = [key for key in kind if not key.endswith("?") and key not in value]
        if lacks:
            return f"{f'{name} ' if name else 'an object '}without {lacks[0]}: expected one"
        inside = ((value[key.rstrip("?")], each, f"{name}.{key.rstrip('?')}".lstrip("."))
                  for key, each in kind.items() if key.rstrip("?") in value)
    return next(filter(None, (misfit(*each) for each in inside)), "")
