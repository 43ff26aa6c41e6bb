"""The promises of a run, once for all stages: each test runs for every row of STAGES.

A new stage costs a row. What is special to one stage is in test_pretrain, test_probe or test_finetune.
"""

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from run_folders import assert_same_run, same_bits, state_of, torchrun
from sources import ROOT
from teachers import openai_state, random_tower
from waits import waits_in_steps

import train_detect
import train_finetune
import train_pretrain
import train_probe
import train_segment
from mff_min.config import parse
from mff_min.errors import UserError
from mff_min.probe import LinearProbe
from mff_min.stream import Stream
from mff_min.vit import MODELS, VisionTransformer
from mff_run import run as run_module
from mff_run.flops import classifier_flops, step_flops
from mff_run.log import read_log
from mff_run.process import Stopped, run
from mff_run.world import World
from mff_tasks.attention import add_relative_positions, add_windows
from mff_tasks.features import flops_with_teacher, open_teacher
from mff_tasks.rcnn import MaskRCNN, detector_flops
from mff_tasks.upernet import Segmenter, segmenter_flops

# 105 images are 6.6 steps. The 21 images for validation divide neither by two ranks nor by batches of eight.
SMALL = ("--data shapes:105 --global-batch 16 --batch-size 8 --log-every 1 --save-every 3 "
         "--device cpu").split()
MODEL = ("--model vit_test --img-size 16 --decoder-embed-dim 16 --decoder-depth 1 "
         "--decoder-num-heads 2").split()


class Row(NamedTuple):
    """A stage, and what tells it from the others here."""
    stage: object                                                       # its module
    flags: list[str]                                                    # PRETRAINED and TEACHER are paths
    busy: str                                                           # flags that use all its parts
    paths: tuple[str, ...]                                              # more flags, whose steps do not wait
    flops: object                                                       # cfg -> of one image
    too_high: str = "--lr 1e18"                                         # flags: the loss ends as NaN
    sums: bool = True                                                   # whether ranks only add up gradients
    at_once: str = "--warmup-epochs 0"                                  # flags of no warm-up


def flops_of_pretraining(cfg):
    return step_flops(train_pretrain.build_model(cfg, torch.device("cpu")))


def flops_of_feature_targets(cfg):
    teacher, _ = open_teacher(cfg, World(0, 1, 0, torch.device("cpu")), torch.float32)
    return flops_with_teacher(train_pretrain.build_model(cfg, torch.device("cpu"), teacher), teacher)


def flops_of_a_probe(cfg):
    return classifier_flops(VisionTransformer((16, 16), **MODELS["vit_test"]), LinearProbe(64, 10).head, True)


def flops_of_a_classifier(cfg):
    model = VisionTransformer((16, 16), num_classes=10, **MODELS["vit_test"])
    return classifier_flops(model, model.head, False)


def flops_of_a_segmenter(cfg):
    model = VisionTransformer((16, 16), **MODELS["vit_test"])
    add_relative_positions(model)
    return segmenter_flops(Segmenter(model, 11, width=8))


def flops_of_a_detector(cfg):
    model = VisionTransformer((16, 16), **MODELS["vit_test"])
    add_windows(model, 2)
    return detector_flops(MaskRCNN(model, 10, width=8, regions=8))


