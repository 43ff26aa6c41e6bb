"""The tests for a GPU pass too, in a process that sees it and compiles Triton's kernels: pytest -m gpu."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sources import ROOT

from tools.gpu import first as first_run
from tools.gpu import profile_step


def environment_with_gpu():
    """The environment that pytest was started with, as far as GPUs are concerned."""
    environment, devices = dict(os.environ), os.environ["GPU_OF_TESTS"]
    del environment["CUDA_VISIBLE_DEVICES"], environment["TRITON_INTERPRET"]
    return environment if devices == "all" else environment | {"CUDA_VISIBLE_DEVICES": devices}


def test_other_tests_find_no_gpu_and_interpret_kernels():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ["TRITON_INTERPRET"] == "1"
    assert not torch.cuda.is_available()
    assert "CUDA_VISIBLE_DEVICES" not in environment_with_gpu() or os.environ["GPU_OF_TESTS"] != "all"


def test_the_tests_with_the_mark_gpu_pass_in_a_process_of_their_own():
    environment = environment_with_gpu()
    look = [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"]
    if subprocess.run(look, env=environment, capture_output=True, text=True).stdout.strip() != "True":
        pytest.skip("needs a GPU, and PyTorch finds none")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_without_a_gpu_each_of_them_is_skipped_with_the_reason():
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rs", "-p", "no:cacheprovider",
               "tests/method/test_kernels_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" not in done.stdout
    assert "needs a GPU: PyTorch finds no CUDA device" in done.stdout


# ---------------------------------------------------------------- the first run on a GPU


def python(code):
    return [sys.executable, "-c", code]


HANGS = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("its child is", child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def first(tmp_path, monkeypatch):
    """tools/gpu/first.py with short times, and its work folder elsewhere."""
    for name, value in dict(WORK=tmp_path / "work", GRACE=0.5, LEAST=0.2).items():
        monkeypatch.setattr(first_run, name, value)
    return first_run


def test_parts_that_fail_and_hang_stop_no_other_and_leave_what_they_printed(first, tmp_path, capfd):
    Part, out = first.Part, tmp_path / "out"
    written = python(f"print({str(out / 'gpu_first.json')!r}); open({str(out / 'gpu_first.json')!r})")
    groups = [[Part("good", python("print('fine')"), 60), Part("bad", python("x = 1 / 0"), 60)],
              [Part("hangs", python(HANGS), 3)],
              [Part("after", written, 60)],                             # the table is there before it begins
              [Part("late", python("1"), 60, spare=1000)]]
    rows = {row["part"]: row for row in first.run_parts(groups, out, seconds=100)}
    assert {name: row["state"] for name, row in rows.items()} == {
        "good": "passed", "bad": "failed", "hangs": "failed", "after": "passed", "late": "not run"}
    assert rows["bad"]["code"] == 1 and rows["bad"]["why"] == "ZeroDivisionError: division by zero"
    assert rows["hangs"]["why"] == "it was ended after 3 s" and rows["hangs"]["seconds"] < 60
    assert "s were left" in rows["late"]["why"]
    text = (out / "gpu_first.txt").read_text()
    places = [text.index(each) for each in ("fine", "ZeroDivisionError", "its child", "late: not run")]
    assert places == sorted(places)
    assert json.loads((out / "gpu_first.json").read_text())["parts"] == list(rows.values())
    child = re.search(r"its child is (\d+)", text)[1]
    assert command_of(child) == "" and "fine" in capfd.readouterr().out


def test_each_part_of_a_group_ends_by_itself(first, tmp_path):
    """A part that waits to be looked at until the one before it ends would take as long as that one."""
    group = [first.Part("long", python("import time; time.sleep(5)"), 60),
             first.Part("short", python("1"), 60),
             first.Part("over", python("import time; time.sleep(600)"), 0.5)]
    long, short, over = first.run_parts([group], tmp_path / "out", seconds=100)
    assert (long["state"], short["state"], over["state"]) == ("passed", "passed", "failed")
    assert short["seconds"] < long["seconds"] / 2 and over["seconds"] < long["seconds"] / 2


def test_the_table_is_written_beside_the_older_one_and_takes_its_place(first, tmp_path):
    out = tmp_path / "out"
    link = python(f"import os; os.link({str(out / 'gpu_first.json')!r}, {str(tmp_path / 'older.json')!r})")
    groups = [[first.Part("one", python("1"), 60)], [first.Part("link", link, 60)]]
    rows = first.run_parts(groups, out, seconds=100)
    assert [row["state"] for row in rows] == ["passed", "passed"]
    assert json.loads((out / "gpu_first.json").read_text())["parts"] == rows
    assert json.loads((tmp_path / "older.json").read_text())["parts"] == rows[:1]
    assert {path.name for path in out.iterdir()} == {"gpu_first.txt", "gpu_first.json"}


def command_of(pid):
    """What a process was started with; "" of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return ""


def test_every_part_has_a_command_that_exists_and_all_fit_into_the_time(first, tmp_path):
    groups = first.all_parts(tmp_path, 512)
    for part in sum(groups, []):
        words = part.command[len(first.PYTHON):]
        assert words[0] == "-m" and importlib.util.find_spec(words[1]), words
        paths = [ROOT / word for word in words if word.startswith("tests/")]
        assert all("pytest.mark.gpu" in path.read_text() for path in paths), paths
        assert bool(paths) == (words[1] == "pytest"), words
    fixed = [group for group in groups if all("{minutes}" not in part.command for part in group)]
    assert sum(max(part.most for part in group) for group in fixed) <= 590 - 110        # for step and ops
    assert [part.name for part in first.chosen(groups, ["ops", "machine"])[1]] == ["ops"]
    with pytest.raises(SystemExit, match="error: --parts opps: expected some of machine,kernels,"):
        first.chosen(groups, ["opps"])


def test_a_mode_that_there_is_not_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        profile_step.parser().parse_args(["--mode", "fast"])
    assert stop.value.code == 2 and "invalid choice: 'fast'" in capsys.readouterr().err


def test_a_profile_names_the_dearest_kernels_of_every_mode(tmp_path, symbols, capfd):
    for mode in profile_step.MODES:
        words = f"--case tiny --batch 2 --device cpu --seconds 0.01 --mode {mode} --output-dir {tmp_path}"
        profile_step.main(profile_step.parser().parse_args(words.split()))
    rows = json.loads((tmp_path / "profile_cpu.json").read_text())["rows"]
    assert [row["mode"] for row in rows] == ["eager", "compiled", "blocks"]
    for row in rows:
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5) and row["mfu"] > 0
        assert row["img_per_s"] == pytest.approx(2e3 / row["step_ms"]) and row["launches"] > 100
        times = [kernel["ms"] for kernel in row["dearest"]]
        assert times == sorted(times, reverse=True) and sum(times) <= row["profiled_ms"]
    assert "aten::mm" in {kernel["name"] for kernel in rows[0]["dearest"]}
    assert symbols == [] and "eager, batch 2, float32" in capfd.readouterr().out
    again = profile_step.parser().parse_args(words.split())
    profile_step.main(again)                                            # takes the place of its older row
    assert len(json.loads((tmp_path / "profile_cpu.json").read_text())["rows"]) == 3
