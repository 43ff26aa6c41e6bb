"""PyTorch's files, looked through before PyTorch loads them.

torch.load(weights_only=True) runs no code, but it fills the memory where a file asks it to, and it refuses in
words that suggest turning that off. So a file is first compared with what `torch.save` writes: a zip archive
that packs nothing, or the older row of pickles. Weights are tensors and plain values alone. Where a file of
strangers holds more, such as the configuration of a run, a StandIn takes the place of each foreign class.
"""

import _compat_pickle
import pickletools
import re
import shlex
import struct
import zipfile
from io import BytesIO

from mff_min.errors import UserError, printable

MOST_FOREIGN = 200                                                      # names, each looked up in all others
MOST_MEMBERS = 100_000                                                  # of an archive: a tensor takes one
ROW_OF_PICKLES = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."           # the first of them, a magic number

# What a file may ask for by name. PyTorch allows more: bytearray(10 ** 10) too.
NAMES = re.compile(r"collections\.OrderedDict|_codecs\.encode|builtins\.complex|torch\.(Size|device"
                   r"|nn\.parameter\.Parameter|storage\.\w+|\w+Storage|(b?float|u?int|bool|complex)\w*)|torch\._utils\._rebuild_"
                   r"(tensor(_v[23])?|parameter(_with_state)?|meta_tensor_no_storage)")
# These too, where their argument is a list or a dict that the file itself holds.
FILLED = ("builtins.set", "collections.Counter")
FRESH = ("EMPTY_LIST", "EMPTY_DICT", "TUPLE1")                          # (set,) alone is no call of it

# No StandIn takes the place of these. PyTorch blocks the first four modules, and knows others itself.
REFUSED = re.compile(r"(os|posix|nt|sys)\..*|builtins\.bytearray|torch\.(_.*|[^.]*|nn\.parameter\..*"
                     r"|(cuda|distributed|nested|serialization|sparse|storage)\..*)", re.S)
UNSCRIPT = ("python -c \"import sys, torch; torch.save(torch.jit.load(sys.argv[1], 'cpu').state_dict(), "
            "sys.argv[2])\"")
WAY_ON = "where it was made, torch.save(model.state_dict(), FILE) saves the weights alone"


class FilledLikeADict(type):
    """PyTorch fills what it takes for a dict: it asks `type(x) in [dict, ...]`."""

    def __eq__(cls, other):
        return other is cls or other is dict

    __hash__ = type.__hash__


class StandIn(list, metaclass=FilledLikeADict):
    """Takes the place of an object whose class is not loaded: made of anything, it does nothing.

    It keeps what it is given as a dict, because some put weights into a dict of their own. It is a list
    because newer versions of PyTorch append to those.
    """

    def __new__(cls, *values, **named):
        made = super().__new__(cls)
        made.entries = {}
        return made

    def __init__(self, *values, **named):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        self.entries[key] = value

    def append(self, item):
        pass

    extend = append
    __hash__, __eq__ = object.__hash__, object.__eq__


def stand_ins(names):
    """What torch.serialization.safe_globals takes so that a StandIn replaces each class of these names."""
    return [(FilledLikeADict(name, (StandIn,), {}), name) for name in sorted(names)]


def look_through(path):
    """The names of foreign classes and functions that a file asks for. It is safe with a StandIn for each.

    Raises UserError for a file that torch.load should not see, with what it is or asks for.
    """
    with open(path, "rb") as file:
        start = file.read(512)
        file.seek(0, 2)
        size = file.tell()
        file.seek(0)
        if start.startswith(b"PK\3\4"):
            return check_archive(path, file, size)
        if not start.startswith(b"\x80"):
            raise UserError(f"checkpoint {path} {look_of(start, size)}")
        foreign = check_names(path, file)
        if not start.startswith(ROW_OF_PICKLES):
            asks = f": it asks for {shown(min(foreign))}" if foreign else ""
            raise UserError(f"checkpoint {path} is a pickle that PyTorch did not write{asks}")
        for _ in range(3):                                              # protocol, machine, values
            foreign |= check_names(path, file)
        return foreign


