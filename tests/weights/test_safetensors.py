"""Safetensors: what goes in comes back, a stranger's header claims nothing, a crash leaves no half."""

import json
import os
import random
import resource
import sys

import pytest
import torch

from mff_min.errors import UserError
from mff_weights.checkpoint import DTYPES, read_safetensors, read_weights, write_safetensors
from tools import convert


def examples():
    """Tensors of every type and of odd shapes: none, scalars, transposed views, parts and names of one."""
    found = {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "none": torch.zeros(0, 2),
             "turned": torch.randn(3, 5).T, "a name with \n and \u00e9": torch.ones(1)}
    whole = torch.randn(6, 2)
    found |= dict(zip("qkv", whole.chunk(3), strict=True)) | {"whole": whole, "wide": torch.ones(1).expand(9)}
    return found | {str(dtype): torch.randint(0, 2, (3, 3)).to(dtype) for dtype in DTYPES}


def same(got, want):
    return set(got) == set(want) and all(
        got[name].dtype == want[name].dtype and got[name].shape == want[name].shape
        and torch.equal(got[name].contiguous().reshape(-1).view(torch.uint8),
                        want[name].contiguous().reshape(-1).view(torch.uint8)) for name in want)


def test_what_is_written_is_read_again_bit_for_bit(tmp_path):
    tensors = examples()
    write_safetensors(tmp_path / "a.safetensors", tensors, {"who": "we"})
    got, metadata = read_safetensors(tmp_path / "a.safetensors")
    assert same(got, tensors) and metadata == {"who": "we"}


def test_a_file_is_whole_and_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    path, flushed = tmp_path / "a.safetensors", []
    write_safetensors(path, {"a": torch.zeros(2)}, {})
    before, fsync, replace = path.read_bytes(), os.fsync, os.replace
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode   # others may read it

    def put(source, target):
        assert os.stat(source).st_ino in flushed and path.read_bytes() == before
        replace(source, target)
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino) or fsync(handle))
    monkeypatch.setattr(os, "replace", put)
    write_safetensors(path, {"a": torch.ones(2)}, {})
    assert read_safetensors(path)[0]["a"].tolist() == [1, 1]
    assert sorted(os.listdir(tmp_path)) == ["a.safetensors", "plain"]


def test_a_disk_that_is_full_is_named_and_the_file_that_was_there_stays(tmp_path):
    path, limit = tmp_path / "a.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_safetensors(path, {"a": torch.zeros(2)}, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))         # Python ignores SIGXFSZ
    try:
        with pytest.raises(OSError, match="a.safetensors cannot be written .*File too large"):
            write_safetensors(path, {"a": torch.zeros(2 ** 16)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert os.listdir(tmp_path) == ["a.safetensors"] and len(read_safetensors(path)[0]["a"]) == 2


def test_without_the_package_one_line_names_the_extra_before_work_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "safetensors.torch", raising=False)
    (tmp_path / "a.safetensors").touch()
    for work in (lambda: read_weights(tmp_path / "a.safetensors"),
                 lambda: convert.main(convert.Config("nowhere.pt", str(tmp_path / "b.safetensors"))),
                 lambda: convert.main(convert.Config("nowhere.pt", str(tmp_path / "b"), to="hf"))):
        with pytest.raises(UserError, match=r"pip install -e '.\[weights\]'") as refused:
            work()
        assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="nowhere.pt does not exist"):   # which needs no package
        convert.main(convert.Config("nowhere.pt", str(tmp_path / "b.pth")))


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
    "twice": file_of(b'{"a": 1, "a": 2}'), "type": file_of({"a": entry(dtype="C65")}),
    "type is no text": file_of({"a": entry(dtype=["F32"])}),
    "no entry": file_of({"a": 3}), "one offset": file_of({"a": entry(data_offsets=(8,))}),
    "metadata": file_of({"__metadata__": {"a": 3}}, b""),
    "a size of 64 bits": file_of({"a": entry(shape=(2 ** 64 - 1, 0), data_offsets=(0, 0))}, b""),
    "a type of six bits": file_of({"a": entry("F6_E2M3", (4,), (0, 3))}, b"\0" * 3),
    "a name with an escape": file_of({"\x1b[2J\n": entry(data_offsets=(4, 12))}),
    "long number": file_of(b'{"a": ' + b"9" * 9999 + b"}"),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_an_impossible_header_is_refused(tmp_path, claim):
    path = tmp_path / "a.safetensors"
    path.write_bytes(CLAIMS[claim])
    with pytest.raises(UserError, match="a.safetensors cannot be read") as refused:
        read_safetensors(path)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 700


@pytest.mark.parametrize("dtype, shape", [("C64", (1,)), ("F4", (16,)), ("F32", [1] * 10 ** 4 + [2])])
def test_a_tensor_that_is_no_plain_one_is_refused(tmp_path, dtype, shape):
    (tmp_path / "a.safetensors").write_bytes(file_of({"patch_embed.proj.weight": entry(dtype, shape)}))
    with pytest.raises(UserError, match="expected plain tensors, whole in the file") as refused:
        read_weights(tmp_path / "a.safetensors")
    assert len(str(refused.value)) < 700


def test_fuzzed_headers_are_refused_or_read_but_never_allocate_what_they_claim(tmp_path):
    path, random_ = tmp_path / "a.safetensors", random.Random(0)
    tensors = {"a": torch.randn(4, 3), "b": torch.randn(5).bfloat16(), "c": torch.zeros(0, 2)}
    write_safetensors(path, tensors, {"format": "pt"})
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
