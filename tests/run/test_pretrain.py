"""Pre-training as users run it: methods, losses, what ends a process, data, bad input. See also test_run."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from run_folders import assert_same_run, state_of, torchrun
from sources import ROOT

import train_pretrain
from mff_min.config import parse
from mff_min.errors import Fault, UserError
from mff_min.optim import Schedule
from mff_min.vit import MODELS, VisionTransformer
from mff_run.files import write_atomically
from mff_run.flops import step_flops
from mff_run.log import read_log
from mff_run.process import Stopped, run
from mff_run.progress import Meter
from mff_run.world import World

SMALL = ("--model vit_test --img-size 16 --decoder-embed-dim 16 --decoder-depth 1 --decoder-num-heads 2 "
         "--data shapes:100 --global-batch 16 --batch-size 8 --log-every 1 --save-every 3 --picture-images 2 "
         "--device cpu").split()


@pytest.fixture
def pretrain(tmp_path, cache):
    """pretrain(*flags, to="a") runs the stage in this process, into the folder `to`; returns its metrics."""
    def call(*flags, to="a"):
        flags = [*SMALL, "--output-dir", str(tmp_path / to), "--cache-dir", str(cache), *flags]
        return train_pretrain.main(parse(train_pretrain.Config, flags))
    return call


def shell(tmp_path, cache, *flags, to="a", launcher=(sys.executable,), **options):
    """The stage in a process of its own with one thread, as a Popen."""
    folders = ["--output-dir", str(tmp_path / to), "--cache-dir", str(cache)]
    command = [*launcher, "train_pretrain.py", *SMALL, *folders, *flags]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, **options)


# ---------------------------------------------------------------- which images


def test_test_images_are_not_trained_on_and_the_first_lines_say_what_is(pretrain, tmp_path, capsys):
    for split, count in (("training", 12), ("validation", 3), ("testing", 5)):
        (tmp_path / "data" / split / "a").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (16, 16)).save(tmp_path / "data" / split / "a" / f"{i}.png")
    metrics = pretrain("--data", str(tmp_path / "data"), "--steps", "1")
    assert metrics["val_images"] == 3 and len(state_of(tmp_path / "a")["data"]) == 12
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"train: 12 images of 1 class in {tmp_path}/data/training",
        f"val: 3 images of 1 class in {tmp_path}/data/validation"]


# ---------------------------------------------------------------- methods


METHODS = {
    "MAE": ["--out-indices", "last"],
    "PixMIM": ["--out-indices", "last", "--low-pass-radius", "40", "--crop", "simple"],
    "MFF_MAE": [],
    "MFF_PixMIM": ["--low-pass-radius", "40", "--crop", "simple"],
    "MFF_detach": ["--detach-shallow"],
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_a_run_that_explains_itself(pretrain, tmp_path, method):
    metrics = pretrain("--steps", "4", "--lr", "1e-3", *METHODS[method])
    folder = tmp_path / "a"
    log = read_log(folder / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 4] and log[-1]["done"] and metrics["step"] == 4
    assert log[3]["loss"] == metrics["loss"] < log[0]["loss"]
    for line in log[:4]:
        assert {"loss", "lr", "grad_norm", "img_per_s", "data_wait", "fusion_weights", "epoch"} < set(line)
        assert len(line["fusion_weights"]) == (1 if "last" in METHODS[method] else 6)
        assert math.isclose(sum(line["fusion_weights"]), 1, rel_tol=1e-6)
    assert json.loads((folder / "config.json").read_text())["img_size"] == [16, 16]
    assert json.loads((folder / "env.json").read_text())["torch"] == torch.__version__
    columns = 6 if "--low-pass-radius" in METHODS[method] else 5        # the sixth is the target
    for name in ("reconstruction.png", "reconstruction-000000.png", "reconstruction-000004.png"):
        with Image.open(folder / name) as picture:
            assert picture.size == (6 + columns * (128 + 6), 46 + 2 * (128 + 6) + 2 * 17)


def test_the_run_says_what_an_image_costs(pretrain, capsys):
    pretrain("--steps", "1")
    model = train_pretrain.build_model(parse(train_pretrain.Config, SMALL), torch.device("cpu"))
    assert f"{step_flops(model) / 1e9:.3g} GFLOP an image" in capsys.readouterr().out


def test_encoder_is_exported_with_timms_names(pretrain, tmp_path):
    pretrain("--steps", "2")
    state = torch.load(tmp_path / "a" / "encoder.pt", weights_only=True)["model"]
    size = dict(img_size=16, num_classes=0, **MODELS["vit_test"])
    VisionTransformer(**size).load_state_dict(state, strict=True)
    timm = pytest.importorskip("timm")
    timm.models.VisionTransformer(**size).load_state_dict(state, strict=True)


def test_mff_with_one_level_logs_the_losses_of_mae_bit_for_bit(pretrain, tmp_path):
    pretrain("--steps", "4", "--out-indices", "11", to="mff")
    pretrain("--steps", "4", "--out-indices", "last", to="mae")
    assert_same_run(tmp_path / "mff", tmp_path / "mae")


def test_dtype_compile_and_recomputation_change_the_loss_by_rounding_alone(pretrain, monkeypatch):
    flags = ["--steps", "3", "--lr", "1e-3"]
    want = pretrain(*flags, to="float32")["loss"]
    assert pretrain(*flags, "--grad-checkpointing", to="recomputed")["loss"] == want
    bf16 = pretrain(*flags, "--dtype", "bfloat16", to="bfloat16")["loss"]
    assert bf16 != want and bf16 == pytest.approx(want, rel=2 ** -8)    # half of bfloat16's last place
    half = pretrain(*flags, "--dtype", "float16", to="float16")["loss"]
    assert half != want and half == pytest.approx(want, rel=2 ** -8)


def test_clipping_bounds_the_update_and_not_the_logged_norm(pretrain, tmp_path):
    pretrain("--steps", "2", "--lr", "1e-3", to="free")
    pretrain("--steps", "2", "--lr", "1e-3", "--clip-grad", "1e-4", to="clipped")
    free, clipped = (read_log(tmp_path / to / "log.jsonl")[0] for to in ("free", "clipped"))
    assert free["grad_norm"] == clipped["grad_norm"] > 0.1
    states = [state_of(tmp_path / to)["optimizer"]["state"].values() for to in ("free", "clipped")]
    moments = [sum(state["exp_avg"].norm() ** 2 for state in of_run) ** 0.5 for of_run in states]
    assert moments[1] < 1.01e-4 * 0.2 and moments[0] > 1e-2             # two steps of 0.1 * gradient each


# ---------------------------------------------------------------- what a step costs


def test_waiting_for_data_is_said_once_with_what_would_help(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = Meter(Schedule(100, 8, images_at_once=8, stop=10, epochs=1, warmup_epochs=0, lr=1.0), 0,
                  World(0, 1, 0, torch.device("cpu")))

    def slow():
        for wait in (50.0, 0.5, 2.0, 2.0):                              # the first one starts the loader
            now[0] += wait
            yield {}
    batches, found = slow(), []
    for done in range(1, 5):
        meter.next(batches)
        now[0] += 10
        found.append(meter.read(done, 0.5, 1e-3)["data_wait"])
        said = capsys.readouterr().out
        assert ("waiting for data: more --workers would help" in said) == (done == 3), said
    assert found == pytest.approx([50 / 60, 0.5 / 10.5, 2 / 12, 2 / 12])


def test_data_that_arrives_while_the_gpu_still_computes_costs_no_time(monkeypatch):
    class Event:
        done = False

        def record(self):
            pass

        def query(self):
            return self.done
    meter = Meter(Schedule(100, 8, images_at_once=8, stop=10, epochs=1, warmup_epochs=0, lr=1.0), 0,
                  World(0, 1, 0, torch.device("cpu")))
    meter.queued = Event()
    meter.next(iter([{}]))
    assert meter.waited == 0
    meter.queued.done = True
    meter.next(iter([{}]))
    assert meter.waited > 0


# ---------------------------------------------------------------- interruptions


def test_without_the_saved_optimizer_the_resumed_run_would_differ(pretrain, tmp_path):
    """The control of the test above: it can fail."""
    flags = ["--epochs", "0.96", "--lr", "1e-3"]
    pretrain(*flags, "--steps", "6", to="whole")
    pretrain(*flags, "--steps", "3", to="parts")
    state = state_of(tmp_path / "parts")
    for moment in state["optimizer"]["state"].values():
        moment["exp_avg"].zero_()
    torch.save(state, tmp_path / "parts" / "last.pt")
    pretrain(*flags, "--steps", "6", "--resume", "auto", "--allow-change", "steps", to="parts")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_killed_process_goes_on_where_it_was(pretrain, tmp_path, cache):
    flags = ["--steps", "40", "--resume", "auto"]
    process = shell(tmp_path, cache, *flags, to="killed")
    while not (tmp_path / "killed" / "last.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output
    step = state_of(tmp_path / "killed")["step"]
    assert 0 < step < 40
    process = shell(tmp_path, cache, *flags, to="killed")
    output, _ = process.communicate()
    assert process.returncode == 0 and f"steps {step} to 40" in output, output
    process = shell(tmp_path, cache, *flags, to="whole")
    process.communicate()
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("number, workers", [(signal.SIGTERM, "0"), (signal.SIGINT, "2")])
def test_a_signal_to_the_whole_group_ends_the_run_with_a_checkpoint(tmp_path, cache, number, workers):
    process = shell(tmp_path, cache, "--epochs", "1000", "--workers", workers, start_new_session=True)
    while len(read_log(tmp_path / "a" / "log.jsonl")) < 2 and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, number)                                      # as Ctrl-C and batch systems do
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    step = state_of(tmp_path / "a")["step"]
    assert output.splitlines()[-1].startswith(f"stopped: signal {int(number)} at step {step} of ")
    assert read_log(tmp_path / "a" / "log.jsonl")[-1]["step"] == step


class FullDisk:
    """A file that takes nothing."""

    def write(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_the_run_with_the_older_checkpoint_sound(pretrain, tmp_path, monkeypatch):
    pretrain("--epochs", "0.96", "--steps", "3")
    before, save = (tmp_path / "a" / "last.pt").read_bytes(), torch.save

    def full(state, file):
        file.file = FullDisk()
        save(state, file)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device: '.*last.pt'"):
        pretrain("--epochs", "0.96", "--steps", "6", "--resume", "auto", "--allow-change", "steps")
    assert (tmp_path / "a" / "last.pt").read_bytes() == before and not list((tmp_path / "a").glob("*.tmp.*"))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(pretrain, tmp_path, capsys):
    pretrain("--steps", "6", to="whole")
    pretrain("--steps", "6", to="damaged")
    last = tmp_path / "damaged" / "last.pt"
    last.write_bytes(last.read_bytes()[:5000])
    pretrain("--steps", "6", "--resume", "auto", to="damaged")
    assert "warning: checkpoint" in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "damaged")
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "damaged" / name).write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        pretrain("--steps", "6", "--resume", "auto", to="damaged")


def test_half_a_file_never_bears_the_final_name(tmp_path):
    path = tmp_path / "x.pt"
    write_atomically(path, lambda file: file.write(b"old"))
    with pytest.raises(OSError, match="disk"):
        def fail(file):
            file.write(b"ne")
            raise OSError("disk")
        write_atomically(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- ranks


COMPILED = """
import functools, runpy, sys, torch
sys.path.insert(0, ".")
torch.compile = functools.partial(torch.compile, backend="aot_eager")
runpy.run_path("train_pretrain.py", run_name="__main__")
"""


@pytest.mark.slow
def test_two_ranks_compile(pretrain, tmp_path, cache):
    (tmp_path / "compiled.py").write_text(COMPILED)
    command = [*SMALL, "--steps", "2", "--lr", "1e-3", "--cache-dir", str(cache), "--batch-size", "4"]
    torchrun(2, str(tmp_path / "compiled.py"), *command, "--compile", "--output-dir", str(tmp_path / "two"))
    want = pretrain("--steps", "2", "--lr", "1e-3", to="one")["loss"]
    assert read_log(tmp_path / "two" / "log.jsonl")[-1]["loss"] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("after", ["fused blocks", "step 2/"])
def test_ctrl_c_under_torchrun_is_one_line_of_ours(tmp_path, cache, after):
    """Before the first step and in a later one. torchrun adds what it has to say: lines of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = ["--steps", "100000", "--batch-size", "4"]
    process = shell(tmp_path, cache, *flags, launcher=launcher, start_new_session=True)
    while after not in (line := process.stdout.readline()):
        assert line, process.wait()
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    before, _, trace = said.partition("Traceback ")                     # torchrun's own
    theirs = re.compile(r"[WEI]\d{4} .*torch/distributed/elastic/| *\d+\.\d %  step |steps 0 |a micro-batch")
    ours = [line for line in before.splitlines() if line and not theirs.match(line)]
    assert len(ours) == 1 and ours[0].startswith("stopped: ") and "Traceback" not in trace, said


