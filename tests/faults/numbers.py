"""Promise 6: no loss or gradient that is not finite changes a weight or reaches a checkpoint.

A step that is neither logged nor saved is poisoned, on one rank or alone; then the weights in memory, those
on the disk, the file that names the samples and the run that goes on are those of a run without poison.
"""

import json
import re

import torch
import torch.nn.functional as F
from faults.killed import differences
from faults.ranks import ended, two_ranks
from faults.suite import STAGES, Fault, Guard, Tally, fork, share_out, stage
from run_folders import log_of, same_bits, state_of

from mff_min.mim import MaskedAutoencoder
from mff_min.probe import LinearProbe
from mff_min.stream import Stream
from mff_min.vit import VisionTransformer
from mff_run import finite, run, world
from mff_run.sharded import local

BAD, SAVED = 5, 3                                                       # steps; the next that is saved is 6
FLAGS = ("--steps", 8, "--log-every", 99, "--save-every", SAVED, "--resume", "auto")
TRAINED = {"pretrain": MaskedAutoencoder, "probe": LinearProbe, "finetune": VisionTransformer}
NAN, INF = float("nan"), float("inf")
POISONS = {"loss nan": NAN, "loss inf": INF, "loss -inf": -INF, "gradient nan": NAN, "gradient inf": INF,
           "weight inf": INF}


def poison(name, kind, steps=(BAD,)):
    """In this process the stage's loss, one of its gradients or of its weights is bad in these steps."""
    what, value, passes = kind.split()[0], POISONS[kind], [0]
    trained, cross_entropy = TRAINED[name], F.cross_entropy
    forward = trained.forward

    def worse(loss):
        return loss + value if what == "loss" and passes[0] in steps and loss.requires_grad else loss

    def forward_or_worse(model, *inputs):
        if torch.is_grad_enabled() and model.training:
            passes[0] += 1                                              # one a step: there is one micro-batch
            weight = list(model.parameters())[-1]
            if what == "weight" and passes[0] in steps:
                weight.data.view(-1)[0] = value
            if what == "gradient" and passes[0] == 1:
                weight.register_hook(lambda grad: grad + value if passes[0] in steps else grad)
        found = forward(model, *inputs)
        return worse(found) if name == "pretrain" else found
    trained.forward = forward_or_worse
    F.cross_entropy = lambda *given, **options: worse(cross_entropy(*given, **options))


def keep_weights(path, last=None):
    """In this process the weights are in a file after each step, or up to the one before `last`."""
    end_step = run.Run.end_step

    def keep_and_end(run, *given, **more):
        if last is None or run.step + 1 < last:
            groups = run.optimizer.param_groups
            torch.save([local(param.detach()).clone() for group in groups for param in group["params"]], path)
        end_step(run, *given, **more)
    run.Run.end_step = keep_and_end


def sound_run(name, folder, *more):
    """folder with a run that nothing poisoned; beside it the weights before the step that others poison."""
    work = stage(name, folder, *FLAGS, *more)
    ran = fork(lambda: keep_weights(f"{folder}.pt", BAD) or work())
    assert ran.code == 0, ran.said
    return folder


def complaint(kind, run, said, code, whole, ranks, size=1):
    """What is wrong with how a poisoned run ended, "" where nothing is."""
    lines = re.findall("^error: .*", said, re.M)
    what = "loss is" if kind.startswith(("loss", "weight")) else "the gradient's norm is"
    where = f" on rank {ranks[0]}" if size > 1 and ranks else ""
    expected = rf"error: {what} -?(nan|inf) at step {BAD}{where};"
    if code != 3 or len(lines) != 1 or not re.match(expected, lines[0]):
        return f"code {code}: {' | '.join(lines) or said[-200:]}"
    about = json.loads((run / f"nonfinite-step-{BAD}.json").read_text())
    share = 8 // size
    places = [(BAD - 1) * 8 + rank * share + i for rank in ranks or range(size) for i in range(share)]
    order = Stream(60, 8, 8, 0, 0, 1)
    named = [(sample["epoch"], sample["index"]) for sample in about["samples"]]
    if named != [order.sample(place) for place in places]:
        return "the file names other samples"
    if not all(sample["name"] for sample in about["samples"]) or about["ranks"] != ranks:
        return f"the file names ranks {about['ranks']}"
    if not kind.startswith("weight"):
        ours, theirs = (torch.load(f"{of}.pt", weights_only=True) for of in (run, whole))
        if not same_bits(ours, theirs):
            return "the weights in memory are not those before the step"
    saved = state_of(run)
    if saved["step"] != SAVED or not all(value.isfinite().all() for value in saved["model"].values()):
        return f"the newest checkpoint is of step {saved['step']}, or not finite"
    return ""


