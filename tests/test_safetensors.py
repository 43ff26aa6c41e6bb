"""Our .safetensors against the library's, and headers that claim what cannot be."""

import json
import random
import resource

import pytest
import torch

from mff_min.errors import UserError
from mff_weights.safetensors import DTYPES, read_safetensors, write_safetensors


def examples():
    """Tensors of every type and of odd shapes: none, scalars, transposed views, sizes that misalign."""
    found = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "turned": torch.randn(3, 5).T,
             "bf16": torch.randn(7).bfloat16(), "a name with \n and \u00e9": torch.ones(1)}
    for name, dtype in DTYPES.items():
        found[name] = torch.randint(0, 2, (3, 3)).to(dtype)
    return found


def write(path, tensors, metadata=None):
    with open(path, "wb") as file:
        write_safetensors(file, tensors, metadata or {"format": "pt"})


def same(got, want):
    return set(got) == set(want) and all(
        got[name].dtype == want[name].dtype and got[name].shape == want[name].shape
        and torch.equal(got[name].contiguous().reshape(-1).view(torch.uint8),
                        want[name].contiguous().reshape(-1).view(torch.uint8)) for name in want)


def test_the_library_reads_what_is_written_here(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    tensors = examples()
    write(tmp_path / "a.safetensors", tensors, {"format": "pt", "config": "{}"})
    assert same(library.load_file(tmp_path / "a.safetensors"), tensors)
    with library.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "config": "{}"}


def test_what_is_written_is_read_again_bit_for_bit(tmp_path):
    tensors = examples()
    write(tmp_path / "a.safetensors", tensors, {"who": "we"})
    got, metadata = read_safetensors(tmp_path / "a.safetensors")
    assert same(got, tensors) and metadata == {"who": "we"}


def test_what_the_library_writes_is_read_here(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    tensors = {name: tensor.contiguous() for name, tensor in examples().items()}
    library.save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    got, metadata = read_safetensors(tmp_path / "a.safetensors")
    assert same(got, tensors) and metadata == {"format": "pt"}


def test_tensors_that_are_not_aligned_are_read(tmp_path):
    header = json.dumps({"a": dict(dtype="U8", shape=[1], data_offsets=[0, 1]),
                         "b": dict(dtype="F32", shape=[1], data_offsets=[1, 5])}).encode()
    data = b"\x07" + torch.tensor([2.5]).numpy().tobytes()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    got, _ = read_safetensors(tmp_path / "a.safetensors")
    assert got["a"].item() == 7 and got["b"].item() == 2.5


def test_reading_maps_the_file_and_changing_a_tensor_leaves_it_alone(tmp_path):
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:                                      # 4 GB of holes, which take no disk
        header = json.dumps({"a": dict(dtype="F32", shape=[2 ** 30], data_offsets=[0, 2 ** 32])}).encode()
        header += b" " * (-len(header) % 8)
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 ** 32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss         # in kB
    tensors, _ = read_safetensors(path)
    tensors["a"][-1] = 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 ** 16
    assert read_safetensors(path)[0]["a"][-1].item() == 0.0


def file_of(header, data=b"\0" * 8, length=None):
    """The bytes of a file with this header, an object or bytes."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(header) if length is None else length
    return length.to_bytes(8, "little") + header + data


def entry(dtype="F32", shape=(2,), data_offsets=(0, 8), **more):
    return dict(dtype=dtype, shape=list(shape), data_offsets=list(data_offsets), **more)


CLAIMS = {
    "no length": b"\1\0\0", "nothing": b"", "a header longer than the file": file_of({}, length=10 ** 6),
    "a header of exabytes": file_of({}, length=2 ** 63), "no JSON": file_of(b"{not json"),
    "no text": file_of(b"\xff\xfe"), "no object": file_of([1]), "deep": file_of(b"[" * 100_000, b""),
    "huge shape": file_of({"a": entry(shape=(2 ** 60,))}),
    "overflow": file_of({"a": entry(shape=(2 ** 62, 4, 0))}),
    "many dimensions": file_of({"a": entry(shape=[1] * 10 ** 4, data_offsets=(0, 4))}),
    "huge offsets": file_of({"a": entry(shape=(2 ** 40,), data_offsets=(0, 2 ** 42))}),
    "beyond the end": file_of({"a": entry(shape=(4,), data_offsets=(0, 16))}),
    "negative": file_of({"a": entry(shape=(-2,))}), "backwards": file_of({"a": entry(data_offsets=(8, 0))}),
    "fraction": file_of({"a": entry(shape=(2.0,))}), "true": file_of({"a": entry(shape=(True, 2))}),
    "overlap": file_of({"a": entry(), "b": entry(shape=(1,), data_offsets=(4, 8))}),
    "hole": file_of({"a": entry(shape=(1,), data_offsets=(4, 8))}),
    "rest": file_of({"a": entry(shape=(1,), data_offsets=(0, 4))}),
    "too little": file_of({"a": entry()}, b"\0"),
    "twice": file_of(b'{"a": 1, "a": 2}'), "type": file_of({"a": entry(dtype="C64")}),
    "type is no text": file_of({"a": entry(dtype=["F32"])}), "more": file_of({"a": entry(code="x")}),
    "no entry": file_of({"a": 3}), "one offset": file_of({"a": entry(data_offsets=(8,))}),
    "metadata": file_of({"__metadata__": {"a": 3}}, b""),
    "long number": file_of(b'{"a": ' + b"9" * 9999 + b"}"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_an_impossible_header_is_refused(tmp_path, claim):
    path = tmp_path / "a.safetensors"
    path.write_bytes(CLAIMS[claim])
    with pytest.raises(UserError, match="a.safetensors cannot be read") as refused:
        read_safetensors(path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700


def test_fuzzed_headers_are_refused_or_read_but_never_allocate_what_they_claim(tmp_path):
    path, random_ = tmp_path / "a.safetensors", random.Random(0)
    write(path, {"a": torch.randn(4, 3), "b": torch.randn(5).bfloat16(), "c": torch.zeros(0, 2)})
    whole, counts = path.read_bytes(), {"read": 0, "refused": 0}
    header = 8 + int.from_bytes(whole[:8], "little")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss         # in kB
    for _ in range(1000):
        mutant = bytearray(whole)
        for _ in range(random_.randint(1, 3)):
            at = random_.randrange(header)
            mutant[at] = random_.choice([*b'0129[]{}",:-eE', random_.randrange(256)])
        if random_.random() < 0.2:
            mutant = mutant[:random_.randrange(len(mutant))]
        path.write_bytes(mutant)
        try:
            tensors, _ = read_safetensors(path)
            assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) <= len(mutant)
            counts["read"] += 1
        except UserError:
            counts["refused"] += 1
    assert counts["refused"] > 300 and counts["read"] > 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 ** 16


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.safetensors does not exist"):
        read_safetensors(tmp_path / "nowhere.safetensors")