# ---------------------------------------------------------------- other data


def test_a_flat_folder_of_mixed_images_pretrains(pretrain, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 40 - i, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        image.convert(["RGB", "L", "RGBA", "P"][i % 4]).save(images / f"{i}.png")
    (images / "torn.jpg").write_bytes(b"\xff\xd8\xff torn")
    metrics = pretrain("--data", str(images), "--steps", "3", "--max-bad", "0.1", to="flat")
    output = capsys.readouterr().out
    for text in ("on 21 training images", "1 of 21 images cannot be read", "torn.jpg"):
        assert text in output
    assert metrics["val_images"] == 21
    bad = read_log(tmp_path / "flat" / "bad_samples.jsonl")
    assert [line["name"] for line in bad] == [str(images / "torn.jpg")]
    with pytest.raises(Fault, match="more than --max-bad 0.01"):
        pretrain("--data", str(images), "--steps", "3", to="strict")


def test_one_channel_and_sides_that_differ_pretrain(pretrain, tmp_path):
    flags = ["--in-chans", "1", "--mean", "0.5", "--std", "0.25", "--img-size", "16x32", "--steps", "2"]
    assert math.isfinite(pretrain(*flags)["loss"])
    with Image.open(tmp_path / "a" / "reconstruction.png") as picture:
        assert picture.size == (6 + 5 * (256 + 6), 46 + 2 * (128 + 6) + 17)


def test_initial_weights_come_from_a_run_or_from_an_encoder(pretrain, tmp_path, capsys):
    pretrain("--steps", "2", to="a")
    whole = state_of(tmp_path / "a")["model"]
    encoder = torch.load(tmp_path / "a" / "encoder.pt", weights_only=True)["model"]
    torch.save(encoder, tmp_path / "bare.pt")
    for name, to in (("a/last.pt", "b"), ("a/encoder.pt", "c"), ("bare.pt", "d")):
        pretrain("--steps", "1", "--lr", "1e-30", "--weight-decay", "0", "--seed", "9",
                 "--init-from", str(tmp_path / name), to=to)
        got = state_of(tmp_path / to)["model"]
        assert torch.equal(got["encoder.blocks.3.attn.qkv.weight"], whole["encoder.blocks.3.attn.qkv.weight"])
        assert torch.equal(got["decoder_pred.weight"], whole["decoder_pred.weight"]) == (to == "b")
    assert capsys.readouterr().out.count("the decoder starts from random weights") == 2


def test_few_images_are_said_to_be_seen_more_than_once(pretrain, capsys):
    pretrain("--data", "shapes:10", "--steps", "2")
    assert "10 images are fewer than the global batch of 16: some repeat" in capsys.readouterr().out


def test_a_run_of_more_than_a_day_on_a_cpu_names_once_what_to_try(capsys):
    schedule = Schedule(10_000, 64, images_at_once=32, stop=1000, epochs=6.4, warmup_epochs=1, lr=1.0)
    meter = Meter(schedule, 0, World(0, 2, 0, torch.device("cpu")), instead=lambda each: f"{each} s each")
    meter.estimate(1.0)
    assert "to try it" not in capsys.readouterr().out
    meter.foresee(100.0, rate=0.05)
    said = capsys.readouterr().out
    assert "multiplies 50 GFLOP/s: a micro-batch takes 100.0 s or more, and the run 2 days 7:33:20 or" in said
    assert said.endswith("over a day on this CPU; to try it first: 6.25 s each\n")       # 16 of this rank
    meter.estimate(120.0)
    assert capsys.readouterr().out == "a micro-batch takes 120.00 s, so the run takes about 2 days 18:40:00\n"


@pytest.fixture
def on_gpu(tmp_path, cache):
    """on_gpu(*flags, to) runs the stage in a process of its own."""
    def call(*flags, to):
        process = shell(tmp_path, cache, "--steps", "6", "--lr", "1e-3", "--device", "cuda", *flags, to=to)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        return read_log(tmp_path / to / "log.jsonl")[-1]["loss"]
    return call


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [[], ["--compile"], ["--dtype", "float16"], ["--ops", "torch"]])
def test_a_gpu_gives_the_losses_of_the_cpu_within_rounding(pretrain, on_gpu, flags):
    want = pretrain("--steps", "6", "--lr", "1e-3", to="cpu")["loss"]
    assert on_gpu(*flags, to="gpu") == pytest.approx(want, rel=2 ** -6)