FROM = ["--checkpoint", "PRETRAINED"]
MILAN = "--target clip --masking importance --decoder prompting".split()
STAGES = {
    "pretrain": Row(train_pretrain, [*MODEL, "--picture-every", "99"], "--lr 1e-3 --clip-grad 0.5",
                    ("--clip-grad 0.1", "--low-pass-radius 40", "--dtype bfloat16"), flops_of_pretraining),
    # A rank normalises its own features and keeps its own running statistics.
    "probe": Row(train_probe, FROM, "--blr 1 --eval-every 0.5", ("--dtype bfloat16",), flops_of_a_probe,
                 too_high="--lr 1e18 --weight-decay 1e18", sums=False),
    "finetune": Row(train_finetune, FROM, "--lr 1e-3 --reprob 0.5 --ema 0.9 --drop-path 0.3 --clip-grad 1 "
                    "--repeats 2", ("--clip-grad 0.1", "--dtype bfloat16"), flops_of_a_classifier),
    # A rank's BatchNorm has running statistics of its own on a CPU.
    "segment": Row(train_segment, [*FROM, *"--img-size 16 --width 8 --picture-every 99".split()],
                   "--lr 1e-3 --drop-path 0.3 --clip-grad 1 --eval-every 8 --picture-every 16",
                   ("--clip-grad 0.1", "--dtype bfloat16"), flops_of_a_segmenter, at_once="--warmup-steps 0"),
    "detect": Row(train_detect, [*FROM, *"--img-size 16 --window 2 --width 8 --proposals 16 --regions 8 "
                                         "--picture-every 99".split()],
                  "--lr 1e-3 --drop-path 0.3 --clip-grad 1 --eval-every 8 --picture-every 16",
                  (), flops_of_a_detector, at_once="--warmup-steps 0"),
}
# Where a row has other parts in its loop than its stage's: for the tests with the mark of all ROWS.
ROWS = STAGES | {"MILAN": Row(train_pretrain, [*STAGES["pretrain"].flags, "--teacher", "TEACHER", *MILAN],
                              "--lr 1e-3 --clip-grad 0.5", ("--dtype bfloat16",), flops_of_feature_targets)}
all_rows = pytest.mark.parametrize("row", ROWS, indirect=True)
STEPS = ["--steps", "16"]                                               # 2.4 epochs


@pytest.fixture(params=STAGES)
def row(request):
    return ROWS[request.param]


HAVE_EPOCHS = [name for name in STAGES if name not in ("segment", "detect")]    # their schedules are others


@pytest.fixture(scope="session")
def flags_of(pretrained, cache, tmp_path_factory):
    """flags_of(row, folder, *flags): the command line of a small run of a stage into a folder."""
    teacher = tmp_path_factory.mktemp("teacher") / "clip.pth"
    torch.save(openai_state(random_tower()), teacher)
    paths = {"PRETRAINED": str(pretrained), "TEACHER": str(teacher)}

    def flags(row, folder, *more):
        own = [paths.get(word, word) for word in row.flags]
        return [*own, *SMALL, "--output-dir", str(folder), "--cache-dir", str(cache), *more]
    return flags


@pytest.fixture
def start(row, flags_of, tmp_path):
    """start(*flags, to="a") runs the stage in this process, into the folder `to`; returns its metrics."""
    def call(*flags, to="a"):
        return row.stage.main(parse(row.stage.Config, flags_of(row, tmp_path / to, *flags)))
    return call


@pytest.fixture(scope="session")
def whole_runs(flags_of, tmp_path_factory):
    """whole_runs(row): the folder of a busy run that nothing interrupts, in one process without workers."""
    done = {}

    def folder(row):
        name = next(name for name in ROWS if ROWS[name] is row)
        if name not in done:
            done[name] = tmp_path_factory.mktemp("whole")
            row.stage.main(parse(row.stage.Config, flags_of(row, done[name], *STEPS, *row.busy.split())))
        return done[name]
    return folder


@pytest.fixture
def whole(row, whole_runs):
    return whole_runs(row)


def training_loader(stage, monkeypatch, before):
    """Let before(i) be called as the stage asks for its i-th training micro-batch, from 0."""
    make_loader = stage.make_loader

    def watched(views, batches, *rest):
        for i, batch in enumerate(make_loader(views, batches, *rest)):
            if isinstance(batches, Stream):                             # evaluations have lists of their own
                before(i)
            yield batch
    monkeypatch.setattr(stage, "make_loader", watched)


# ---------------------------------------------------------------- interruptions


@all_rows
@pytest.mark.parametrize("workers", ["0", "2"])
def test_resume_equals_no_interruption_with_any_number_of_workers(row, start, whole, tmp_path, monkeypatch,
                                                                  workers):
    class Killed(BaseException):
        """Nothing tidies up after it."""

    def dies_at(n):
        def before(i):
            if i == n:
                raise Killed
        return before
    flags = [*STEPS, *row.busy.split(), "--workers", workers, "--resume", "auto"]
    # It dies before the first step, then inside the accumulations of later steps, in each of its epochs.
    for n in (0, 7, 7, 9):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            training_loader(row.stage, patch, dies_at(n))
            start(*flags)
    start(*flags)
    assert_same_run(whole, tmp_path / "a")


