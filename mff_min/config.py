"""A frozen dataclass becomes the flags of a stage.

    @dataclass(frozen=True)
    class Config:
        blr: float = opt(1.5e-4, "base learning rate; lr = blr * global_batch / 256")

    cfg = parse(Config)                                                 # reads sys.argv

A field annotated bool becomes --flag and --no-flag; one annotated `X | None` is "not given" when it is None.
One without a default, opt(REQUIRED, ...), is no flag but an argument; these stand in the order of the fields,
and one annotated tuple[...] takes what is left. A class whose defaults depend on flags has from_flags.
"""

import argparse
import dataclasses
import difflib
import math
import os
import sys

from mff_min.errors import UserError

REQUIRED = dataclasses.MISSING


def check_reachable(name, path):
    """Raise UserError where the system does not tell whether there is a file or folder at path.

    So it is where a folder above it may not be entered, or its name is too long. name is the path's kind.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):                     # the caller says what it expected
        pass
    except OSError as error:
        raise UserError(f"{name} {path} cannot be read: {error.strerror}") from None


def opt(default, help, choices=None, type=None, least=None, above=None, most=None, changes_result=True):
    """A dataclass field with its help text, for a flag.

    type turns the flag's text into the value where the annotation cannot; the value must be in choices, at
    least `least`, more than `above` and at most `most`, where these are given.
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, choices=choices, type=type, bounds=(least, above, most), changes_result=changes_result))


def knob(default, help, **bounds):
    """A field that changes how a run is carried out but not its result, so that it may differ at resume."""
    return opt(default, help, **bounds, changes_result=False)


def check_ranges(cfg):
    """Raise UserError for the first value of a configuration that is outside its field's bounds."""
    for field in dataclasses.fields(cfg):
        value, (least, above, most) = getattr(cfg, field.name), field.metadata["bounds"]
        flag = f"--{field.name.replace('_', '-')} {value}"
        if isinstance(value, int | float) and not abs(value) < 2 ** 63:
            raise UserError(f"{flag}: expected a finite number, below 2 ** 63")
        if value is not None and least is not None and not value >= least:
            raise UserError(f"{flag}: expected {least} or more")
        if value is not None and above is not None and not value > above:
            raise UserError(f"{flag}: expected more than {above}")
        if value is not None and most is not None and not value <= most:
            raise UserError(f"{flag}: expected {most} or less")


def check_channels(in_chans, mean, std):
    """Raise UserError unless mean and std have a number for each channel, and no std is 0."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != in_chans:
            raise UserError(f"--{name} has {len(values)} numbers: expected {in_chans}, one per channel")
    if min(std) <= 0:
        raise UserError(f"--std {min(std)}: expected more than 0")


def check_batches(global_batch, batch_size, world_size):
    """Raise UserError unless the global batch is a whole number of micro-batches on every process."""
    together = batch_size * world_size
    if global_batch % together:
        nearest = max(round(global_batch / together), 1) * together
        raise UserError(f"--global-batch {global_batch} is not a multiple of --batch-size {batch_size} times "
                        f"{world_size} processes; the nearest that is: {nearest}")


def parse(config_class, argv=None):
    """The configuration that the command line asks for. Bad flags end the process: one line, exit code 2."""
    parser = _Parser(description=(sys.modules[config_class.__module__].__doc__ or "").strip(),
                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    changes = parser.add_argument_group("flags that change the result")
    others = parser.add_argument_group("flags that do not")
    for field in dataclasses.fields(config_class):
        group = changes if field.metadata["changes_result"] else others
        flag = "--" + field.name
        names = dict.fromkeys([flag.replace("_", "-"), flag])           # both spellings, each once
        text = field.metadata["help"].replace("%", "%%")
        if field.default is REQUIRED:
            nargs = "+" if getattr(field.type, "__origin__", None) is tuple else None   # + is one or more
            parser.add_argument(field.name, metavar=field.name.upper(), nargs=nargs, help=text,
                                type=os.path.expanduser)
            continue
        text += "" if field.default in (None, "") else f" [{typed(field.default)}]"
        common = dict(default=argparse.SUPPRESS, help=text)
        if field.type is bool:
            group.add_argument(*names, action=argparse.BooleanOptionalAction, **common)
        else:
            kind, choices = field.metadata["type"] or _plain_type(field.type), field.metadata["choices"]
            metavar = None if choices else field.name.upper()
            group.add_argument(*names, type=kind, choices=choices, metavar=metavar, **common)
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args(argv)).items()}
    return getattr(config_class, "from_flags", config_class)(**given)


def side_or_sides(text):
    """An image size: "224" is square, "224x160" is height x width. Returns (height, width)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and 0 < int(side) < 100_000 for side in sides):
        message = f"{text!r} is not an image size: expected a side in pixels, or HEIGHTxWIDTH"
        raise argparse.ArgumentTypeError(message)
    return int(sides[0]), int(sides[-1])


def numbers(text):
    """Comma-separated numbers as a tuple of float: "0.485,0.456,0.406"."""
    try:
        values = tuple(float(part) for part in text.split(","))
        if all(map(math.isfinite, values)):
            return values
        raise ValueError(text)
    except ValueError:
        message = f"{text!r} is not a list of numbers: expected e.g. 0.5,0.5,0.5"
        raise argparse.ArgumentTypeError(message) from None


def _plain_type(annotation):
    """int for `int` and for `int | None`, and so on. Texts may be paths: a ~ at their start is expanded."""
    options = [kind for kind in getattr(annotation, "__args__", (annotation,)) if kind is not type(None)]
    return os.path.expanduser if options[0] is str else options[0]


def typed(value):
    """A value as the user would type it."""
    if isinstance(value, tuple):
        return ("x" if isinstance(value[0], int) else ",").join(map(str, value))
    return value


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, and an unknown flag names the flag it resembles."""

    def parse_args(self, argv=None):
        known, unknown = self.parse_known_args(argv)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
            hint = f"did you mean {close[0]}?" if close else "--help lists them"
            self.error(f"unknown flag {unknown[0]}; {hint}")
        return known

    def error(self, message):
        hint = "; one that begins with - is given as --FLAG=VALUE" * message.endswith("expected one argument")
        print(f"error: {message}{hint}", file=sys.stderr)
        raise SystemExit(2)
