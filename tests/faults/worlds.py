"""Promise 7: other ranks, workers and micro-batches see the same samples. 12: what to try without memory."""

import itertools
import json
import re

import numpy as np
import torch
from faults.ranks import at_micro_batch, differs, ended, two_ranks
from faults.suite import STAGES, Fault, Guard, Tally, fork, stage
from run_folders import log_of

from mff_min import rng

STEPS = 4                                                               # of 8 images
ROUNDING = 2 ** -20                                                     # of a loss, over these steps
# The micro-batch of the run that all others are compared with; (ranks, micro-batch, workers) of those; two
# with the same micro-batches, so the same bits. Fine-tuning mixes the images of a micro-batch.
WORLDS = {
    "pretrain": (8, [(2, 4, 0), (1, 4, 0), (1, 2, 0), (1, 8, 2), (2, 2, 1)], [(2, 4, 0), (1, 4, 0)]),
    "finetune": (4, [(2, 4, 0), (1, 4, 2)], [(2, 4, 0), (1, 4, 2)]),
}

# ---------------------------------------------------------------- other worlds


def note_samples(name, path):
    """In this process each batch leaves lines in a file: its images' sums and noise, to tell them."""
    call = STAGES[name].make_loader

    def make_loader(views, batches, *options):
        loader = call(views, batches, *options)
        if views.crop == "evaluation" or len(batches) == 0:
            return loader

        def noted():
            for batch in loader:
                with open(path, "a") as file:
                    for image, noise in zip(batch["image"], batch["noise"], strict=True):
                        file.write(json.dumps([int(image.sum()), noise.tolist()]) + "\n")
                yield batch
        return noted()
    STAGES[name].make_loader = make_loader


def steps_seen(paths, shares):
    """What the ranks saw in each step, in no order: a sorted list for each, from the files that they left."""
    lines = [path.read_text().splitlines() for path in paths]
    return [sorted(itertools.chain(*(seen[step * share:(step + 1) * share]
                                     for seen, share in zip(lines, shares, strict=True))))
            for step in range(STEPS)]


def run_world(name, folder, size, micro, workers):
    """(what each step saw, the problem or "") of a run of so many ranks, and images in a micro-batch."""
    paths = [folder.parent / f"{folder.name}-{rank}.jsonl" for rank in range(size)]
    flags = ["--steps", STEPS, "--batch-size", micro, "--workers", workers]
    if size == 1:
        work = stage(name, folder, *flags)
        found = [fork(lambda: note_samples(name, paths[0]) or work())]
    else:
        with two_ranks(name, folder, *flags, "--timeout", 60,
                       act=lambda rank: note_samples(name, paths[rank])) as children:
            found, _ = ended(children)
    if any(one.code for one in found):
        return [], found[0].last
    return steps_seen(paths, [8 // size] * size), ""


def change_the_world(folder, quick):
    """Ranks x micro-batch x workers: the same samples, views and noise in each step, and the same losses."""
    tally, furthest = Tally(), 0.0
    for name in ("pretrain",) if quick else WORLDS:
        usual, worlds, pair = WORLDS[name]
        want, problem = run_world(name, folder / f"{name}-whole", 1, usual, 0)
        assert not problem, problem
        losses = [line["loss"] for line in log_of(folder / f"{name}-whole")]
        for size, micro, workers in worlds[:3] if quick else worlds:
            run = folder / f"{name}-{size}-{micro}-{workers}"
            seen, problem = run_world(name, run, size, micro, workers)
            if not problem and seen != want:
                problem = "a step saw other samples, views or noise"
            if not problem:
                apart = max(abs(line["loss"] - loss) / loss
                            for line, loss in zip(log_of(run), losses, strict=True))
                furthest = max(furthest, apart)
                problem = f"a loss is {apart:.1e} away" if apart > ROUNDING else ""
            tally.note(f"{name}, {size} ranks, micro-batches of {micro}, {workers} workers: {problem}"
                       if problem else "")
        problem = differs(*(folder / f"{name}-{size}-{micro}-{workers}" for size, micro, workers in pair))
        tally.note(f"{name}, two ranks beside one: {problem}" if problem else "")
    return tally.outcome(largest_relative_difference_of_a_loss=furthest)


def draw_masks_from_the_process():
    """Masks come from a generator of the process, as torch.rand's would, and not of the sample."""
    generator = np.random.default_rng()
    rng.numbers = lambda keys, count: generator.random((len(keys), count))


# ---------------------------------------------------------------- memory of the GPU


def run_out_of_memory(folder, quick):
    """PyTorch's error, raised in a step of each stage, alone and on a rank: one line, and its advice runs."""
    tally = Tally()

    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    for name in list(STAGES)[:1] if quick else STAGES:
        run, flags = folder / name, ["--steps", 2]
        work = stage(name, run, *flags)
        ran = fork(lambda work=work: at_micro_batch(1, fail) or work())
        wanted = ["error: out of GPU memory at --batch-size 8: try --batch-size 4 with --global-batch 8 as "
                  "it is: 2 micro-batches a step instead of 1"]
        wanted += ["--grad-checkpointing"] * (name != "probe")
        wanted += ["--allow-change batch_size"] * (name != "pretrain")
        missing = [text for text in wanted if text not in ran.last]
        problem = f"code {ran.code}: {ran.last}" if ran.code != 3 or missing else ""
        if not problem:
            change = [] if name == "pretrain" else ["--allow-change", "batch_size"]
            again = fork(stage(name, run, *flags, "--batch-size", 4, "--resume", "auto", *change))
            problem = again.last if again.code else ""
        tally.note(f"{name}: {problem}" if problem else "")
    with two_ranks("pretrain", folder / "ranks",
                   act=lambda rank: at_micro_batch(1, fail) if rank == 1 else None) as children:
        found, _ = ended(children)
    lines = re.findall("^error: .*", "".join(one.said for one in found), re.M)
    codes = [one.code for one in found]
    told = len(lines) == 1 and "try --batch-size 2 " in lines[0] and codes == [3, 3]
    tally.note("" if told else f"rank 1 alone: codes {codes}: {lines}")
    return tally.outcome()


FAULTS = [
    Fault("the world changes", 7, change_the_world),
    Fault("the GPU's memory runs out", 12, run_out_of_memory),
]
GUARDS = [
    Guard("masks-are-the-samples", "the world changes", draw_masks_from_the_process),
]