@all_rows
def test_a_signal_inside_an_accumulation_drops_the_step_and_the_run_goes_on_as_if_nothing_was(
        row, start, whole, tmp_path, monkeypatch):
    def before(i):
        if i == 8:                                                      # the first of step 5's two
            signal.raise_signal(signal.SIGTERM)
    flags = [*STEPS, *row.busy.split()]
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="signal 15 at step 4 of 16"):
        training_loader(row.stage, patch, before)
        start(*flags)
    assert state_of(tmp_path / "a")["step"] == 4
    start(*flags, "--resume", "auto")
    assert_same_run(whole, tmp_path / "a")


@all_rows
def test_a_loss_that_is_not_finite_ends_the_run_with_exit_code_3_and_is_not_saved(row, flags_of, tmp_path,
                                                                                  capsys):
    high = ["--steps", "30", *row.too_high.split(), *row.at_once.split(), "--save-every", "1"]
    with pytest.raises(SystemExit) as stop:
        run(row.stage.main, parse(row.stage.Config, flags_of(row, tmp_path / "a", *high)))
    error, = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 3 and " at step " in error
    assert error.startswith(("error: loss is ", "error: weights are not finite "))
    assert all(value.isfinite().all() for value in state_of(tmp_path / "a")["model"].values())


# ---------------------------------------------------------------- ranks


@all_rows
def test_two_ranks_equal_one_with_accumulation(row, flags_of, whole, tmp_path):
    """To the bit, but for a probe, whose ranks sum in another order: there within rounding."""
    script = Path(row.stage.__file__).name
    said = torchrun(2, script, *flags_of(row, tmp_path / "two", *STEPS, *row.busy.split()))
    assert "in 1 micro-batches" in said
    one, two = state_of(whole), state_of(tmp_path / "two")
    for state in one, two:                                              # but for what BatchNorm has seen
        state["model"] = {name: x for name, x in state["model"].items() if "running_" not in name
                          and (not row.sums or "num_batches" not in name)}
    if row.sums:
        assert all(same_bits(two[key], one[key]) for key in one.keys() & {"model", "optimizer", "average"})
    else:
        weights = [state["model"]["head.weight"] for state in (two, one)]
        torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)
        assert [state["model"]["norm.num_batches_tracked"] for state in (two, one)] == [16, 32]
    for a, b in zip(*(read_log(folder / "log.jsonl") for folder in (whole, tmp_path / "two")), strict=True):
        assert a.keys() == b.keys() and a.get("val_images") == b.get("val_images")
        assert not row.sums or a.get("acc1") == b.get("acc1")
        if "loss" in a:                                                 # one adds micro-batches in float32
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6 if row.sums else 1e-5)


# ---------------------------------------------------------------- how long it will take


def hopeless(monkeypatch):
    """Every run is worth an estimate, of a CPU that is slower than any."""
    monkeypatch.setattr(run_module, "SLOW", 0)
    monkeypatch.setattr(run_module, "product_tflops", lambda *given, **options: 1e-12)


def test_the_estimate_comes_before_the_first_step_with_a_command_to_try(row, start, flags_of, tmp_path,
                                                                        monkeypatch, capsys):
    class Begun(Exception):
        """The first micro-batch is asked for."""

    def begin(i):
        raise Begun
    hopeless(monkeypatch)
    training_loader(row.stage, monkeypatch, begin)
    monkeypatch.setattr("sys.argv", [row.stage.__file__])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    with pytest.raises(Begun):
        start(*STEPS)
    said = capsys.readouterr().out
    assert "a micro-batch takes " in said and " or more, and the run " in said
    command = shlex.split(said.splitlines()[-1].partition("; to try it first: ")[2])
    assert command[:2] == ["python", row.stage.__file__]                # as it was typed
    asked, to_try = (parse(row.stage.Config, words) for words in (flags_of(row, tmp_path / "a"), command[2:]))
    assert to_try.small and to_try.steps >= 1 and to_try.data == asked.data
    assert to_try.output_dir == f"{asked.output_dir}-small"
    assert getattr(to_try, "checkpoint", "") == getattr(asked, "checkpoint", "")


