"""Promise 8: an evaluation counts every sample exactly once, whatever divides what.

Each is compared with a plain loop that shows the model one image at a time.
"""

import contextlib
import inspect
import io
import json
import math
import os
import socket
import textwrap
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from faults.suite import TINY, Child, Fault, Guard, Tally, flags_of, prepared

import train_finetune
import train_pretrain
import train_probe
from mff_data.shapes import SHAPES
from mff_data.sources import ImageArray, Subset
from mff_data.views import Views
from mff_min import stream
from mff_min.augment import IMAGENET_MEAN, IMAGENET_STD
from mff_min.config import parse
from mff_min.kernels.ops import TORCH
from mff_min.probe import pool_tokens
from mff_min.vit import MODELS
from mff_run.log import BadSamples
from mff_run.world import World
from mff_weights.pretrained import build_encoder, build_vit, load_classifier, read_pretrained
from tools import evaluate

ALONE = World(0, 1, 0, torch.device("cpu"))
SIZE, MOST, CLASSES = (16, 16), 17, len(SHAPES)
NEIGHBOURS = 24                                                         # all: no class is without votes
STATISTICS = IMAGENET_MEAN, IMAGENET_STD


def ready():
    """prepared(), and from here on vit_test is what it is there."""
    MODELS["vit_test"] = TINY
    return prepared()


def images(count, labels=None):
    """A source of noise images, labelled in turn unless labels are given."""
    pixels = np.random.default_rng(count).integers(0, 256, (count, 20, 22, 3), dtype=np.uint8)
    labels = np.arange(count) % CLASSES if labels is None else labels
    return ImageArray(pixels, {"class": labels}, list(SHAPES), "noise")


def first(source, count):
    return Subset(source, np.arange(count))


def one_by_one(source, score):
    """score of each image alone, in the evaluation's crop, as one tensor."""
    views, mean, std = Views(source, "evaluation", SIZE, 3, 0, 0), *map(torch.tensor, STATISTICS)
    with torch.no_grad():
        return torch.cat([score(TORCH.prepare(views[0, i]["image"][None], mean, std))
                          for i in range(len(source))])


