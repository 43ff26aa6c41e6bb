"""How tools end: by signals, killed, with odd flags. What they leave, and what the next one removes."""

import dataclasses
import fcntl
import math
import os
import signal
import time
from types import SimpleNamespace

import pytest
from faults.suite import Child, fork

import train_finetune
import train_pretrain
import train_probe
from mff_data import shapes
from mff_min.config import check_ranges, parse, side_or_sides
from mff_min.errors import UserError
from mff_run.files import remove_leftovers, write_atomically, write_json
from mff_run.output import ERASE, escaped
from mff_run.process import run
from tools import (
    analyze,
    attention,
    convert,
    detect,
    evaluate,
    export_log,
    features,
    pack,
    predict,
    probe_layers,
    reconstruct,
    report,
    segment,
    study,
    watch,
)

MODULES = (train_pretrain, train_probe, train_finetune, analyze, attention, convert, detect, evaluate,
           export_log, features, pack, predict, probe_layers, reconstruct, report, segment, study, watch)
DEAD = 999_999_999                                                      # no process has this number


# ---------------------------------------------------------------- signals

def slow_save(path, begun):
    """work for fork: a tool that is in the middle of a save when begun exists."""
    def write(file):
        file.write(b"half")
        begun.touch()
        time.sleep(60)
    return lambda: run(lambda cfg: write_atomically(path, write), SimpleNamespace())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_inside_a_save_of_a_tool_leaves_one_line_and_no_half_file(tmp_path, number):
    begun = tmp_path / "begun"
    child = Child(slow_save(tmp_path / "a.npy", begun))
    while not begun.exists() and child.process.is_alive():
        time.sleep(0.01)
    os.kill(child.process.pid, number)
    ended = child.end(30)
    assert (ended.code, ended.said) == (128 + number, "stopped: interrupted\n")
    assert os.listdir(tmp_path) == ["begun"]


def test_a_signal_that_was_ignored_stays_so_and_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def main(cfg):
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) not in (before, signal.SIG_IGN)
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run(main, SimpleNamespace())
    finally:
        signal.signal(signal.SIGHUP, old)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_child_of_a_tool_ends_by_a_signal_as_any_process(tmp_path):
    def main(cfg):
        pid = os.fork()
        if not pid:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(9)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    ended = fork(lambda: run(main, SimpleNamespace()))
    assert (ended.code, ended.said) == (0, f"{-signal.SIGTERM}\n")


# ---------------------------------------------------------------- leftovers

def test_the_next_save_of_a_file_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    left = tmp_path / f"a[1].npy.tmp.{DEAD}"
    left.write_text("of a killed process")
    kept = [f"b.npy.tmp.{DEAD}", f"a[1].npy.tmp.{os.getppid()}", "a[1].npy.tmp", "a[1].npy.tmp.1x",
            f"a1.npy.tmp.{DEAD}"]
    for name in kept:
        (tmp_path / name).write_text("another's")
    (tmp_path / f"a[1].npy.tmp.{DEAD - 1}").symlink_to(tmp_path / kept[0])
    (tmp_path / f"a[1].npy.tmp.{DEAD - 2}").mkdir()
    write_json(tmp_path / "a[1].npy", 1)
    assert sorted(os.listdir(tmp_path)) == sorted(
        [*kept, "a[1].npy", f"a[1].npy.tmp.{DEAD - 1}", f"a[1].npy.tmp.{DEAD - 2}"])


def test_the_temporary_file_of_a_process_on_another_machine_stays(tmp_path):
    path = tmp_path / f"last.pt.tmp.{DEAD}"                             # a number that is not taken here
    with open(path, "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        assert fork(lambda: remove_leftovers(tmp_path)).code == 0
        assert path.exists()
    assert fork(lambda: remove_leftovers(tmp_path)).code == 0
    assert not path.exists()


def test_a_killed_conversion_to_a_folder_leaves_nothing_for_ever(tmp_path, pretrained):
    flags = [str(pretrained), str(tmp_path / "hf"), "--to", "hf", "--part", "encoder"]
    left, other = tmp_path / f"hf.tmp.{DEAD}", tmp_path / f"hf.tmp.{DEAD - 1}"
    for folder, name in (left, "config.json"), (other, "notes.txt"):
        folder.mkdir()
        (folder / name).write_text("{}")
    convert.main(parse(convert.Config, flags))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["hf", other.name])


def test_a_killed_drawing_of_the_embedded_images_leaves_nothing_for_ever(tmp_path):
    def work():
        shapes.load_shapes(tmp_path, "val", 40, progress=lambda text: os.kill(os.getpid(), signal.SIGKILL))
    assert fork(work).code == -signal.SIGKILL
    folder, = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 1                             # half of it, hidden
    shapes.load_shapes(tmp_path, "val", 40, progress=lambda text: None)
    assert [path.name for path in folder.iterdir()] == ["val-40"]


# ---------------------------------------------------------------- flags

NUMBERS = [(module, field) for module in MODULES for field in dataclasses.fields(module.Config)
           if {int, float} & {field.type, *getattr(field.type, "__args__",
                                                   ())} and not field.metadata["type"]]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_numbers_that_no_run_can_mean_are_refused_in_a_line(module, capsys):
    values = {int: [2 ** 70, -2 ** 70, 10 ** 5000], float: [1e308, -1e300, math.nan, math.inf, -math.inf]}
    fields = dataclasses.fields(module.Config)
    arguments = ["x"] * sum(field.default is dataclasses.MISSING for field in fields)
    for owner, field in NUMBERS:
        kind = float if float in (field.type, *getattr(field.type, "__args__", ())) else int
        for value in values[kind] if owner is module else ():
            text = "9" * 5000 if value == 10 ** 5000 else str(value)
            with pytest.raises((UserError, SystemExit)):
                check_ranges(parse(module.Config, [*arguments, f"--{field.name}={text}"]))
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())


def test_there_are_bounds_where_a_number_takes_processes_or_layers():
    for module, field in NUMBERS:
        if field.name in ("workers", "jobs", "decoder_depth"):
            assert field.metadata["bounds"][2] <= 1024, module


def test_a_flag_of_several_lines_makes_one_line_of_an_error():
    cfg = parse(convert.Config, ["a\nerror: b", "c\nerror: d.pt"])
    ended = fork(lambda: run(convert.main, cfg))
    assert ended.code == 2 and ended.said.count("\n") == 1 and "'a\\nerror: b'" in ended.said


@pytest.mark.parametrize("text", ["0", "0x224", "224x0", "100000", "9" * 5000, "x", "", "-1", "1e3", "2x2x2",
                                  "²"])
def test_an_image_size_is_a_side_of_five_digits_at_most(text):
    with pytest.raises(Exception) as refused:
        side_or_sides(text)
    assert type(refused.value).__name__ in ("ArgumentTypeError", "ValueError")


# ---------------------------------------------------------------- what is printed

@pytest.mark.parametrize("text, want", [
    ("a\x1b[31m\n", "a\\x1b[31m\n"), (f"{ERASE}50 %", f"{ERASE}50 %"), (f"a{ERASE}", "a\\r\\x1b[K"),
    ("a\tb\n", "a\tb\n"),
    ("\u202e\x07\ud800é", "\\u202e\\x07\\ud800é"),
])
def test_control_characters_are_escaped_where_messages_leave(text, want):
    assert escaped(text) == want
    ended = fork(lambda: run(lambda cfg: print(text, end=""), SimpleNamespace()))
    assert ended.said == want
