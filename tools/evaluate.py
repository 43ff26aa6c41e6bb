"""Measure a classifier as it is: its accuracy on validation images, or on a robustness set of ImageNet.

    python -m tools.evaluate --checkpoint runs/finetune --data IMAGENET --img-size 384 --workers 12
    torchrun --nproc-per-node=8 -m tools.evaluate --checkpoint runs/finetune --robustness imagenet-a:DIR

The checkpoint is a run of train_finetune.py, its classifier.pt, or a file with timm's names and a head.
"""

from dataclasses import dataclass

import torch

from mff_data.decode import reading_of
from mff_data.sources import check_classes, describe_files, open_data
from mff_min.config import check_ranges, knob, opt, parse
from mff_min.errors import UserError
from mff_min.probe import accuracy, shown
from mff_run.log import BadSamples
from mff_run.process import run
from mff_run.resume import open_measuring_folder, record
from mff_run.world import pick_dtype, pick_ops, start_world
from mff_weights.pretrained import CheckpointFlags, build_like, load_classifier, open_pretrained
from tools.robustness import RobustnessSet, open_robustness, summarise, table
from train_finetune import count_on


@dataclass(frozen=True)
class Config(CheckpointFlags):
    # these change the result
    data: str = opt("shapes", "images whose val is measured, as --data of the stages")
    robustness: str = opt("", "instead: imagenet-a:DIR, or -r, -sketch, -c")
    dtype: str = opt("auto", "of matrix products; auto: bfloat16 on GPUs that have it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])

    # these change only how it is reached
    batch_size: int = knob(128, "images that one process computes together", above=0)
    output_dir: str = knob("runs/measured", "the folder for metrics.json")
    workers: int = knob(0, "loader processes for each process", least=0)
    max_bad: float = knob(0.01, "share of the images that may be unreadable before it stops", least=0)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    ops: str = knob("auto", "implementation of the kernels", choices=["auto", "torch", "triton"])
    timeout: float = knob(600.0, "seconds that it waits for another rank or a loader process", above=0)
    cache_dir: str = knob("runs/cache", "where the embedded images are kept")


def main(cfg):
    """Measure as cfg says; returns the metrics: acc1, acc5 and so on, or those of `robustness.summarise`."""
    check_ranges(cfg)
    with start_world(cfg.device, timeout=cfg.timeout) as world:
        return measure(cfg, world)


def measure(cfg, world):
    pretrained, cfg = open_pretrained(cfg, world.say)
    if "head.weight" not in pretrained.encoder:
        raise UserError(f"checkpoint {pretrained.path} holds no classifier: expected what train_finetune.py "
                        f"writes, or timm's names with head.weight among them")
    num_classes = len(pretrained.encoder["head.weight"])
    model = build_like(pretrained, cfg.img_size, num_classes=num_classes,
                       global_pool="avg" if "fc_norm.weight" in pretrained.encoder else "token")
    load_classifier(model, pretrained, world.say)
    model.to(world.device)

    source, classes, reading = None, pretrained.classes, reading_of(cfg)
    if not cfg.robustness or not classes:
        source = world.local_main_first(lambda: open_data(cfg.data, "val", cfg.cache_dir, world.say, reading))
        if not source.is_split:
            raise UserError(f"--data {cfg.data} has no val folder: expected val/<class>/*")
        check_classes(source.classes, classes or source.classes, want=f"checkpoint {pretrained.path}")
        if not classes:
            world.say(f"{pretrained.path} does not name its classes: taken for those of {cfg.data}, in order")
        classes = source.classes
    if len(classes) != num_classes:
        raise UserError(f"checkpoint {pretrained.path} has {num_classes} outputs and does not name them, and "
                        f"--data {cfg.data} has {len(classes)} classes: expected the data it was trained on")
    sets = (open_robustness(cfg.robustness, classes, reading) if cfg.robustness else
            [RobustnessSet("val", source, "evaluation", torch.arange(num_classes))])
    describe_files(world.say, *(one.source for one in sets))
    folder = open_measuring_folder(cfg, world)
    bad_samples = BadSamples(folder, world, sum(len(one.source) for one in sets), cfg.max_bad)
    dtype, ops = pick_dtype(cfg.dtype, world.device), pick_ops(cfg.ops, world.device)
    found = {}
    for one in sets:
        found[one.name] = count_on(one.source, one.crop, model, cfg, world, ops, dtype, bad_samples,
                                   one.columns)
        world.say(f"{one.name}: {shown(accuracy(*found[one.name]))}")
    if cfg.robustness:
        kind = cfg.robustness.partition(":")[0]
        metrics = summarise(kind, found)
        world.say(table(kind, metrics))
    else:
        metrics = accuracy(*found["val"])
    record(folder, cfg, world, metrics)
    return metrics


if __name__ == "__main__":
    run(main, parse(Config))