def look_of(start, size):
    """What a file that is no checkpoint looks like by its first bytes, for a message."""
    text = start.lstrip().lower()
    if not start:
        return "is empty"
    if text.startswith((b"<!doctype html", b"<html")):
        return f"is an HTML page of {size} bytes: expected what it links to"
    if text.startswith(b"version https://git-lfs"):
        return "is a pointer of git-lfs: expected the file itself, which git lfs pull gets"
    if start[257:262] == b"ustar":
        return "is a tar archive, PyTorch's format before 0.1.10, which cannot be read safely"
    if start[8:9] == b"{":
        return "looks like a safetensors file: expected a name that ends in .safetensors"
    if all(byte >= 32 or byte in b"\t\r\n" for byte in start):
        return f"is a text of {size} bytes"
    return "cannot be read (it is no file of PyTorch's)"


def check_archive(path, file, size):
    """The foreign names of a zip archive. Raises UserError for one that torch.save does not write."""
    foreign = set()
    try:
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
        if len(members) > MOST_MEMBERS:
            raise UserError(f"checkpoint {path} has {len(members)} members: expected {MOST_MEMBERS} at most")
        names = [member.filename.rpartition("/")[2] for member in members]
        if "constants.pkl" in names:
            raise UserError(f"checkpoint {path} is a TorchScript archive, which is a program: expected "
                            f"weights alone; where you trust it, {UNSCRIPT} {shlex.quote(str(path))} "
                            f"weights.pth takes them out")
        if "data.pkl" not in names:
            raise UserError(f"checkpoint {path} is a zip archive that PyTorch did not write")
        unpacked = sum(member.file_size for member in members)
        packs = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if packs or unpacked > size:
            raise UserError(f"checkpoint {path} unpacks to {unpacked} bytes from {size}: PyTorch packs "
                            f"nothing")
        for name, member in zip(names, members, strict=True):
            if name == "data.pkl":                                      # there may be several of the name
                foreign |= check_names(path, BytesIO(archive.read(member)))
        return foreign
    except (zipfile.BadZipFile, ValueError, IndexError, NotImplementedError, RuntimeError, EOFError,
            struct.error) as error:
        raise UserError(f"checkpoint {path} cannot be read (its archive is damaged or was cut short: "
                        f"{printable(str(error)[:100])})") from None


def check_names(path, file):
    """The foreign names that a pickle, the next one in a file, asks for. UserError for REFUSED ones."""
    foreign, memo, called = set(), {}, ""                               # called: of FILLED, and just named
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = called
            continue
        if called and opcode.name not in FRESH:
            refuse(path, f"asks for {called} of more than it holds")
        called = memo.get(argument, "") if opcode.name in ("BINGET", "LONG_BINGET") else ""
        if opcode.name in ("GLOBAL", "INST"):
            name = current_name(*argument.split(" ", 1))
            if name in FILLED:
                called = name
            elif REFUSED.fullmatch(name) and not NAMES.fullmatch(name):
                refuse(path, f"asks for {shown(name)}")
            elif not NAMES.fullmatch(name):
                foreign.add(name)
                if len(foreign) > MOST_FOREIGN:
                    refuse(path, f"asks for more than {MOST_FOREIGN} classes, {shown(name)} among them")
        elif opcode.proto > 3:                                          # names made of texts, for one
            refuse(path, f"has opcode {opcode.name}, which PyTorch does not write")
    return foreign


def current_name(module, name):
    """The name in Python 3 of what a pickle calls so, as PyTorch looks it up: __builtin__ is builtins."""
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
    return f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"


def refuse(path, what):
    """Raise UserError for a file because of what it asks for."""
    raise UserError(f"checkpoint {path} is refused: it {what}, and weights need tensors and plain values "
                    f"alone; {WAY_ON}")


def shown(name):
    """A name for a message, which nothing in it can make two lines of."""
    return ascii(name)[1:-1][:100]
