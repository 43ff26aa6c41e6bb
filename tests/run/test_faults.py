"""The suite that causes faults: what fails makes it fail, what goes unnoticed is said, figures are kept."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from faults import __main__ as runner
from faults.suite import Child, Ended, Fault, Guard, Outcome, Tally, fork, share_out
from sources import ROOT

from mff_min.errors import UserError


def survive(folder, quick):
    return Outcome(2 if quick else 5, 2 if quick else 5, lost=1, figures=dict(size=3))


@pytest.fixture
def suite(monkeypatch):
    """suite(faults, guards, **flags): whether the runner is content with them."""
    def call(faults, guards=(), **flags):
        monkeypatch.setattr(runner, "collect", lambda: (faults, list(guards)))
        monkeypatch.setattr(runner, "prepared", lambda: None)
        return runner.main(runner.Config(**flags))
    return call


# ---------------------------------------------------------------- the runner


def test_a_fault_that_is_survived_is_one_line(suite, capsys):
    assert suite([Fault("storm", 1, survive)])
    line, total = capsys.readouterr().out.splitlines()
    assert re.match(r"storm +tried +5  survived +5  lost +1 +\d+\.\d s  \[1/1, .* gone, 0:00:00 left\]", line)
    assert total.startswith("survived 5 of 5 trials of 1 faults in ")
    assert suite([Fault("storm", 1, survive)], quick=True)
    assert "tried     2" in capsys.readouterr().out


def not_survived(folder, quick):
    return Outcome(5, 4, problems=["the third one is gone"])


def breaks(folder, quick):
    raise RuntimeError("not this way")


def dies(folder, quick):
    os._exit(1)


@pytest.mark.parametrize("run, words", [(not_survived, "the third one is gone"),
                                        (breaks, "RuntimeError: not this way"),
                                        (dies, "the process that was to cause it died")])
def test_a_fault_that_is_not_survived_or_breaks_fails_the_suite(suite, capsys, run, words):
    assert not suite([Fault("calm", 1, survive), Fault("storm", 2, run)])
    said = capsys.readouterr().out
    assert words in said and "trials of 2 faults" in said


def test_faults_are_chosen_by_a_part_of_their_name(suite, capsys):
    assert suite([Fault("calm", 1, survive), Fault("storm", 2, breaks)], only="cal")
    with pytest.raises(UserError, match="--only hail: expected a part of one of: calm, storm"):
        suite([Fault("calm", 1, survive), Fault("storm", 2, breaks)], only="hail")
    with pytest.raises(UserError, match="--without roof: expected one of wall"):
        suite([Fault("calm", 1, survive)], [Guard("wall", "calm", None)], without="roof")


walls = ["wall"]


def behind_walls(folder, quick):
    return Outcome(1, len(walls), problems=[] if walls else ["blown away"])


def test_a_removed_guard_is_missing_in_the_process_of_the_fault_alone(suite, capsys):
    faults, guards = [Fault("storm", 1, behind_walls)], [Guard("walls", "storm", walls.clear)]
    assert suite(faults, guards)
    assert not suite(faults, guards, without="walls")
    assert "blown away" in capsys.readouterr().out and walls == ["wall"]


def break_off():
    raise AttributeError("no such wall")


def test_controls_fail_unless_every_guard_is_caught_by_a_fault_that_is_else_survived(suite, capsys, tmp_path):
    storm, calm = Fault("storm", 1, behind_walls), Fault("calm", 1, survive)
    flood = Fault("flood", 1, not_survived)
    caught = Guard("walls", "storm", walls.clear)
    assert suite([storm], [caught], controls=True, output_dir=tmp_path)
    assert "caught 1 of 1" in capsys.readouterr().out
    row, = json.loads((tmp_path / "controls_cpu.json").read_text())["controls"]
    assert row["caught"] and row["found"] == "0 of 1 survived: blown away"
    for guard, why in ((Guard("paint", "calm", walls.clear), "2 of 2 survived"),
                       (Guard("dyke", "flood", walls.clear), "the fault fails with every guard in its place"),
                       (Guard("gate", "storm", break_off), "AttributeError: no such wall")):
        assert not suite([storm, calm, flood], [caught, guard], controls=True)
        said = capsys.readouterr().out
        assert "NOT CAUGHT" in said and why in said and "caught 1 of 2" in said


def test_what_was_found_is_written_down(suite, tmp_path):
    suite([Fault("storm", 3, survive)], output_dir=tmp_path)
    found = json.loads((tmp_path / "faults_cpu.json").read_text())
    row, = found["faults"]
    assert row.pop("seconds") >= 0 and not found["quick"] and found["environment"]["torch"]
    assert row == dict(name="storm", promise=3, tried=5, survived=5, lost=1, figures=dict(size=3),
                       problems=[])


def test_every_guard_names_a_fault_and_no_name_stands_twice():
    faults, guards = runner.collect()
    names = [fault.name for fault in faults]
    assert len(guards) >= 10 and {guard.fault for guard in guards} <= set(names)
    assert len(set(names)) == len(names) and len({guard.name for guard in guards}) == len(guards)
    assert {fault.promise for fault in faults} <= set(range(1, 13))


@pytest.mark.parametrize("more, code", [([], 0), (["--without", "no-fsync-of-the-folder"], 1)])
def test_the_command_fails_without_a_guard_and_passes_with_it(more, code):
    command = [sys.executable, "tests/faults", "--only", "order of write", *more]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == code, ended.stdout + ended.stderr


# ---------------------------------------------------------------- children


def test_a_child_tells_its_code_and_words_and_is_killed_after_its_time():
    def speak():
        print("one")
        print("two", file=sys.stderr)
        raise SystemExit(7)
    ended = fork(speak)
    assert ended == Ended(7, ended.said) and set(ended.said.split()) == {"one", "two"}
    assert Child(lambda: time.sleep(60)).end(0.1).code == -9


def test_trials_on_several_processes_are_all_counted():
    tally = Tally()
    trials = [lambda i=i: [("", i), ("torn" if i == 3 else "", 0)] for i in range(5)] + [lambda: os._exit(1)]
    share_out(trials, tally, processes=2)
    outcome = tally.outcome(size=1)
    assert (outcome.tried, outcome.survived, outcome.lost) == (11, 9, 4) and outcome.figures == dict(size=1)
    assert outcome.problems == ["torn", "the process of some trials died before their end"]


# ---------------------------------------------------------------- what is recorded


def test_the_recorded_figures_are_of_this_suite_and_all_is_survived_and_caught():
    faults, guards = runner.collect()
    found, controls = (json.loads((ROOT / "results" / f"{name}_cpu.json").read_text())
                       for name in ("faults", "controls"))
    assert not found["quick"] and {row["name"] for row in found["faults"]} <= {fault.name for fault in faults}
    assert all(row["survived"] == row["tried"] > 0 for row in found["faults"])
    assert {row["name"] for row in controls["controls"]} <= {guard.name for guard in guards}
    assert len(controls["controls"]) >= 10 and all(row["caught"] for row in controls["controls"])