def test_the_estimate_changes_no_bit_of_a_run(row, start, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "SLOW", 0)
    before = torch.get_rng_state()
    drawn = run_module.product_tflops(torch.device("cpu"), torch.float32, side=64, seconds=0)
    assert drawn > 0 and torch.equal(torch.get_rng_state(), before)
    start(*STEPS, *row.busy.split())
    assert "GFLOP/s: a micro-batch takes" in capsys.readouterr().out
    assert_same_run(whole, tmp_path / "a")


def test_a_run_whose_first_steps_take_no_time_is_not_estimated_before_them(row, start, monkeypatch, capsys):
    monkeypatch.setattr(run_module, "product_tflops", None)
    start("--steps", "3")
    said = capsys.readouterr().out
    assert " or more" not in said and "so the run takes about" in said


# ---------------------------------------------------------------- what a step costs


@pytest.fixture
def waits(row, start, monkeypatch):
    """waits(*flags): what would wait for the GPU in each of the six steps of a run that logs the first."""
    flags = "--steps 6 --log-every 99 --save-every 99".split()
    return lambda *more: waits_in_steps(row.stage, lambda: start(*flags, *more), monkeypatch)


COUNTS = ["detect"]                                                     # how many boxes are left: it must ask


@pytest.mark.parametrize("row, flags", indirect=["row"], argvalues=[
    (name, flags) for name in ROWS if name not in COUNTS for flags in ("", *ROWS[name].paths)])
def test_steps_that_are_not_logged_never_wait_for_the_gpu(waits, flags):
    first, *others, last = waits(*flags.split())
    assert others == [[]] * 4
    assert {"item", "_local_scalar_dense"} <= set(first)                # what it would see


def test_a_wait_that_creeps_into_the_loop_is_caught(row, waits, monkeypatch):
    autocast = row.stage.autocast

    def nosy(device, dtype):
        return autocast(device, dtype) if torch.ones(1) > 0 else None
    monkeypatch.setattr(row.stage, "autocast", nosy)
    assert all(step for step in waits()[1:-1])


@all_rows
def test_mfu_is_logged_where_a_peak_is_known(row, start, flags_of, tmp_path, capsys, monkeypatch):
    start("--steps", "1", to="unknown")
    assert "MFU" not in capsys.readouterr().out
    monkeypatch.setattr(run_module, "peak_img_per_s", lambda flops, dtype, world: 0.5e12 / flops)
    start("--steps", "2", to="known")
    said = capsys.readouterr().out
    for line in read_log(tmp_path / "unknown" / "log.jsonl"):
        assert "mfu" not in line
    flops = row.flops(parse(row.stage.Config, flags_of(row, tmp_path)))
    for line in read_log(tmp_path / "known" / "log.jsonl")[:2]:
        assert line["mfu"] == pytest.approx(line["img_per_s"] * flops / 0.5e12)
        assert f"  {100 * line['mfu']:.1f} % MFU" in said


@all_rows
def test_compiled_steps_have_the_losses_of_eager_ones_and_no_size_is_symbolic(row, start, whole, tmp_path,
                                                                              symbols):
    metrics = start(*STEPS, *row.busy.split(), "--compile")
    logs = [read_log(folder / "log.jsonl") for folder in (whole, tmp_path / "a")]
    eager, compiled = ([line["loss"] for line in log if "lr" in line] for log in logs)
    assert len(eager) == 16 and compiled == pytest.approx(eager, rel=1e-5) and symbols == []
    assert metrics.get("acc1") == logs[0][-1].get("acc1")               # of batches of eight, and of five


# ---------------------------------------------------------------- bad input


