"""--fsdp: the same training as without it, checkpoints that any number of processes goes on from, bad input.

Two processes with DDP give the bits of one that accumulates (test_run.py), so one process stands for DDP
here. How far rounding alone moves weights is measured too: between micro-batches of 8 and of 4 images.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from run_folders import log_of, state_of, torchrun
from sources import ROOT
from torch.distributed.tensor.debug import CommDebugMode

import train_pretrain
from mff_min.config import parse
from mff_min.mim import MaskedAutoencoder
from mff_min.optim import clip_grad_norm
from mff_min.targets import PixelTarget
from mff_min.vit import VisionTransformer
from mff_run.log import read_log
from mff_run.process import run
from mff_run.sharded import full_tensor, gathered, maybe_no_sync, shard, whole
from mff_run.world import World

SMALL = ("train_pretrain.py --model vit_test --img-size 16 --decoder-embed-dim 16 --decoder-depth 1 "
         "--decoder-num-heads 2 --data shapes:100 --global-batch 16 --log-every 1 --save-every 4 "
         "--picture-images 2 --picture-every 100 --device cpu --lr 1e-3 --epochs 1.28").split()
STEPS = 8                                                               # what these epochs are
EVERY_STEP = 2 ** -22                                                   # two float32 roundings, relative


@pytest.fixture(scope="module")
def command(tmp_path_factory, cache):
    """command(to, *flags): the words that pre-train into a folder `to`, and that folder."""
    parent = tmp_path_factory.mktemp("runs")

    def words(to, *flags):
        return [*SMALL, "--cache-dir", str(cache), "--output-dir", str(parent / to), *flags], parent / to
    return words


def alone(words, folder):
    """Run the stage in this process; returns the folder."""
    train_pretrain.main(parse(train_pretrain.Config, words[1:]))
    return folder


@pytest.fixture(scope="module")
def plain(command):
    """The folder of a run without --fsdp, and how far another size of the micro-batch moves its weights."""
    folder = alone(*command("plain", "--batch-size", "8", "--clip-grad", "0.5"))
    other = alone(*command("other", "--batch-size", "4", "--clip-grad", "0.5"))
    return folder, distance(folder, other)


def distance(a, b):
    """The length of the difference between the weights of two runs."""
    a, b = (state_of(folder)["model"] for folder in (a, b))
    assert list(a) == list(b)
    return sum((a[name] - b[name]).square().sum() for name in a).sqrt().item()


def assert_equal_within_rounding(folder, plain):
    """The logs and final weights of a run are those of plain, and its checkpoint has the same form."""
    for got, want in zip(log_of(folder), log_of(plain[0]), strict=True):
        assert got.keys() == want.keys()
        bound = EVERY_STEP * want["step"]
        for name in {"loss", "val_loss", "grad_norm"} & want.keys():
            assert got[name] == pytest.approx(want[name], rel=bound), (want["step"], name)
        assert got.get("fusion_weights", []) == pytest.approx(want.get("fusion_weights", []), rel=bound)
    assert 0 < distance(folder, plain[0]) < 2 * plain[1]
    got, want = (state_of(of) for of in (folder, plain[0]))
    assert got["optimizer"]["param_groups"] == want["optimizer"]["param_groups"]
    for i, moments in want["optimizer"]["state"].items():
        assert {name: (value.shape, value.dtype) for name, value in moments.items()} == {
            name: (value.shape, value.dtype) for name, value in got["optimizer"]["state"][i].items()}
    sizes = [(of / "last.pt").stat().st_size for of in (folder, plain[0])]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


@pytest.mark.slow
def test_two_sharded_processes_train_as_ddp_does_within_rounding(command, plain):
    words, folder = command("sharded", "--batch-size", "8", "--clip-grad", "0.5", "--fsdp")
    assert "in 1 micro-batches" in torchrun(2, *words)
    assert_equal_within_rounding(folder, plain)
    encoder = torch.load(folder / "encoder.pt", weights_only=True)["model"]
    for name, value in state_of(folder)["model"].items():
        if name.startswith("encoder."):
            assert torch.equal(encoder[name.removeprefix("encoder.")], value)
    with Image.open(folder / f"reconstruction-{STEPS:06d}.png") as picture:
        assert picture.size == (6 + 5 * (128 + 6), 46 + 2 * (128 + 6) + 2 * 17)
    assert (folder / "previous.pt").exists() and not list(folder.glob("*.tmp.*"))


@pytest.fixture
def slurm(tmp_path):
    """The environment of a Slurm job on this host alone; its commands are stubs that note a requeue."""
    stubs = {"srun": 'exec "$@"',
             "scontrol": f'[ "$1" = show ] && echo localhost || echo "$@" > {tmp_path}/requeued'}
    for name, line in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | dict(PATH=path, PORT=str(port), GPUS="2", OMP_NUM_THREADS="1", SLURM_NNODES="1",
                             SLURM_JOB_ID="7", SLURM_JOB_NODELIST="this", SLURM_SUBMIT_DIR=str(ROOT))


@pytest.mark.slow
def test_one_process_goes_on_from_two_sharded_ones_and_they_from_it(command, plain, slurm, tmp_path):
    """And the time limit of recipes/slurm.sh ends a run with all ranks' step saved and the job requeued."""
    flags = ["--clip-grad", "0.5", "--allow-change", "steps"]
    alone(*command("relay", *flags, "--batch-size", "8", "--steps", "3"))
    words, folder = command("relay", *flags, "--batch-size", "4", "--fsdp")
    process = subprocess.Popen(["bash", "recipes/slurm.sh", *words], cwd=ROOT, env=slurm, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while len(read_log(folder / "log.jsonl")) < 5 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    step = state_of(folder)["step"]
    assert 5 <= step < STEPS and "in 2 micro-batches" in output, output
    assert output.count(f"stopped: signal {int(signal.SIGUSR1)} at step {step} of {STEPS}") == 1, output
    assert (tmp_path / "requeued").read_text() == "requeue 7\n" and process.returncode
    alone(*command("relay", *flags, "--batch-size", "8", "--resume", "auto"))
    assert [line["step"] for line in read_log(folder / "log.jsonl")] == [*range(1, STEPS + 1), STEPS]
    assert_equal_within_rounding(folder, plain)


# ---------------------------------------------------------------- in this process


def small_model():
    torch.manual_seed(0)
    encoder = VisionTransformer(16, patch_size=4, embed_dim=8, depth=3, num_heads=2)
    return MaskedAutoencoder(encoder, (0, 2), PixelTarget(4), decoder_embed_dim=8, decoder_depth=1,
                             decoder_num_heads=2)


@pytest.fixture
def world():
    """A process group of this process alone, in which nothing is exchanged."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, 0, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["plain", "compiled", "recomputed"])
def test_autocast_compile_and_recomputation_are_those_of_the_model(world, symbols, way, dtype):
    models, losses = [small_model(), small_model()], []
    for model in models:
        model.encoder.grad_checkpointing = way == "recomputed"
    images, noise = torch.rand(2, 3, 16, 16), torch.rand(2, 16)
    for model in (models[0], shard(models[1], world, accumulates=False, compile=way == "compiled")):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses.append(model(images, noise))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=4 * torch.finfo(dtype).eps)
    norms = [clip_grad_norm(model, 0.0) for model in models]
    assert norms[0].item() == pytest.approx(norms[1].item(), rel=4 * torch.finfo(dtype).eps)
    assert symbols == []                                                # though blocks differ in tokens


def test_the_whole_model_is_a_plain_one_with_the_same_weights(world):
    model = small_model()
    assert whole(model, None, world) is model
    want = {name: value.clone() for name, value in model.state_dict().items()}
    got = whole(shard(model, world, accumulates=False, compile=False), small_model, world)
    assert type(got) is MaskedAutoencoder
    assert all(torch.equal(value, want[name]) for name, value in got.state_dict().items())
    assert gathered({"a": [full_tensor(model.mask_token), 1, (2, "b")]}, keep=False)["a"][1:] == [1, (2, "b")]
    assert set(gathered(model.state_dict(), keep=False).values()) == {None}


def test_a_step_that_accumulates_gathers_and_adds_up_once():
    """Counted with PyTorch's process group that pretends: this process is one of two."""
    fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

    def counts(micro_batches):
        dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=2)
        world, found = World(0, 2, 0, torch.device("cpu")), []
        model = shard(small_model(), world, accumulates=micro_batches > 1, compile=False)
        for micro in range(micro_batches):
            with CommDebugMode() as made, maybe_no_sync(model, micro + 1 < micro_batches):
                model(torch.rand(2, 3, 16, 16), torch.rand(2, 16)).backward()
            found.append({str(op).split(".")[-1]: n for op, n in made.get_comm_counts().items()})
        dist.destroy_process_group()
        return found
    groups = 3 + 1 + 1                                                  # blocks, decoder blocks, the others
    gather, add = "_allgather_base_", "_reduce_scatter_base_"
    assert counts(1) == [{gather: 2 * groups - 1, add: groups}]         # the others are gathered once
    assert counts(3) == [{gather: groups}, {}, {add: groups}]


def test_one_process_has_nobody_to_share_with(command, capfd):
    words, folder = command("lonely", "--batch-size", "8", "--fsdp")
    with pytest.raises(SystemExit) as stop:
        run(train_pretrain.main, parse(train_pretrain.Config, words[1:]))
    errors = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(errors) == 1 and not folder.exists()
    assert errors[0].startswith("error: --fsdp spreads") and "torchrun --nproc-per-node=N" in errors[0]


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [[], ["--compile"], ["--dtype", "float16"]])
def test_two_gpus_give_the_losses_of_the_cpu_within_rounding(command, plain, flags):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, and PyTorch finds {torch.cuda.device_count()}")
    to = "_".join(["gpu", *flags]).replace("--", "")
    flags = ["--batch-size", "8", "--clip-grad", "0.5", "--fsdp", "--device", "cuda", *flags]
    words, folder = command(to, *flags)
    torchrun(2, *words)
    got, want = (read_log(of / "log.jsonl")[-1]["loss"] for of in (folder, plain[0]))
    assert got == pytest.approx(want, rel=2 ** -6)