def hard(scores):
    """Labels of which some are the highest score of their image, some the third, some the lowest."""
    order = scores.argsort(dim=1, descending=True)
    return order[torch.arange(len(order)), torch.arange(len(order)) % 3 * (scores.shape[1] // 2 - 1)].numpy()


def hits(scores, labels):
    """(top-1 hits, top-5 hits) by counting, for each image, the scores above that of its label."""
    above = [int((row > row[label]).sum()) for row, label in zip(scores, labels, strict=True)]
    return sum(place < 1 for place in above), sum(place < 5 for place in above)


def compared(metrics, scores, labels):
    """Where a stage's accuracies are not the plain loop's, both as text."""
    top1, top5 = hits(scores, labels)
    want = dict(val_images=len(scores), acc1=100 * (top1 / len(scores)), acc5=100 * (top5 / len(scores)))
    found = {name: metrics[name] for name in want}
    return "" if found == want else f"{found}, not {want}"


@dataclass
class OneOf(World):
    """A rank of several that are run one after the other: what it counts is its own share."""

    def sum(self, counts):
        return counts


@contextlib.contextmanager
def quietly():
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def classifier():
    """A classifier of noise: (its settings, the model)."""
    pretrained = read_pretrained(ready() / "finetune")
    flags = flags_of("finetune", ready(), "unused")
    cfg = replace(parse(train_finetune.Config, flags), mean=STATISTICS[0], std=STATISTICS[1], img_size=SIZE)
    model = build_vit("vit_test", SIZE, 4, 3, num_classes=CLASSES, global_pool="avg")
    load_classifier(model, pretrained)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return cfg, model.eval()


# ---------------------------------------------------------------- the faults


def classifiers_accuracy(folder, quick):
    """Fine-tuning's counts, over 1 and 2 ranks that are run one after the other."""
    cfg, model = classifier()
    scores = one_by_one(images(MOST), model)
    source, tally = images(MOST, hard(scores)), Tally()
    for count in range(1, MOST + 1, 3 if quick else 1):
        want = [count, *hits(scores[:count], source.labels["class"][:count])]
        for batch_size in range(1, 5):
            for ranks in (1, 2):
                found = [0, 0, 0]
                for rank in range(ranks):
                    world = OneOf(rank, ranks, rank, torch.device("cpu"))
                    bad = BadSamples(folder, ALONE, count, 1.0)
                    own = train_finetune.count_on(first(source, count), "evaluation", model,
                                                  replace(cfg, batch_size=batch_size), world, TORCH,
                                                  torch.float32, bad)
                    found = [a + b for a, b in zip(found, own, strict=True)]
                where = f"{count} images in batches of {batch_size} on {ranks} ranks"
                tally.note("" if found == want else f"{where}: counted {found}, not {want}")
    return tally.outcome()


def held_out_loss(folder, quick):
    """Pre-training's held-out loss: the mean over images, whatever the last batch holds."""
    flags = flags_of("pretrain", ready(), folder)
    cfg = parse(train_pretrain.Config, flags)
    torch.manual_seed(0)
    model, source, tally = train_pretrain.build_model(cfg, torch.device("cpu")), images(MOST), Tally()
    mean, std = torch.tensor(cfg.mean), torch.tensor(cfg.std)

    def to_device(batch):
        return model.ops.prepare(batch["image"], mean, std), batch["noise"], batch["image"]

    losses = []
    for i in range(MOST):
        batch = train_pretrain.held_out(cfg, source, [i], model.encoder.num_patches)
        with torch.no_grad():
            losses.append(model(*to_device(batch)).item())
    for count in range(1, MOST + 1, 3 if quick else 1):
        for batch_size in range(1, 5):
            found = train_pretrain.evaluate(replace(cfg, batch_size=batch_size), model, first(source, count),
                                            to_device, torch.float32, 512)
            want = math.fsum(losses[:count]) / count
            close = abs(found["val_loss"] - want) <= 1e-6 * want and found["val_images"] == count
            tally.note("" if close else f"{count} images in batches of {batch_size}: loss "
                                        f"{found['val_loss']:.7f}, not {want:.7f}")
    return tally.outcome()


def probes_accuracy(folder, quick):
    """The probe's accuracy as a whole run has it: its protocol, --knn and --cache, of 1 to 17 images."""
    encoder = build_encoder(read_pretrained(ready() / "pretrain" / "encoder.pt"))
    tally, heads = Tally(), []

    def features(source):
        return one_by_one(source, lambda x: pool_tokens(encoder.forward_features(x), "token"))

    class Seen(train_probe.LinearProbe):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            heads.append(self)

    def run(flags, count, batch_size):
        train, val = images(24), images(MOST)
        if count is not None:
            val = first(images(MOST, labels), count)
        train_probe.open_data = lambda spec, split, *rest: train if split == "train" else val
        to = folder / "-".join(map(str, (*flags, count, batch_size)))
        flags = flags_of("probe", ready(), to, *flags, "--steps", 2, "--batch-size", batch_size,
                         "--global-batch", 12, "--lr", 30)
        heads.clear()
        with quietly():
            return train_probe.main(parse(train_probe.Config, flags))

    train_probe.LinearProbe = Seen
    train_features, features_of_all = features(images(24)), features(images(MOST))
    for name, flags in (("protocol", []), ("knn", ["--knn", NEIGHBOURS]), ("cache", ["--cache", 1])):
        for batch_size in (2, 3, 4):
            run(flags, None, batch_size)                                # for its head, on other labels
            scores = (neighbours(train_features, images(24).labels["class"], features_of_all)
                      if name == "knn" else heads[0].eval()(features_of_all).detach())
            labels = hard(scores)
            for count in range(batch_size - 1, MOST + 1, 12 if quick else 4):
                found = run(flags, count, batch_size)
                wrong = compared(found, scores[:count], labels[:count])
                tally.note(wrong and f"{name}, {count} images in batches of {batch_size}: {wrong}")
    return tally.outcome()


def neighbours(train, labels, val, temperature=0.07):
    """Votes (n, G) of the nearest, one image after the other."""
    votes = torch.zeros(len(val), CLASSES)
    for i, x in enumerate(val):
        cosine = F.cosine_similarity(x[None], train)
        for j in cosine.argsort(descending=True)[:NEIGHBOURS].tolist():
            votes[i, labels[j]] += math.exp((float(cosine[j]) - 1) / temperature)
    return votes


def on_two_ranks(work):
    """How work() ended on each of two processes that know of each other as torchrun's do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def begin(rank):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        work()
    children = [Child(lambda rank=rank: begin(rank)) for rank in range(2)]
    return [child.end() for child in children]


def two_real_ranks(folder, quick):
    """A classifier's accuracy by two processes, of fewer images than they are and of odd numbers."""
    cfg, model = classifier()
    torch.save({"model": model.state_dict(), "config": {}, "classes": list(SHAPES)}, folder / "classifier.pt")
    scores = one_by_one(images(MOST), model)
    source, tally = images(MOST, hard(scores)), Tally()
    for count, batch_size in ((1, 3), (5, 2)) if quick else ((1, 3), (2, 1), (5, 2), (17, 4)):
        to = folder / f"{count}-{batch_size}"
        flags = ["--checkpoint", folder / "classifier.pt", "--batch-size", batch_size, "--device", "cpu",
                 "--output-dir", to]

        def work(count=count, flags=flags):
            evaluate.open_data = lambda *spec: first(source, count)
            evaluate.main(parse(evaluate.Config, list(map(str, flags))))
        ends = on_two_ranks(work)
        wrong = next((end.last for end in ends if end.code), "")
        if not wrong:
            found = json.loads((to / "metrics.json").read_text())
            wrong = compared(found, scores[:count], source.labels["class"][:count])
        tally.note(wrong and f"{count} images in batches of {batch_size}: {wrong}")
    return tally.outcome()


FAULTS = [
    Fault("evaluation of 1 to 17 images, batches of 1 to 4", 8, classifiers_accuracy),
    Fault("held-out loss of 1 to 17 images", 8, held_out_loss),
    Fault("probe, neighbours and cache of 1 to 17 images", 8, probes_accuracy),
    Fault("evaluation on two real ranks", 8, two_real_ranks),
]


# ---------------------------------------------------------------- the guards


def rewrite(module, name, *changes):
    """Replace a function of a module by itself with some of its text changed: (old, new) pairs."""
    text = textwrap.dedent(inspect.getsource(getattr(module, name)))
    for old, new in changes:
        assert text.count(old) == 1, f"{name} has {old!r} {text.count(old)} times"
        text = text.replace(old, new)
    exec(compile(text, inspect.getsourcefile(module), "exec"), vars(module))


def count_padding():
    """What a sampler does that gives every rank as many samples: the last ones are there twice."""
    def padded(count, batch_size, world):
        share = [(0, i % count) for i in range(world.rank, -(-count // world.size) * world.size, world.size)]
        return [share[first:first + batch_size] for first in range(0, len(share), batch_size)]
    for module in (stream, train_finetune, train_probe):
        module.each_once = padded


def weigh_batches_alike():
    """The mean of the batches' means."""
    rewrite(train_pretrain, "evaluate", (" * len(indices)", ""),
            ("(totals / len(chosen))", "(totals / -(-len(chosen) // cfg.batch_size))"))


GUARDS = [
    Guard("each-sample-once", "evaluation of 1 to 17 images, batches of 1 to 4", count_padding),
    Guard("loss-by-images", "held-out loss of 1 to 17 images", weigh_batches_alike),
]