BAD = [
    ("--wrokers 1", "unknown flag --wrokers; did you mean --workers?"),
    ("--batch-size many", "invalid int value: 'many'"),
    ("--batch-size 0", "--batch-size 0: expected "),
    ("--global-batch 17", "is not a multiple of --batch-size 8 times 1 processes; the nearest that is: 16"),
    ("--epochs inf", "--epochs inf: expected a finite number"),
    ("--epochs 1e-9", "is not one step of 16"),
    ("--epochs 2 --warmup-epochs 2", "--warmup-epochs 2: expected less than the run's 2 epochs"),
    (f"--seed {2 ** 80}", "expected a finite number"),
    ("--data /nowhere", "data folder /nowhere does not exist"),
    ("--data shapes:none", "expected shapes or shapes:COUNT"),
    ("--data cifar10:/nowhere", "/nowhere/data_batch_1.bin does not exist"),
    (f"--data /tmp/{'n' * 300}", "nnn cannot be read: File name too long"),
    ("--img-size 18", "img_size 18x18 is not a multiple of patch_size 4"),
    ("--mean 0.5", "--mean has 1 numbers: expected 3, one per channel"),
    ("--output-dir LICENSE/x", "--output-dir LICENSE/x cannot be written"),
    (f"--output-dir /tmp/{'n' * 300} --resume auto", "nnn cannot be read: File name too long"),
    ("--resume /nowhere.pt", "checkpoint /nowhere.pt does not exist"),
    ("--workers -1", "--workers -1: expected 0 or more"),
    ("--max-bad -1", "--max-bad -1.0: expected 0 or more"),
    ("--device cuda:99", "--device cuda:99"),
    ("--device gpu", "--device gpu: expected auto, cpu, cuda or"),
    ("--ops fast", "invalid choice: 'fast'"),
    ("--dtype float8", "invalid choice: 'float8'"),
    ("--timeout 0", "--timeout 0.0: expected more than 0"),
    ("--log-every 0", "--log-every 0: expected more than 0"),
    ("--save-every 0", "--save-every 0: expected more than 0"),
]
LACKING = dict.fromkeys(("segment", "detect"), ("--epochs", "--data cifar", "--data /"))    # theirs differ


@pytest.mark.parametrize("row, flags, message", indirect=["row"], argvalues=[
    (name, flags, message) for name in STAGES for flags, message in BAD
    if not flags.startswith(LACKING.get(name, "none"))])
def test_bad_input_gets_one_line_and_exit_code_2(row, flags_of, tmp_path, capfd, monkeypatch, flags, message):
    monkeypatch.chdir(ROOT)
    flags = flags_of(row, tmp_path / "a", "--steps", "2", *flags.split())
    with pytest.raises(SystemExit) as stop:
        run(row.stage.main, parse(row.stage.Config, flags))
    errors = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1
    assert errors[0].startswith("error: ") and message in errors[0]
    assert not (tmp_path / "a").exists()


def test_an_old_run_is_not_overwritten(start, tmp_path):
    start("--steps", "1")
    before = state_of(tmp_path / "a")
    with pytest.raises(UserError, match="already holds a run: add --resume auto"):
        start("--steps", "1")
    with pytest.raises(UserError, match=r"a run, of other settings:\n.*\n  seed     0      1\nadd --resume"):
        start("--steps", "1", "--seed", "1")
    assert same_bits(state_of(tmp_path / "a"), before)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["seed"] == 0


def test_a_run_goes_on_with_the_settings_it_began_with(start):
    start("--steps", "2")
    message = (r"began with other settings:\n  setting  saved  now\n  steps    2      3\n"
               r"  seed     0      7\ngive the same flags again, or --allow-change steps,seed$")
    with pytest.raises(UserError, match=message):
        start("--steps", "3", "--seed", "7", "--workers", "1", "--resume", "auto")
    assert start("--steps", "2", "--workers", "1", "--resume", "auto")["step"] == 2


@pytest.mark.parametrize("row", HAVE_EPOCHS, indirect=True)
def test_a_run_that_has_gone_further_is_not_called_done(start, tmp_path):
    start("--steps", "3", "--epochs", "5")
    before = state_of(tmp_path / "a"), (tmp_path / "a" / "log.jsonl").read_text()
    with pytest.raises(UserError, match="has come to step 3, and these flags end it at 2: expected"):
        start("--steps", "2", "--epochs", "5", "--resume", "auto", "--allow-change", "steps")
    assert same_bits(state_of(tmp_path / "a"), before[0])
    assert (tmp_path / "a" / "log.jsonl").read_text() == before[1]


@all_rows
def test_a_signal_in_the_last_step_ends_the_run_before_its_evaluation(row, start, whole, tmp_path,
                                                                       monkeypatch):
    def before(i):
        if i == 31:                                                     # the last micro-batch
            signal.raise_signal(signal.SIGTERM)
    flags = [*STEPS, *row.busy.split()]
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="signal 15 at step 1[56] of 16"):
        training_loader(row.stage, patch, before)
        start(*flags)
    start(*flags, "--resume", "auto")
    assert_same_run(whole, tmp_path / "a")
