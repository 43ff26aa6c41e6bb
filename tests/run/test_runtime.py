"""Flags, the log, signals: what every stage shares."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from faults.signals import gone
from faults.suite import fork
from torch.utils.data import DataLoader

from mff_data.views import end_workers_at_exit
from mff_min.config import REQUIRED, check_ranges, knob, numbers, opt, parse, side_or_sides
from mff_min.errors import UserError
from mff_run.log import Log, read_log
from mff_run.process import StopSignals, run
from mff_run.world import World, pick_dtype, source_commit, start_world

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
        end_workers_at_exit(os.getpid())                                # as make_loader does
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


def test_the_end_of_a_process_waits_for_no_lock_that_a_killed_worker_held():
    def main(cfg):
        end_workers_at_exit(os.getpid())
        batches = iter(DataLoader(range(8), num_workers=1))
        batches._workers_done_event._cond.acquire()                     # as a worker that looks at it does
        raise SystemExit(143)                                           # whose traceback keeps batches alive
    assert fork(lambda: run(main, None), limit=20).code == 143


def test_a_second_interrupt_inside_a_save_is_one_line_too(capsys):
    def save(cfg):
        try:
            raise KeyboardInterrupt
        finally:                                                        # as torch.save ends its archive
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    with pytest.raises(SystemExit) as stop:
        run(save, None)
    assert stop.value.code == 130 and capsys.readouterr().err == "stopped: interrupted\n"


def test_a_git_that_hangs_does_not_hold_a_run(tmp_path, monkeypatch):
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    wait = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *given, timeout, **more: wait(*given, timeout=0.2, **more))
    assert source_commit() == "unknown"


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


# ---------------------------------------------------------------- launchers


SRUN = dict(SLURM_NTASKS="4", SLURM_STEP_ID="0", SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="0")
INTERACTIVE = dict(SLURM_STEP_ID=str(2 ** 32 - 6))                      # the shell of salloc


def launched(monkeypatch, environment):
    """What run says and returns where a launcher has set this environment: ("", 0) if it begins."""
    for name in [*os.environ]:
        launchers = ("SLURM_", "OMPI_", "PMI", "MV2_", "MPI_", "JSM_", "FLUX_")
        if name.startswith(launchers) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train_probe.py"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    begun = []
    try:
        run(begun.append, None)
    except SystemExit as end:
        assert not begun
        return end.code
    assert begun == [None]
    return 0


@pytest.mark.parametrize("environment, told", [
    (SRUN, "srun started this 4 times, and each would be a run of its own; expected one torchrun on each "
           "host: srun --nodes=1 --ntasks=1 torchrun --nproc-per-node=4 train_probe.py ... (docs/running.md)"
           "; or one process: srun --ntasks=1 python train_probe.py ..."),
    (SRUN | dict(SLURM_STEP_NUM_NODES="2"),
     "srun --nodes=2 --ntasks=2 torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 "
     "--nproc-per-node=2 train_probe.py"),
    (dict(SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_STEP_ID="0"), "srun started this 4 times"),
    (dict(OMPI_COMM_WORLD_SIZE="6", OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_LOCAL_SIZE="6"),
     "mpirun started this 6 times, and each would be a run of its own; expected one torchrun on each host: "
     "torchrun --nproc-per-node=6 train_probe.py ... (docs/running.md); or one process: python train_probe"),
    (dict(OMPI_COMM_WORLD_SIZE="8", OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_LOCAL_SIZE="4"),
     "torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --nproc-per-node=4 train_probe.py"),
    (dict(PMI_SIZE="8", PMI_RANK="0", MPI_LOCALNRANKS="4"),
     "torchrun --nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --nproc-per-node=4 train_probe.py"),
    (SRUN | dict(RANK=""), "srun started this 4 times"), (SRUN | dict(RANK="0"), "srun started this 4 times"),
    (dict(JSM_NAMESPACE_SIZE="2", JSM_NAMESPACE_RANK="0"), "jsrun started this 2 times"),
    (dict(FLUX_JOB_SIZE="2", FLUX_TASK_RANK="0"), "flux started this 2 times"),
    (dict(PMI_SIZE="2", PMI_RANK="0"), "mpirun started this 2 times"),
    (dict(PMIX_RANK="3"), "PMIx started this 4 times or more, and"),
])
def test_several_tasks_without_torchrun_are_refused_with_what_starts_them(monkeypatch, capsys, environment,
                                                                          told):
    assert launched(monkeypatch, environment) == 2
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and told in error


@pytest.mark.parametrize("environment", [
    SRUN | dict(SLURM_PROCID="3"), dict(OMPI_COMM_WORLD_SIZE="6", OMPI_COMM_WORLD_RANK="5"),
    dict(SLURM_NTASKS="4", SLURM_PROCID="2")])
def test_of_several_tasks_the_first_alone_says_so(monkeypatch, capsys, environment):
    assert launched(monkeypatch, environment) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("environment", [
    {}, dict(SLURM_NTASKS="4", SLURM_NNODES="2"),                       # salloc -n 4; python
    dict(SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0"),        # sbatch -n 4, a script without srun
    SRUN | INTERACTIVE, SRUN | INTERACTIVE | dict(SLURM_STEP_NUM_TASKS="1"),
    SRUN | dict(SLURM_STEP_NUM_TASKS="1"),                              # srun -n 1 in a job of four tasks
    SRUN | dict(RANK="0", WORLD_SIZE="1"),                              # srun torchrun
    dict(OMPI_COMM_WORLD_SIZE="1", OMPI_COMM_WORLD_RANK="0"), dict(PMIX_RANK="0"), dict(PMI_SIZE="many"),
])
def test_one_task_of_a_job_of_many_begins(monkeypatch, environment):
    assert launched(monkeypatch, environment) == 0


@pytest.mark.parametrize("environment, found", [
    (dict(RANK="abc"), "RANK=abc"), (dict(RANK=""), "RANK="), (dict(WORLD_SIZE="-1"), "WORLD_SIZE=-1"),
    (dict(RANK="2", WORLD_SIZE="2"), "RANK=2 WORLD_SIZE=2"),
    (dict(RANK="0", WORLD_SIZE="2"), "RANK=0 WORLD_SIZE=2"),
])
def test_what_torchrun_did_not_set_whole_is_refused(monkeypatch, environment, found):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^the environment has {found}; expected all .* torchrun --nproc"):
        with start_world("cpu"):
            pass


@pytest.mark.parametrize("rank, lines", [(None, 1), ("0", 1), ("1", 0)])
def test_an_interrupt_that_reaches_every_rank_is_said_by_rank_0_alone(monkeypatch, capsys, rank, lines):
    if rank:
        monkeypatch.setenv("RANK", rank)

    def main(cfg):
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        run(main, None)
    assert stop.value.code == 130 and capsys.readouterr().err == "stopped: interrupted\n" * lines
