"""Segment images with a finished run of train_segment.py: a mask and a picture for each.

    python -m tools.segment runs/segment IMAGES --output-dir runs/masks

RUN is the folder of the run, or its segmenter.pt. IMAGES are folders, which are searched wholly, and images.
In the output folder, masks/ gets an 8-bit PNG of each image's size, whose values are the labels, and
overlays/ the image under the classes' colours, with a legend. classes.txt names the labels, from 0 on.

Shapes: C h w of what the model sees of an image, H W its own.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from mff_data import crops
from mff_data.decode import DataFlags, reading_of
from mff_min.config import REQUIRED, check_ranges, knob, opt, parse
from mff_min.errors import UserError
from mff_run.files import make_folder, write_json
from mff_run.process import run
from mff_run.progress import Progress
from mff_run.world import pick_dtype, pick_ops, start_world
from mff_tasks.mask_views import whole_image
from mff_tasks.segmentation import as_rgb, overlay, predictor
from mff_tasks.segmenter import FILE, find_segmenter, load_segmenter
from mff_weights.pretrained import white_of
from tools.own_images import OwnImages, check_folder, list_images, write_picture


@dataclass(frozen=True)
class Config(DataFlags):
    # these change the result
    run: str = opt(REQUIRED, f"the folder of a finished run of train_segment.py, or its {FILE}")
    images: tuple[str, ...] = opt(REQUIRED, "folders of images, or images")
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
    paths, root, places = list_images(*cfg.images)
    path = find_segmenter(cfg.run)
    if not path:
        raise UserError(f"{cfg.run} has no {FILE}: expected a finished run of train_segment.py, or that file")
    check_folder(cfg.output_dir, places)
    with start_world(cfg.device) as world:
        if world.size > 1:
            raise UserError("tools.segment runs in one process: expected no --nproc-per-node")
        return segment(cfg, world, path, root, paths)


def segment(cfg, world, path, root, paths):
    ops = pick_ops(cfg.ops, world.device)
    finished = load_segmenter(path, world.device, ops)
    cfg = replace(cfg, white=cfg.white or white_of(finished.config))
    reading, classes, out = reading_of(cfg), finished.classes, Path(cfg.output_dir)
    predict = predictor(finished.model, len(classes), finished.img_size, finished.mean, finished.std,
                        cfg.batch_size, world.device, ops, pick_dtype(cfg.dtype, world.device))
    make_folder("--output-dir", out)
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in classes))
    images = OwnImages(root, paths, reading, Progress(len(paths), 0, world))

    def load(image):
        image = crops.to_mode(image, finished.in_chans)
        size = crops.sides(image)                                       # a large JPEG is decoded smaller
        return whole_image(image, min(finished.img_size)), size         # (C, h, w), (H, W)
    for _, name, (pixels, size) in images.each(load):
        labels = predict(pixels[None], size).cpu().numpy().astype(np.uint8)         # (H, W)
        write_picture(out / "masks", name, Image.fromarray(labels))
        write_picture(out / "overlays", name, overlay(as_rgb(pixels), labels, classes))
    write_json(out / "metrics.json", dict(images=len(paths), unreadable=images.bad, config=asdict(cfg)))
    images.progress.say(f"{out}: masks and overlays of {images.counted}")
    return dict(images=len(paths), unreadable=images.bad)


if __name__ == "__main__":
    run(main, parse(Config))
