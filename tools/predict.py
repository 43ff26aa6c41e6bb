"""Predict the classes of one's own images with a fine-tuned run: the likeliest names, with probabilities.

    python -m tools.predict runs/finetune IMAGES --output-dir runs/predicted

CHECKPOINT is a run of train_finetune.py, its classifier.pt, or a file of any family with a head. IMAGES are
folders, which are searched wholly, and images; the model sees the crop that accuracies are measured on. The
output folder gets predictions.json and predictions.csv, with a row for each image and rank. Masks and boxes
are drawn by tools.segment and tools.detect.

Shapes: B images, C H W, G classes.
"""

import csv
import io
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch

from mff_data import crops
from mff_data.decode import reading_of
from mff_min.config import REQUIRED, check_ranges, knob, opt, parse
from mff_min.errors import UserError, printable
from mff_min.probe import check_measured
from mff_run.files import make_folder, write_atomically, write_json
from mff_run.process import run
from mff_run.progress import Progress
from mff_run.world import autocast, pick_dtype, pick_ops, start_world
from mff_tasks import detector, segmenter
from mff_weights.checkpoint import read_small_json
from mff_weights.pretrained import CheckpointFlags
from tools.evaluate import open_classifier
from tools.own_images import OwnImages, check_folder, list_images

OTHER_RUNS = {segmenter.FILE: ("segment", "masks"), detector.FILE: ("detect", "boxes")}
MOST_LINES = 20                                                         # of images that are printed


@dataclass(frozen=True)
class Config(CheckpointFlags):
    # these change the result
    checkpoint: str = opt(REQUIRED, "a run of train_finetune.py, or a file of any family with a head")
    images: tuple[str, ...] = opt(REQUIRED, "folders of images, or images")
    top: int = opt(5, "how many classes are named for an image", above=0)
    classes: str = opt("", "a file that names the outputs, one per line, of a checkpoint that does not")
    dtype: str = opt("float32", "of matrix products", choices=["float32", "bfloat16", "float16", "auto"])

    # these change only how it is reached
    output_dir: str = knob("runs/predicted", "gets predictions.json and .csv: a new or empty folder")
    batch_size: int = knob(32, "images that are computed together", above=0)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    ops: str = knob("auto", "implementation of the kernels", choices=["auto", "torch", "triton"])


def main(cfg):
    """Write the predictions; returns {"images": [{"name", "top": [...]}], "unreadable": {name: reason}}."""
    check_ranges(cfg)
    paths, root, places = list_images(*cfg.images, unique=False)
    path = Path(cfg.checkpoint)
    for file, (tool, what) in OTHER_RUNS.items():
        if path.name == file or (path / file).exists():
            raise UserError(f"{path} predicts {what}, not classes: expected a run of train_finetune.py; "
                            f"python -m tools.{tool} {path} IMAGES draws {what}")
    check_folder(cfg.output_dir, places)
    with start_world(cfg.device) as world:
        if world.size > 1:
            raise UserError("tools.predict runs in one process: expected no --nproc-per-node")
        return predict(cfg, world, root, paths)


def names_beside(path, count):
    """The names of so many outputs that a config.json of Transformers beside a checkpoint has, or []."""
    told = read_small_json(path.parent / "config.json").get("id2label")
    names = [told.get(str(i)) for i in range(count)] if isinstance(told, dict) else []
    known = all(isinstance(name, str) and name != f"LABEL_{i}" for i, name in enumerate(names))
    return names if known else []


def rows_of(logits, classes, top):
    """The likeliest of each image's classes, from logits (B, G): a list of dicts for each image."""
    check_measured(logits, "the logits")
    values, outputs = logits.double().softmax(dim=1).topk(min(top, logits.shape[1]))    # each (B, top)
    return [[{"class": classes[output] if classes else None, "output": output, "probability": value}
             for output, value in zip(*both, strict=True)]
            for both in zip(outputs.tolist(), values.tolist(), strict=True)]


@torch.no_grad()
def predict(cfg, world, root, paths):
    device, ops, dtype = world.device, pick_ops(cfg.ops, world.device), pick_dtype(cfg.dtype, world.device)
    model, classes, path, cfg = open_classifier(cfg, cfg.classes, world.say)
    model.requires_grad_(False).eval().to(device)
    classes = classes or names_beside(path, model.head.out_features)
    if not classes:
        world.say(f"{path} does not name its classes: outputs are numbers from 0 on; --classes FILE with the "
                  f"name of each output in a line names them")
    out = Path(cfg.output_dir)
    make_folder("--output-dir", out)
    mean, std = (torch.tensor(values, device=device) for values in (cfg.mean, cfg.std))
    images, found = OwnImages(root, paths, reading_of(cfg), Progress(len(paths), 0, world)), []

    def load(image):
        return torch.from_numpy(crops.evaluation(crops.to_mode(image, cfg.in_chans), cfg.img_size))
    loaded = images.each(load)
    while batch := list(islice(loaded, cfg.batch_size)):
        pixels = torch.stack([pixels for _, _, pixels in batch]).permute(0, 3, 1, 2)    # (B, C, H, W)
        with autocast(device, dtype):
            logits = model(ops.prepare(pixels.to(device), mean, std)).float()           # (B, G)
        for (_, name, _), top in zip(batch, rows_of(logits, classes, cfg.top), strict=True):
            found.append(dict(name=name, top=top))
            if len(found) <= MOST_LINES:
                images.progress.say(f"{printable(name)}: " + ", ".join(map(shown, top)))
    write_json(out / "predictions.json", dict(images=found, unreadable=images.bad, config=asdict(cfg)))
    write_atomically(out / "predictions.csv", lambda file: file.write(as_csv(found)))
    images.progress.say(f"{out}/predictions.json and .csv: the {len(found[0]['top'])} likeliest classes of "
                        f"{images.counted}")
    return dict(images=found, unreadable=images.bad)


def shown(row):
    """A class with its probability, as text."""
    name = f"output {row['output']}" if row["class"] is None else printable(row["class"])
    return f"{name} {100 * row['probability']:.1f} %"


def as_csv(found):
    """The bytes of a table with a line for each image and rank; names of files as the system has them."""
    file = io.StringIO(newline="")
    table = csv.writer(file)
    table.writerow(["image", "rank", "class", "output", "probability"])
    for image in found:
        for i, row in enumerate(image["top"]):
            name = "" if row["class"] is None else row["class"]
            table.writerow([image["name"], i + 1, name, row["output"], row["probability"]])
    return file.getvalue().encode(errors="surrogateescape")


if __name__ == "__main__":
    run(main, parse(Config))
