"""Flags, the log, signals: what every stage shares."""

import dataclasses
import json
import multiprocessing
import signal
import time

import pytest
import torch
from faults.signals import gone
from faults.suite import fork

from mff_min.config import REQUIRED, check_ranges, knob, numbers, opt, parse, side_or_sides
from mff_min.errors import UserError
from mff_run.log import Log, read_log
from mff_run.process import StopSignals, run
from mff_run.world import World, pick_dtype, start_world

ALONE = World(0, 1, 0, torch.device("cpu"))


@dataclasses.dataclass(frozen=True)
class Config:
    img_size: tuple[int, int] = opt((224, 224), "a size", type=side_or_sides)
    mean: tuple[float, ...] = opt((0.5,), "some numbers", type=numbers)
    steps: int | None = opt(None, "a count", above=0)
    lr: float = opt(0.5, "a rate, 100 % documented", least=0)
    norm_pix_loss: bool = opt(True, "a switch")
    workers: int = knob(0, "a count that changes no result")


def test_flags_accept_dashes_and_underscores_alike():
    for flags in (["--img-size", "8x16", "--no-norm-pix-loss"], ["--img_size", "8x16", "--no-norm_pix_loss"]):
        cfg = parse(Config, flags)
        assert cfg.img_size == (8, 16) and cfg.norm_pix_loss is False and cfg.steps is None


def test_flags_have_the_type_of_their_field():
    cfg = parse(Config, "--steps 3 --lr 1e-3 --mean 0.1,0.2 --img-size 32".split())
    assert cfg == Config(img_size=(32, 32), mean=(0.1, 0.2), steps=3, lr=1e-3)


def test_a_home_folder_is_found_whatever_the_shell_leaves_of_it(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Script:
        source: str = opt(REQUIRED, "what to read")
        more: tuple[str, ...] = opt(REQUIRED, "what else")
        output_dir: str = opt("runs", "a folder")
        name: str | None = opt(None, "a text")
    monkeypatch.setenv("HOME", "/home/me")
    cfg = parse(Script, ["~/a", "b", "~/c", "--output-dir=~/runs", "--name", "a~b"])
    assert cfg == Script("/home/me/a", ("b", "/home/me/c"), "/home/me/runs", "a~b")
    assert parse(Script, ["a", "b"]) == Script("a", ("b",))


def test_fields_without_a_default_are_arguments_in_their_order(capsys):
    @dataclasses.dataclass(frozen=True)
    class Script:
        source: str = opt(REQUIRED, "what to read")
        target: str = opt(REQUIRED, "what to write")
        seed: int = opt(0, "a flag", least=0)
    assert parse(Script, ["a", "--seed", "3", "b"]) == Script("a", "b", seed=3)
    check_ranges(Script("a", "b"))
    with pytest.raises(SystemExit):
        parse(Script, ["a"])
    assert capsys.readouterr().err == "error: the following arguments are required: TARGET\n"


def test_help_shows_every_default_as_it_is_typed(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Config, ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "[224x224]" in text and "100 % documented [0.5]" in text


@pytest.mark.parametrize("flags", ["--step 3", "--steps=x", "--mean a", "extra", "--lr"])
def test_a_bad_flag_is_one_line_and_exit_code_2(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        parse(Config, flags.split())
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and errors.startswith("error: ") and errors.count("\n") == 1


def test_values_outside_their_bounds_are_named():
    check_ranges(Config(lr=0, steps=1))
    with pytest.raises(UserError, match="--lr -0.1: expected 0 or more"):
        check_ranges(Config(lr=-0.1))
    with pytest.raises(UserError, match="--steps 0: expected more than 0"):
        check_ranges(Config(steps=0))
    with pytest.raises(UserError, match="--lr nan: expected a finite number"):
        check_ranges(Config(lr=float("nan")))


def test_a_resumed_log_loses_the_lines_after_its_step_and_torn_ones(tmp_path):
    log = Log(tmp_path, ALONE, 0)
    for step in (1, 2, 3):
        log.write(step=step, loss=0.1)
    log.write(step=3, done=True)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 3]
    Log(tmp_path, ALONE, 2).write(step=3, loss=0.2)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.1}, {"step": 3, "loss": 0.2}]


def test_stop_signals_are_noted_between_start_and_release_alone():
    class Reached(Exception):
        pass

    def default(number, frame):
        raise Reached
    before = signal.signal(signal.SIGUSR1, default)
    with StopSignals() as signals:
        with pytest.raises(Reached):
            signal.raise_signal(signal.SIGUSR1)
        signals.start()
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert signals.number == signal.SIGUSR1
        with pytest.raises(KeyboardInterrupt):                          # the second one leaves at once
            signal.raise_signal(signal.SIGINT)
        signals.release()
        with pytest.raises(Reached):
            signal.raise_signal(signal.SIGUSR1)
        signals.start()
    with pytest.raises(Reached):
        signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def test_a_process_alone_is_rank_0_of_1_and_averages_itself(monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    with start_world("cpu") as world:
        assert world == ALONE and world.is_main
        assert world.mean([1.5, 2.0]) == [1.5, 2.0] and world.max(3) == 3 and world.all_gather("x") == ["x"]


def test_automatic_dtype_is_float32_on_a_cpu():
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


class Unforeseen(BaseException):
    """An error that is not even an Exception."""


@pytest.mark.parametrize("error, code, said", [
    (Unforeseen("no reason"), 1, "Unforeseen: no reason"), (KeyError("x"), 1, "KeyError: 'x'"),
    (RuntimeError("CUDA error: no reason"), 1, "RuntimeError: CUDA error"), (SystemExit("words"), 1, "words"),
    (SystemExit(3), 3, ""), (UserError("bad input"), 2, "error: bad"), (KeyboardInterrupt(), 130, "stopped")])
def test_whatever_leaves_a_run_its_workers_are_ended_and_do_not_keep_the_process(tmp_path, error, code, said):
    def main(cfg):
        started = [multiprocessing.get_context("fork").Process(target=work, daemon=True) for _ in "ab"]
        for process in started:
            process.start()
        (tmp_path / "pids").write_text(" ".join(str(process.pid) for process in started))
        time.sleep(0.5)                                                 # until they ignore it
        raise error

    def work():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    ended = fork(lambda: run(main, None), limit=30)
    assert ended.code == code and said in ended.said, ended.said
    assert gone(map(int, (tmp_path / "pids").read_text().split()), 10) is not None


def test_an_error_that_no_code_foresees_leaves_run_as_it_is():
    def main(cfg):
        raise error
    error = ValueError("no reason")
    with pytest.raises(ValueError) as caught:
        run(main, None)
    assert caught.value is error


def test_a_lost_worker_is_named_also_where_its_signal_breaks_a_save(capsys):
    def save(cfg):
        try:
            raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed.")
        finally:                                                        # as torch.save ends its archive
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    with pytest.raises(SystemExit) as stop:
        run(save, None)
    said = capsys.readouterr().err
    assert stop.value.code == 3 and said.startswith("error: DataLoader worker (pid 5) is killed by signal: ")
