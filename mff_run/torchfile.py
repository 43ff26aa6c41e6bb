"""PyTorch's files, looked through before PyTorch loads them.

torch.load(weights_only=True) runs no code, but it fills the memory where a file asks it to, and it refuses in
words that suggest turning that off. So a file is first compared with what `torch.save` writes: a zip archive
that packs nothing, or the older row of pickles, which ask for tensors and plain values alone.
"""

import pickletools
import re
import struct
import zipfile
from io import BytesIO

import torch

from mff_min.errors import UserError, printable

MOST_MEMBERS = 100_000                                                  # of an archive: a tensor takes one
ROW_OF_PICKLES = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."           # the first of them, a magic number

# What a file may ask for by name. PyTorch allows more: bytearray(10 ** 10) too.
NAMES = re.compile(r"collections\.OrderedDict|_codecs\.encode|torch\.(nn\.parameter\.Parameter|Size|device"
                   r"|storage\.\w+|\w+Storage|(b?float|u?int|bool|complex)\w*)|torch\._utils\._rebuild_"
                   r"(tensor(_v[23])?|parameter(_with_state)?|meta_tensor_no_storage)")


def look_through(path):
    """Raise UserError for a file that torch.load should not see, with what it is or asks for."""
    with open(path, "rb") as file:
        start = file.read(512)
        file.seek(0, 2)
        size = file.tell()
        file.seek(0)
        if start.startswith(b"PK\3\4"):
            check_archive(path, file, size)
        elif start.startswith(b"\x80"):
            check_names(path, file)
            if not start.startswith(ROW_OF_PICKLES):
                raise UserError(f"checkpoint {path} is a pickle that PyTorch did not write")
            for _ in range(3):                                          # protocol, machine, values
                check_names(path, file)
        else:
            raise UserError(f"checkpoint {path} {look_of(start, size)}")


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
    """Raise UserError for a zip archive that torch.save does not write."""
    try:
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
        if len(members) > MOST_MEMBERS:
            raise UserError(f"checkpoint {path} has {len(members)} members: expected {MOST_MEMBERS} at most")
        names = [member.filename.rpartition("/")[2] for member in members]
        if "constants.pkl" in names:
            raise UserError(f"checkpoint {path} is a TorchScript archive, which is a program: expected "
                            f"weights alone")
        if "data.pkl" not in names:
            raise UserError(f"checkpoint {path} is a zip archive that PyTorch did not write")
        unpacked = sum(member.file_size for member in members)
        packs = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if packs or unpacked > size:
            raise UserError(f"checkpoint {path} unpacks to {unpacked} bytes from {size}: PyTorch packs "
                            f"nothing")
        for name, member in zip(names, members, strict=True):
            if name == "data.pkl":                                      # there may be several of the name
                check_names(path, BytesIO(archive.read(member)))
    except (zipfile.BadZipFile, ValueError, IndexError, NotImplementedError, RuntimeError, EOFError,
            struct.error) as error:
        raise UserError(f"checkpoint {path} cannot be read (its archive is damaged or was cut short: "
                        f"{printable(str(error)[:100])})") from None


def check_names(path, file):
    """Raise UserError for a pickle, the next one in a file, that asks for more than tensors and values.

    What was declared safe by torch.serialization.safe_globals is allowed too.
    """
    declared = {entry[1] for entry in torch.serialization.get_safe_globals() if isinstance(entry, tuple)}
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            name = argument.replace(" ", ".")
            if name not in declared and not NAMES.fullmatch(name):
                asked = ascii(name)[1:-1][:100]
                raise UserError(f"checkpoint {path} is refused: it asks for {asked}, and weights need "
                                f"tensors and plain values alone")
        elif opcode.proto > 3:                                          # names made of texts, for one
            raise UserError(f"checkpoint {path} is refused: it has opcode {opcode.name}, which PyTorch does "
                            f"not write")
