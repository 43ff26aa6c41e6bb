"""Segment images with a finished run of train_segment.py: a mask and a picture for each.

    python -m tools.segment runs/segment IMAGES --output-dir runs/masks

RUN is the folder of the run, or its segmenter.pt. IMAGES is a folder, which is searched wholly, or one image.
In the output folder, masks/ gets an 8-bit PNG of each image's size, whose values are the labels, and
overlays/ the image under the classes' colours, with a legend. classes.txt names the labels, from 0 on.

Shapes: C h w of what the model sees of an image, H W its own.
"""

import os
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from mff_data import crops
from mff_data.decode import DECODE_ERRORS, DataFlags, reading_of, reason_of, suffixes
from mff_data.outages import Patience
from mff_data.sources import ImageFiles, check_output, counted_suffixes, files_below
from mff_min.config import REQUIRED, check_ranges, knob, opt, parse
from mff_min.errors import UserError, listed, printable
from mff_run.files import make_folder, write_atomically, write_json
from mff_run.process import run
from mff_run.progress import Progress
from mff_run.world import pick_dtype, pick_ops, start_world
from mff_tasks.mask_views import whole_image
from mff_tasks.segmentation import as_rgb, overlay, predictor
from mff_tasks.segmenter import FILE, SEGMENTER, load_segmenter
from mff_weights.pretrained import white_of


@dataclass(frozen=True)
class Config(DataFlags):
    # these change the result
    run: str = opt(REQUIRED, f"the folder of a finished run of train_segment.py, or its {FILE}")
    images: str = opt(REQUIRED, "a folder of images, or one image")
    dtype: str = opt("auto", "of matrix products; auto: bfloat16 on GPUs that have it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])

    # these change only how it is reached
    output_dir: str = knob("runs/masks", "gets masks/ and overlays/: a new or empty folder")
    batch_size: int = knob(4, "windows of an image that are computed together, at most", above=0)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    ops: str = knob("auto", "implementation of the kernels", choices=["auto", "torch", "triton"])


def main(cfg):
    """Segment the images; returns {"images": how many, "unreadable": {name: reason}}."""
    check_ranges(cfg)
    paths, root, path = check(cfg.run, cfg.images, cfg.output_dir, SEGMENTER, "masks")
    with start_world(cfg.device) as world:
        if world.size > 1:
            raise UserError("tools.segment runs in one process: expected no --nproc-per-node")
        return segment(cfg, world, path, root, paths)


def check(run, images, output_dir, kind, what):
    """(paths of the images, the folder they are seen from, the file of the run). Raises UserError.

    kind is the finished.Kind of the run, and what is written for each image.
    """
    paths, root, places = list_images(Path(images), what)
    path = kind.find(run)
    if not path:
        raise UserError(f"{run} has no {kind.file}: expected a finished run of {kind.stage}, or that file")
    out = Path(output_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--output-dir {out} is there already and not an empty folder: name another")
    check_output(out, [SimpleNamespace(folders=set(map(os.fsencode, places)))])
    return paths, root, path


def list_images(path, what):
    """(paths of the images in a folder, or of one image; the folder they are seen from; those looked into).

    Raises UserError where there is none, and where two of what is written for them would have one name.
    """
    if path.is_file():
        return [path.name], path.parent, ()
    if not path.is_dir():
        raise UserError(f"{path} does not exist: expected a folder of images, or one image")
    found, places, _ = files_below(path)
    paths = sorted(name for name in found if name.lower().endswith(suffixes()))
    if not paths:
        raise UserError(f"{path} holds no images ({len(found)} other files: {counted_suffixes(found)}): "
                        f"expected files that end in {' '.join(suffixes())}")
    counts = Counter(os.path.splitext(name)[0] for name in paths)
    twice = [name for name in paths if counts[os.path.splitext(name)[0]] > 1]
    if twice:
        raise UserError(f"{path} has images that differ in their endings alone: {listed(twice)}; their "
                        f"{what} would have one name: rename them")
    return paths, path, places


def each_image(cfg, finished, root, paths, read, bad, progress):
    """(name, read(image)) of each image that can be read; bad gets {name: reason} of the others.

    Raises UserError where none can be.
    """
    source = ImageFiles(root, paths, {}, finished.classes, reading=reading_of(cfg))
    patience = Patience(source, source.open)
    for i, name in enumerate(paths):
        try:
            found = patience.read(i, lambda i=i: read(crops.to_mode(source.open(i), finished.in_chans)))
        except DECODE_ERRORS as error:
            bad[name] = reason_of(error, os.path.join(root, name))
            continue
        yield name, found
        progress.tick(i + 1)
    if len(bad) == len(paths):
        raise UserError(f"none of the {len(paths)} images in {root} can be read: the first is "
                        f"{printable(paths[0])} ({bad[paths[0]]})")
    for name, reason in sorted(bad.items())[:5]:
        progress.say(f"warning: {printable(name)} cannot be read ({reason})")


def segment(cfg, world, path, root, paths):
    ops = pick_ops(cfg.ops, world.device)
    finished = load_segmenter(path, world.device, ops)
    cfg = replace(cfg, white=cfg.white or white_of(finished.config))
    classes, out = finished.classes, Path(cfg.output_dir)
    predict = predictor(finished.model, len(classes), finished.img_size, finished.mean, finished.std,
                        cfg.batch_size, world.device, ops, pick_dtype(cfg.dtype, world.device))
    make_folder("--output-dir", out)
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    progress, bad = Progress(len(paths), 0, world), {}

    def read(image):
        size = crops.sides(image)                                       # a large JPEG is decoded smaller
        return whole_image(image, min(finished.img_size)), size         # (C, h, w), (H, W)
    for name, (pixels, size) in each_image(cfg, finished, root, paths, read, bad, progress):
        labels = predict(pixels[None], size).cpu().numpy().astype(np.uint8)         # (H, W)
        stem = os.path.splitext(name)[0]
        write_picture(out / "masks" / f"{stem}.png", Image.fromarray(labels))
        write_picture(out / "overlays" / f"{stem}.png", overlay(as_rgb(pixels), labels, classes))
    write_json(out / "metrics.json", dict(images=len(paths), unreadable=bad, config=asdict(cfg)))
    progress.say(f"{out}: masks and overlays of {len(paths) - len(bad)} of {len(paths)} images")
    return dict(images=len(paths), unreadable=bad)


def write_picture(path, picture):
    """Write a picture as a PNG, in a folder that is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: picture.save(file, "PNG"), sweep=False)


if __name__ == "__main__":
    run(main, parse(Config))
