"""Files that outlive a fault: sealed ones are read as ever, altered ones are not. (Whole runs: tests/faults.)
"""

import dataclasses
import errno
import hashlib
import os
import shutil
import zipfile

import pytest
import torch
from run_folders import same_bits

import train_finetune
import train_pretrain
from mff_data.sources import ImageFolder, Subset, fingerprint, open_data
from mff_min.config import parse
from mff_min.errors import Fault, UserError
from mff_min.vit import MODELS, VisionTransformer
from mff_run import files, resume
from mff_run.files import append_line, make_folder, read_checkpoint, seal_of, write_tensors
from mff_run.resume import changed_settings, check_same_settings, find_checkpoint, set_newer_aside, table_of
from mff_run.world import World, start_world

STATE = {"model": {"w": torch.arange(6.0).view(2, 3)}, "optimizer": {}, "step": 4, "loss": 0.5,
         "config": {"img_size": (8, 8), "lr": None}}
ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def path(tmp_path):
    """A sealed file that holds STATE."""
    write_tensors(tmp_path / "last.pt", STATE)
    return tmp_path / "last.pt"


# ---------------------------------------------------------------- folders


def test_a_folder_is_made_and_left_empty(tmp_path):
    for _ in range(2):
        make_folder("--study-dir", tmp_path / "a" / "b")
        assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("path", ["TMP/file", "TMP/file/folder", "/proc/self"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, path):
    """A file, a path through a file, and a folder that is there but that nobody can put a file in."""
    (tmp_path / "file").write_text("")
    path = path.replace("TMP", str(tmp_path))
    with pytest.raises(UserError, match=f"^--study-dir {path} cannot be written: [A-Z]"):
        make_folder("--study-dir", path)


# ---------------------------------------------------------------- the seal


@pytest.mark.parametrize("options", [{}, {"mmap": True}])
def test_pytorch_reads_a_sealed_file_as_any_other(path, options):
    assert same_bits(torch.load(path, weights_only=True, **options), STATE)


def test_timm_reads_a_sealed_file_as_any_other(tmp_path):
    timm = pytest.importorskip("timm")
    model = VisionTransformer(16, **MODELS["vit_test"])
    write_tensors(tmp_path / "encoder.pt", {"model": model.state_dict()})
    theirs = timm.models.VisionTransformer(img_size=16, num_classes=0, **MODELS["vit_test"])
    timm.models.load_checkpoint(theirs, str(tmp_path / "encoder.pt"), strict=True)
    assert same_bits(dict(theirs.state_dict()), dict(model.state_dict()))


def test_a_sealed_file_is_pytorchs_own_bytes_with_a_comment(path, tmp_path):
    with open(tmp_path / "plain.pt", "wb") as file:
        torch.save(STATE, file)
    plain = (tmp_path / "plain.pt").read_bytes()
    seal = b"sha256:" + hashlib.sha256(plain).hexdigest().encode()
    assert path.read_bytes() == plain[:-2] + len(seal).to_bytes(2, "little") + seal
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment == seal


def test_every_altered_byte_is_found(path):
    content = path.read_bytes()
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
        with pytest.raises(UserError, match="last.pt is damaged: its SHA-256 is not the one"):
            read_checkpoint(path)
    path.write_bytes(content)
    assert same_bits(read_checkpoint(path), STATE)


@pytest.mark.parametrize("length", [2, 3, 5, 9, 30])
def test_a_seal_whose_beginning_is_overwritten_is_no_missing_seal(path, length):
    content = bytearray(path.read_bytes())
    start = content.rindex(b"sha256:") - 2                              # the comment's length comes first
    content[start:start + length] = bytes(length)
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged: its SHA-256 is not the one"):
        read_checkpoint(path)


def test_a_file_without_a_seal_is_read_and_for_a_run_this_is_said(tmp_path):
    torch.save(STATE, tmp_path / "last.pt")
    assert seal_of(tmp_path / "last.pt") == b"" and same_bits(read_checkpoint(tmp_path / "last.pt"), STATE)
    said = []
    state = find_checkpoint(tmp_path, "auto", said.append)
    assert state.pop("path") == tmp_path / "last.pt" and same_bits(state, STATE)
    assert len(said) == 1 and "last.pt is not sealed by a SHA-256" in said[0]


# ---------------------------------------------------------------- writing


def test_what_stops_a_save_is_the_systems_reason_with_the_path(path, monkeypatch):
    before = path.read_bytes()

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*last.pt'"):
        write_tensors(path, STATE, previous="previous.pt")
    assert list(path.parent.iterdir()) == [path] and path.read_bytes() == before


def test_the_file_that_was_there_takes_the_name_that_is_asked_for(path):
    write_tensors(path, STATE | {"step": 5}, previous="previous.pt")
    assert read_checkpoint(path)["step"] == 5 and read_checkpoint(path.with_name("previous.pt"))["step"] == 4


def test_a_file_system_that_cannot_flush_a_folder_is_no_fault(path, monkeypatch):
    fsync = os.fsync

    def no_folders(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)
    monkeypatch.setattr(os, "fsync", no_folders)
    write_tensors(path, STATE | {"step": 5})
    assert read_checkpoint(path)["step"] == 5


def test_a_line_that_cannot_be_written_whole_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    append_line(path, dict(step=1))
    before = path.read_bytes()

    class Full:
        """A file that takes three bytes, and then nothing."""

        def __init__(self, file):
            self.file, self.left = file, 3

        def write(self, line):
            if not self.left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.left = 0
            return self.file.write(line[:3])

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()
    monkeypatch.setattr(files, "open", lambda *given, **more: Full(open(*given, **more)), raising=False)
    with pytest.raises(OSError, match=r"No space left on device: '.*log.jsonl'"):
        append_line(path, dict(step=2))
    assert path.read_bytes() == before


@pytest.mark.parametrize("make", [
    lambda path, other: path.symlink_to(other), lambda path, other: os.mkfifo(path),
    lambda path, other: path.symlink_to("/dev/null"),
    lambda path, other: path.symlink_to(other.with_name("absent")),
])
def test_no_line_is_written_to_what_took_the_place_of_a_log(tmp_path, make):
    path, other = tmp_path / "log.jsonl", tmp_path / "others.txt"
    other.write_text("theirs\n")
    make(path, other)
    with pytest.raises(Fault, match="log.jsonl is a link, or no plain file: nothing is written to it"):
        append_line(path, dict(step=2))
    assert other.read_text() == "theirs\n" and not (tmp_path / "absent").exists()


def test_no_line_is_written_to_a_pipe_that_somebody_reads(tmp_path):
    os.mkfifo(tmp_path / "log.jsonl")
    reader = os.open(tmp_path / "log.jsonl", os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(reader), pytest.raises(Fault, match="log.jsonl is a link, or no plain file"):
        append_line(tmp_path / "log.jsonl", dict(step=2))


# ---------------------------------------------------------------- folders and settings


def test_what_is_newer_than_the_checkpoint_in_use_is_set_aside_under_a_free_name(path):
    said, previous = [], path.with_name("previous.pt")
    shutil.copy(path, previous)
    set_newer_aside(path.parent, path, said.append)
    assert path.exists() and said == []
    for n in (1, 2):
        set_newer_aside(path.parent, previous, said.append)
        assert not path.exists() and path.with_name(f"last.pt.aside-{n}").exists() and len(said) == n
        shutil.copy(previous, path)


def test_a_lock_is_given_back_at_the_end_of_a_run(tmp_path):
    for _ in range(2):
        with start_world("cpu") as world:
            resume.claim(tmp_path, world)
            held = world.held[0]
            assert f"process {os.getpid()} on " in (tmp_path / "run.lock").read_text()
        assert held.closed


def test_a_run_that_began_and_ended_between_a_look_and_the_lock_is_not_overwritten(tmp_path):
    cfg = parse(train_pretrain.Config, ["--output-dir", str(tmp_path / "run")])
    with start_world("cpu") as world:
        assert resume.resumed_state(cfg, world) is None                 # there is no folder yet
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "log.jsonl").write_text('{"step": 1}\n')
        with pytest.raises(UserError, match="already holds a run"):
            resume.open_folder(cfg, world)
    assert (tmp_path / "run" / "log.jsonl").read_text() == '{"step": 1}\n'


def test_a_run_that_began_before_there_was_a_flag_goes_on():
    cfg = parse(train_finetune.Config, "--checkpoint x --lr 0.1 --in-chans 3".split())
    saved = dataclasses.asdict(cfg)
    for name in ("adapt", "in_chans", "white"):
        del saved[name]
    check_same_settings(cfg, saved)
    with pytest.raises(UserError, match="adapt +False +True"):
        check_same_settings(dataclasses.replace(cfg, adapt=True), saved)


def test_differences_of_settings_are_a_table():
    changes = changed_settings({"img_size": (8, 8), "lr": 0.1, "name": "a\033[2J"},
                               {"img_size": [8, 8], "lr": 0.25, "name": None}, ["img_size", "lr", "name"])
    assert table_of(changes) == ("  setting  saved       now\n"
                                 "  lr       0.1         0.25\n"
                                 "  name     'a\\x1b[2J'  None")


def test_a_fingerprint_tells_files_that_came_went_or_were_renamed_and_no_folder_that_moved(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(b"")
    before = fingerprint(ImageFolder(tmp_path / "x", "train"))
    assert before.shape == (3,) and before.dtype == torch.int64
    (tmp_path / "x").rename(tmp_path / "y")
    source = ImageFolder(tmp_path / "y", "train")
    assert torch.equal(fingerprint(source), before)
    kept = fingerprint(Subset(source, [0, 2]))
    assert len(kept) == 2 and set(kept.tolist()) < set(before.tolist())
    (tmp_path / "y" / "a" / "1.png").rename(tmp_path / "y" / "a" / "4.png")
    after = fingerprint(ImageFolder(tmp_path / "y", "train"))
    assert len(set(after.tolist()) & set(before.tolist())) == 2


def test_the_embedded_images_have_a_fingerprint_by_their_number(cache):
    few, more = (fingerprint(open_data(f"shapes:{count}", "train", cache, print)) for count in (20, 30))
    assert len(few) == 20 and set(few.tolist()) < set(more.tolist())


def test_too_little_space_for_two_checkpoints_is_said_at_the_start(tmp_path, monkeypatch, capsys):
    model = torch.nn.Linear(1000, 1000, bias=False)                     # 4 MB
    usage = shutil.disk_usage(tmp_path)
    for free, words in ((23_000_000, "0.0 GB are free in"), (24_000_000, "")):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: usage._replace(free=free))
        resume.warn_of_space(tmp_path, ALONE, model, copies=3)
        said = capsys.readouterr().out
        assert words in said and bool(words) == bool(said)
