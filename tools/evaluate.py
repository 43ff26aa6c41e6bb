"""Measure a classifier as it is, on validation images or a robustness set; or a segmenter, or a detector.

    python -m tools.evaluate --checkpoint runs/finetune --data IMAGENET --img-size 384 --workers 12
    torchrun --nproc-per-node=8 -m tools.evaluate --checkpoint runs/finetune --robustness imagenet-a:DIR
    python -m tools.evaluate --checkpoint runs/segment --data ade20k:DIR --batch-size 4 --workers 12
    python -m tools.evaluate --checkpoint runs/detect --data coco:DIR --batch-size 4 --workers 12

The checkpoint is a run of train_finetune.py, its classifier.pt, or a file with timm's names and a head. For a
run of train_segment.py, or its segmenter.pt, it measures mIoU; then --batch-size counts windows of an image.
For a run of train_detect.py, or its detector.pt, it measures AP and writes results.json, COCO's format.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mff_data.decode import reading_of
from mff_data.lists import natural, read_lines
from mff_data.sources import describe_files, open_data, relabel
from mff_min.config import check_ranges, knob, opt, parse
from mff_min.errors import UserError, listed, printable
from mff_min.probe import accuracy, shown
from mff_run.log import BadSamples
from mff_run.process import run
from mff_run.resume import open_measuring_folder, record
from mff_run.world import pick_dtype, pick_ops, start_world
from mff_tasks import detection, detector, segmentation, segmenter
from mff_tasks.ade20k import open_masks
from mff_tasks.coco import open_boxes
from mff_weights.pretrained import CheckpointFlags, build_like, load_classifier, open_pretrained, white_of
from tools.robustness import RobustnessSet, open_robustness, summarise, table
from train_finetune import count_on

OF_CLASSIFIERS = "robustness", "classes", "key", "img_size", "in_chans", "patch_size", "adapt", "mean", "std"


@dataclass(frozen=True)
class Config(CheckpointFlags):
    # these change the result
    data: str = opt("shapes", "images whose val is measured, as --data of the stages")
    robustness: str = opt("", "instead: imagenet-a:DIR, or -r, -sketch, -c")
    classes: str = opt("", "a file that names the outputs, one per line, of a checkpoint that does not")
    dtype: str = opt("auto", "of matrix products; auto: bfloat16 on GPUs that have it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])

    # these change only how it is reached
    batch_size: int = knob(128, "images that one process computes together", above=0)
    output_dir: str = knob("runs/measured", "the folder for metrics.json")
    workers: int = knob(0, "loader processes for each process", least=0, most=1024)
    max_bad: float = knob(0.01, "share of the images that may be unreadable before it stops", least=0)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    ops: str = knob("auto", "implementation of the kernels", choices=["auto", "torch", "triton"])
    timeout: float = knob(600.0, "seconds that it waits for another rank or a loader process", above=0)
    cache_dir: str = knob("runs/cache", "where the embedded images are kept")


def main(cfg):
    """Measure as cfg says; returns the metrics: acc1, acc5 and so on, or those of `robustness.summarise`."""
    check_ranges(cfg)
    with start_world(cfg.device, timeout=cfg.timeout) as world:
        path = segmenter.find_segmenter(cfg.checkpoint) if cfg.checkpoint else None
        if path:
            return measure_segmenter(cfg, world, path)
        path = detector.find_detector(cfg.checkpoint) if cfg.checkpoint else None
        return measure_detector(cfg, world, path) if path else measure(cfg, world)


def as_trained(cfg, finished, kind):
    """cfg with the settings of a Finished model's run. Raises UserError where others are given."""
    given = [name for name in OF_CLASSIFIERS if getattr(cfg, name)]
    if given:
        raise UserError(f"--{given[0].replace('_', '-')}: {finished.path} is a {kind}, which has the "
                        f"settings of its run; expected no such flag")
    return replace(cfg, img_size=finished.img_size, in_chans=finished.in_chans, mean=finished.mean,
                   std=finished.std, white=cfg.white or white_of(finished.config))


def measure_segmenter(cfg, world, path):
    """The metrics of segmentation.iou of the segmenter in a file, on --data with masks."""
    ops, dtype = pick_ops(cfg.ops, world.device), pick_dtype(cfg.dtype, world.device)
    finished = segmenter.load_segmenter(path, world.device, ops)
    cfg = as_trained(cfg, finished, "segmenter")
    told, classes = finished.config, finished.classes
    labels = None, "", False
    if cfg.data.startswith("masks:"):                                   # which has no names of its own
        labels = len(classes), "", bool(told.get("reduce_zero_label"))
    source = world.local_main_first(lambda: open_masks(cfg.data, "val", cfg.cache_dir, world.say, *labels,
                                                       reading_of(cfg), cfg.max_bad))
    if not labels[0] and source.classes != classes:
        raise UserError(f"--data {cfg.data} has {len(source.classes)} classes, {listed(source.classes)}, and "
                        f"{path} has {listed(classes)}: expected the data it was trained on, or its masks as "
                        f"masks:DIR")
    source.classes = classes
    describe_files(world.say, source, output=cfg.output_dir)
    folder = open_measuring_folder(cfg, world)
    bad_samples = BadSamples(folder, world, len(source), cfg.max_bad)
    metrics = segmentation.evaluate(finished.model, source, cfg, world, ops, dtype, bad_samples)
    world.say(segmentation.shown(metrics))
    record(folder, cfg, world, metrics)
    return metrics


