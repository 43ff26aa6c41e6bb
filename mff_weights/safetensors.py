"""Files that hold tensors and nothing that runs: .safetensors, read lazily and written without the library.

A file is the length of its header (8 bytes, little-endian), the header (JSON: the type, shape and place of
every tensor, and "__metadata__", texts by name), and the tensors' bytes, one behind the other. The header is
a stranger's: everything in it is compared with the size of the file before anything is made of it.
"""

import json
import math
import os

import torch

from mff_min.errors import UserError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000                                                # bytes, as in the library


def read_safetensors(path):
    """({name: tensor}, {name: text}) of a file, on the CPU.

    The tensors are views of the file, mapped copy-on-write: their bytes are read when they are touched.
    Raises UserError where the file is not whole or its header claims what cannot be.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length).decode(), object_pairs_hook=unique)
        metadata, places = check_header(header, size - 8 - length)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"checkpoint {path} cannot be read ({str(error).splitlines()[0]})") from None
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length:]
    tensors = {}
    for name, (dtype, shape, begin, end) in places.items():
        flat = data[begin:end]
        aligned = flat.storage_offset() % dtype.itemsize == 0           # the format does not ask for it
        tensors[name] = (flat if aligned else flat.clone()).view(dtype).reshape(shape)
    return tensors, metadata


def unique(pairs):
    """A JSON object as a dict. Raises ValueError where a name occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in the header")
    return found


def check_header(header, num_bytes):
    """(metadata, {name: (dtype, shape, begin, end)}) of a header for so many bytes of tensors.

    Raises ValueError unless the tensors lie one behind the other and fill these bytes.
    """
    if not isinstance(header, dict):
        raise ValueError("the header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("__metadata__ is no object of texts")
    places = {name: check_entry(ascii(name)[:80], entry) for name, entry in header.items()}
    reached = 0
    for name, (_, _, begin, end) in sorted(places.items(), key=lambda item: item[1][2:]):
        if begin != reached:
            raise ValueError(f"{ascii(name)[:80]} begins at {begin}, the tensor before it ends at {reached}")
        reached = end
    if reached != num_bytes:
        raise ValueError(f"the tensors end at {reached}, the file at {num_bytes}")
    return metadata, places


def check_entry(name, entry):
    """(dtype, shape, begin, end) of a tensor's entry. Raises ValueError unless its size is what they say."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} has no dtype, shape and data_offsets, or more than these")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} is of type {ascii(dtype)[:80]}: expected one of {', '.join(DTYPES)}")
    for numbers, most in ((shape, 16), (offsets, 2)):
        plain = isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2 ** 63 for n in numbers)
        if not plain or len(numbers) > most:
            raise ValueError(f"{name} has shape {ascii(shape)[:80]} at {ascii(offsets)[:80]}")
    if len(offsets) != 2 or math.prod(max(n, 1) for n in shape) >= 2 ** 56:
        raise ValueError(f"{name} has shape {ascii(shape)[:80]} at {ascii(offsets)[:80]}")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name} has shape {shape} of {dtype} in {end - begin} bytes")
    return DTYPES[dtype], shape, begin, end


def write_safetensors(file, tensors, metadata):
    """Write tensors {name: tensor} and texts {name: text} into an open file."""
    header, reached = {"__metadata__": metadata}, 0
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())     # so all are aligned
    for name in names:
        end = reached + tensors[name].numel() * tensors[name].element_size()
        header[name] = dict(dtype=NAMES[tensors[name].dtype], shape=list(tensors[name].shape),
                            data_offsets=[reached, end])
        reached = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        flat = tensors[name].detach().cpu().reshape(-1)
        file.write(flat.contiguous().view(torch.uint8).numpy())