@pytest.mark.gpu
def test_two_deterministic_runs_on_a_gpu_are_the_same_to_the_bit(on_gpu, tmp_path):
    for to in ("a", "b"):
        on_gpu("--deterministic", to=to)
    assert_same_run(tmp_path / "a", tmp_path / "b")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags, message", [
    ("--mask-ration 0.5", "unknown flag --mask-ration; did you mean --mask-ratio?"),
    ("--model vit_x", "invalid choice: 'vit_x'"),
    ("--img-size 1x2x3", "expected a side in pixels, or HEIGHTxWIDTH"),
    ("--mask-ratio 1.5", "mask_ratio 1.5 is outside (0, 1)"),
    ("--mask-ratio 0", "mask_ratio 0.0 is outside (0, 1)"),
    ("--mask-ratio 0.95", "leaves 0 of 16 patches visible"),
    ("--out-indices 4,2,11", "out_indices 4,2,11 must ascend"),
    ("--out-indices 2,2,11", "out_indices 2,2,11 must ascend"),
    ("--out-indices 2,12", "must lie in 0 ... 11"),
    ("--out-indices 2,4", "end with the last block, 11"),
    ("--out-indices some", "--out-indices some: expected spread, last, all, or e.g. 0,4,11"),
    ("--std nan,1,1", "is not a list of numbers"),
    ("--in-chans 1", "--mean has 3 numbers: expected 1"),
    ("--std 1,0,1", "--std 0.0: expected more than 0"),
    ("--decoder-num-heads 3", "embed_dim 16 is not a multiple of num_heads 3"),
    ("--decoder-embed-dim 18 --decoder-num-heads 1", "embed_dim 18 is not a multiple of 4"),
    ("--init-from LICENSE", "checkpoint LICENSE is a text of"),
    (f"--init-from /tmp/{'n' * 300}", "nnn cannot be read: File name too long"),
])
def test_bad_input_gets_one_line_and_exit_code_2(tmp_path, cache, capfd, monkeypatch, flags, message):
    monkeypatch.chdir(ROOT)
    folders = ["--output-dir", str(tmp_path / "a"), "--cache-dir", str(cache)]
    flags = [*SMALL, "--steps", "2", *folders, *flags.split()]
    with pytest.raises(SystemExit) as stop:
        run(train_pretrain.main, parse(train_pretrain.Config, flags))
    errors = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1
    assert errors[0].startswith("error: ") and message in errors[0]
    assert not (tmp_path / "a").exists()