def measure_detector(cfg, world, path):
    """The metrics of detection.measures of the detector in a file, on --data with objects."""
    ops, dtype = pick_ops(cfg.ops, world.device), pick_dtype(cfg.dtype, world.device)
    finished, _ = detector.load_detector(path, world.device, ops)
    cfg = as_trained(cfg, finished, "detector")
    source = world.local_main_first(lambda: open_boxes(cfg.data, "val", cfg.cache_dir, world.say,
                                                       reading_of(cfg), cfg.max_bad))
    if source.classes != finished.classes:
        raise UserError(f"--data {cfg.data} has {len(source.classes)} classes, {listed(source.classes)}, and "
                        f"{path} has {listed(finished.classes)}: expected the data it was trained on")
    describe_files(world.say, source, output=cfg.output_dir)
    folder = open_measuring_folder(cfg, world)
    bad_samples = BadSamples(folder, world, len(source), cfg.max_bad)
    metrics = detection.evaluate(finished.model, source, cfg, world, ops, dtype, bad_samples,
                                 folder / "results.json")
    world.say(detection.shown(metrics))
    record(folder, cfg, world, metrics)
    return metrics


def open_classifier(cfg, names, say):
    """(the classifier in a checkpoint, the names of its outputs, the file, cfg with what the file tells).

    names is the file of --classes, or "". Without it and names in the checkpoint they are []. UserError.
    """
    pretrained, cfg = open_pretrained(cfg, say)
    if "head.weight" not in pretrained.encoder:
        raise UserError(f"checkpoint {pretrained.path} holds no classifier: expected what train_finetune.py "
                        f"writes, timm's names with head.weight among them, or a finished run of "
                        f"train_segment.py or train_detect.py, whose folder has {segmenter.FILE} or "
                        f"{detector.FILE}")
    num_classes = len(pretrained.encoder["head.weight"])
    model = build_like(pretrained, cfg.img_size, num_classes=num_classes,
                       global_pool="avg" if "fc_norm.weight" in pretrained.encoder else "token")
    load_classifier(model, pretrained, say)
    classes = pretrained.classes
    if names:
        if classes:
            raise UserError(f"checkpoint {pretrained.path} names its classes: expected no --classes")
        classes = [name for _, name in read_lines(Path(names))]
    if classes and len(classes) != num_classes:
        named = f"--classes {names}" if names else f"checkpoint {pretrained.path}"
        raise UserError(f"{named} names {len(classes)} classes, and the classifier has {num_classes} "
                        f"outputs: expected a name for each")
    return model, classes, pretrained.path, cfg


def measure(cfg, world):
    model, classes, path, cfg = open_classifier(cfg, cfg.classes, world.say)
    model.to(world.device)
    source, num_classes, reading = None, model.head.out_features, reading_of(cfg)
    if not cfg.robustness or not classes:
        source = world.local_main_first(lambda: open_data(cfg.data, "val", cfg.cache_dir, world.say, reading))
        if not source.is_split:
            raise UserError(f"--data {cfg.data} has no val folder: expected val/<class>/*, or list:DIR with "
                            f"val.txt")
        classes = classes or guess_order(source.classes, num_classes, path, cfg.data, world.say)
        source = relabel(source, classes, world.say, want=f"checkpoint {path}")
    sets = (open_robustness(cfg.robustness, classes, reading) if cfg.robustness else
            [RobustnessSet("val", source, "evaluation", torch.arange(num_classes))])
    describe_files(world.say, *(one.source for one in sets), output=cfg.output_dir)
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


def guess_order(classes, num_classes, path, data, say):
    """The data's classes in the order that a checkpoint's outputs, which it does not name, have by all odds.

    Class folders are sorted as text by torchvision, by the numbers in their names by timm: timm's order is
    taken. Raises UserError where there are more outputs or fewer.
    """
    if len(classes) != num_classes:
        raise UserError(f"checkpoint {path} has {num_classes} outputs and does not name them, and --data "
                        f"{data} has {len(classes)} classes: expected the data it was trained on, or "
                        f"--classes FILE with the name of each output in a line")
    by_number = sorted(classes, key=natural)
    if classes == by_number or classes != sorted(classes):              # CIFAR and lists have their own order
        say(f"{path} does not name its classes: taken for those of {data}, in order")
        return classes
    first = next(i for i in range(num_classes) if classes[i] != by_number[i])
    say(f"warning: {path} does not name its classes: taken for those of {data} in the order of their "
        f"numbers, as timm sorts them, so output {first} is {printable(by_number[first])}. torchvision sorts "
        f"them as text, and there it is {printable(classes[first])}. --classes FILE with the name of each "
        f"output in a line decides")
    return by_number


if __name__ == "__main__":
    run(main, parse(Config))