def poison_alone(folder, quick):
    """NaN, Inf and -Inf in the loss, in a gradient and in a weight of each stage."""
    tally, whole = Tally(), {name: sound_run(name, folder / name) for name in STAGES}

    def trial(name, kind, goes_on):
        run = folder / f"{name}-{kind.replace(' ', '')}"
        work = stage(name, run, *FLAGS)
        ran = fork(lambda: keep_weights(f"{run}.pt") or poison(name, kind) or work())
        problem = complaint(kind, run, ran.said, ran.code, whole[name], [] if "grad" in kind else [0])
        if not problem and goes_on:
            again = fork(stage(name, run, *FLAGS))
            problem = "; ".join(differences(name, run, whole[name])) if not again.code else again.last
        yield f"{name}, {kind}: {problem}" if problem else "", 0
    trials = [(name, kind, kind == "loss nan") for kind in POISONS for name in STAGES]
    share_out([lambda one=one: trial(*one) for one in (trials[2::5] if quick else trials)], tally)
    return tally.outcome()


def poison_one_rank(folder, quick):
    """The same on one of two ranks: both end, once, and no weight has changed on either."""
    tally = Tally()
    trials = [("pretrain", "loss inf", 1), ("finetune", "gradient nan", 1), ("probe", "loss nan", 1),
              ("pretrain", "loss nan", 0), ("pretrain", "loss inf", 1, "--fsdp"),
              ("pretrain", "gradient inf", 1, "--fsdp"), ("finetune", "loss -inf", 1)]
    whole = {}
    for name, kind, rank, *more in trials[:2] if quick else trials:
        key = name, *more
        if key not in whole:
            whole[key] = folder / "".join(key)

            def keep(mine, path=f"{whole[key]}.pt"):
                if mine == 0:
                    keep_weights(path, BAD)
            with two_ranks(name, whole[key], *FLAGS, *more, act=keep) as children:
                found, _ = ended(children)
            assert [one.code for one in found] == [0, 0], found
        run = folder / f"{''.join(key)}-{kind.replace(' ', '')}-{rank}"

        def act(mine, name=name, kind=kind, rank=rank, run=run):
            if mine == 0:
                keep_weights(f"{run}.pt")
            if mine == rank:
                poison(name, kind)
        with two_ranks(name, run, *FLAGS, *more, act=act) as children:
            found, _ = ended(children)
        codes, said = sorted(one.code for one in found), "".join(one.said for one in found)
        problem = complaint(kind, run, said, 3 if codes == [3, 3] else codes, whole[key],
                            [] if "grad" in kind else [rank], size=2)
        tally.note(f"{' '.join(key)}, {kind} on rank {rank}: {problem}" if problem else "")
    return tally.outcome()


def overflow_float16(folder, quick):
    """With float16 a gradient that overflows is skipped and counted, unless it goes on; a bad loss is not."""
    tally, half = Tally(), ("--dtype", "float16", *FLAGS, "--log-every", 4)
    for name in ("finetune",) if quick else ("finetune", "pretrain"):
        whole = sound_run(name, folder / name, *half)
        for kind, steps in {"gradient inf": (BAD,), "gradient nan": range(3, 99), "loss nan": (BAD,)}.items():
            run = folder / f"{name}-{kind.replace(' ', '')}"
            work = stage(name, run, *half)

            def skip(name=name, kind=kind, steps=steps, run=run, work=work):
                finite.MOST_SKIPS = 3                                   # in place of 50, in a row
                keep_weights(f"{run}.pt", BAD + (kind == "gradient inf"))
                poison(name, kind, steps)
                work()
            ran = fork(skip)
            if kind == "gradient inf":
                counted = [line["skipped_steps"] for line in log_of(run) if "skipped_steps" in line]
                ours, theirs = (torch.load(f"{of}.pt", weights_only=True) for of in (run, whole))
                problem = ("" if ran.code == 0 and counted[-1] == 1 and same_bits(ours, theirs) else
                           f"code {ran.code}, skipped {counted}: {ran.last}")
            else:
                words = "loss is nan" if "loss" in kind else "float16 overflowed in 3 steps in a row"
                problem = "" if ran.code == 3 and f"error: {words}" in ran.last else f"{ran.code}: {ran.last}"
            tally.note(f"{name}, {kind}: {problem}" if problem else "")
    return tally.outcome()


# ---------------------------------------------------------------- guards


def take_every_step():
    """Steps are taken whatever the numbers are, and nobody looks."""
    finite.FiniteSteps.guard = lambda *given: None
    finite.FiniteSteps.check = lambda steps: None


def keep_to_itself():
    """A rank whose loss is not finite does not tell the others."""
    world.World.min = lambda world, tensor: tensor


def take_all_for_overflows():
    """A loss that is not finite passes for an overflow of float16."""
    guard = finite.FiniteSteps.guard
    finite.FiniteSteps.guard = lambda steps, step, lr, loss, norm: guard(
        steps, step, lr, torch.zeros_like(loss) if steps.half else loss, norm)


FAULTS = [
    Fault("a loss or gradient that is not finite", 6, poison_alone),
    Fault("the same on one of two ranks", 6, poison_one_rank),
    Fault("float16 overflows", 6, overflow_float16),
]
GUARDS = [
    Guard("numbers-checked-before-a-step", "a loss or gradient that is not finite", take_every_step),
    Guard("numbers-agreed-among-ranks", "the same on one of two ranks", keep_to_itself),
    Guard("bad-losses-told-from-overflows", "float16 overflows", take_all_for_overflows),
]