def test_a_checkpoint_of_another_model_is_named_with_the_keys_that_differ(pretrain, tmp_path):
    pretrain("--steps", "2")
    with pytest.raises(UserError, match=r"model: proj_weights has shape \(6, 1, 1, 1\), here \(1, 1, 1, 1\)"):
        pretrain("--steps", "2", "--out-indices", "last", "--resume", "auto", "--allow-change", "out_indices")
    with pytest.raises(UserError, match="another model: encoder.cls_token has shape .* and [0-9]+ more"):
        pretrain("--steps", "2", "--model", "vit_t", "--patch-size", "4",
                 *f"--init-from {tmp_path}/a/last.pt".split(), to="b")
    with pytest.raises(UserError, match="encoder.pt has no optimizer, step, loss: it is not"):
        pretrain("--steps", "2", "--resume", str(tmp_path / "a" / "encoder.pt"))


def test_settings_that_may_change_do(pretrain, tmp_path):
    flags = ["--epochs", "0.96", "--lr", "1e-3"]
    pretrain(*flags, "--steps", "3")
    with pytest.raises(UserError, match="--allow-change weight: expected names of settings"):
        pretrain(*flags, "--steps", "6", "--resume", "auto", "--allow-change", "weight")
    pretrain(*flags, "--steps", "6", "--weight-decay", "0.3", "--resume", "auto", "--allow-change",
             "weight-decay,steps")
    groups = state_of(tmp_path / "a")["optimizer"]["param_groups"]
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.3]
    flags += ["--steps", "6", "--weight-decay", "0.3"]
    assert pretrain(*flags, "--batch-size", "4", "--resume", "auto")["step"] == 6


def test_a_checkpoint_is_not_resumed_over_another_run(pretrain, tmp_path):
    for to in ("a", "b"):
        pretrain("--steps", "2", to=to)
    with pytest.raises(UserError, match="holds another run than --resume"):
        pretrain("--steps", "2", "--resume", str(tmp_path / "a" / "last.pt"), to="b")


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(pretrain, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)
    torch.save({"model": Malicious()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="evil.pt is refused: it asks for posix.system"):
        pretrain("--steps", "2", "--init-from", str(tmp_path / "evil.pt"))
    assert not (tmp_path / "ran").exists()


def test_faults_and_signals_have_their_own_exit_codes(capsys):
    def end(error):
        def main(cfg):
            raise error
        with pytest.raises(SystemExit) as stop:
            run(main, None)
        return stop.value.code, capsys.readouterr().err
    assert end(Fault("disk on fire")) == (3, "error: disk on fire\n")
    assert end(Stopped(15, 3, 9, "runs/a")) == (143, f"stopped: {Stopped(15, 3, 9, 'runs/a')}\n")
    assert end(UserError("Caught UserError in worker\nmff_min.config.UserError: bad")) == (2, "error: bad\n")
