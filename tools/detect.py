"""Find the objects of images with a finished run of train_detect.py: a picture for each, and COCO's results.

    python -m tools.detect runs/detect IMAGES --output-dir runs/found

RUN is the folder of the run, or its detector.pt. IMAGES are folders, which are searched wholly, and images.
In the output folder, pictures/ gets each image with the masks, boxes, names and scores of what was found in
it. results.json has all detections in COCO's format of results; images.json lists the images and the classes
with the ids that it uses, as a COCO annotation file does.

Shapes: C h w of what the model sees of an image, H W its own.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mff_data import crops
from mff_data.decode import DataFlags, reading_of
from mff_min.augment import fill_color
from mff_min.config import REQUIRED, check_ranges, knob, opt, parse
from mff_min.errors import UserError
from mff_run.files import make_folder, write_json
from mff_run.process import run
from mff_run.progress import Progress
from mff_run.world import pick_dtype, pick_ops, start_world
from mff_tasks.box_views import fitted_image
from mff_tasks.detection import SHOWN, above, detector, entries, overlay, write_results
from mff_tasks.detector import FILE, find_detector, load_detector
from mff_tasks.mask_views import padded
from mff_tasks.segmentation import as_rgb
from mff_weights.pretrained import white_of
from tools.own_images import OwnImages, check_folder, list_images, write_picture


@dataclass(frozen=True)
class Config(DataFlags):
    # these change the result
    run: str = opt(REQUIRED, f"the folder of a finished run of train_detect.py, or its {FILE}")
    images: tuple[str, ...] = opt(REQUIRED, "folders of images, or images")
    least_score: float = opt(SHOWN, "of what pictures show; results.json has all", least=0, most=1)
    dtype: str = opt("auto", "of matrix products; auto: bfloat16 on GPUs that have it, else float32",
                     choices=["auto", "float32", "bfloat16", "float16"])

    # these change only how it is reached
    output_dir: str = knob("runs/found", "gets pictures/ and results.json: a new or empty folder")
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    ops: str = knob("auto", "implementation of the kernels", choices=["auto", "torch", "triton"])


def main(cfg):
    """Find the objects; returns how many images and detections there are, and what is unreadable and why."""
    check_ranges(cfg)
    paths, root, places = list_images(*cfg.images)
    path = find_detector(cfg.run)
    if not path:
        raise UserError(f"{cfg.run} has no {FILE}: expected a finished run of train_detect.py, or that file")
    check_folder(cfg.output_dir, places)
    with start_world(cfg.device) as world:
        if world.size > 1:
            raise UserError("tools.detect runs in one process: expected no --nproc-per-node")
        return detect(cfg, world, path, root, paths)


def detect(cfg, world, path, root, paths):
    ops = pick_ops(cfg.ops, world.device)
    finished, category_ids = load_detector(path, world.device, ops)
    cfg = replace(cfg, white=cfg.white or white_of(finished.config))
    classes, out = finished.classes, Path(cfg.output_dir)
    find = detector(finished.model, finished.mean, finished.std, world.device, ops,
                    pick_dtype(cfg.dtype, world.device))
    make_folder("--output-dir", out)
    fill = torch.tensor(fill_color(finished.mean), dtype=torch.uint8)[:, None, None]
    own, images, results = OwnImages(root, paths, reading_of(cfg), Progress(len(paths), 0, world)), [], []

    def load(image):
        image = crops.to_mode(image, finished.in_chans)
        size = crops.sides(image)                                       # a large JPEG is decoded smaller
        return fitted_image(image, finished.img_size), size             # (C, h, w), (H, W)
    for _, name, (pixels, (H, W)) in own.each(load):
        [found] = find(padded(pixels, finished.img_size, fill)[None], [pixels.shape[1:]], [(H, W)])
        images.append(dict(id=len(images) + 1, file_name=name, height=H, width=W))
        results += entries(found, len(images), category_ids)
        picture = overlay(as_rgb(pixels), (H, W), above(found, cfg.least_score), classes)
        write_picture(out / "pictures", name, picture)
    categories = [dict(id=number, name=name) for number, name in zip(category_ids, classes, strict=True)]
    write_results(out / "results.json", results)
    write_json(out / "images.json", dict(images=images, annotations=[], categories=categories))
    told = dict(images=len(paths), detections=len(results), unreadable=own.bad)
    write_json(out / "metrics.json", told | dict(config=asdict(cfg)))
    own.progress.say(f"{out}: {len(results)} detections in {len(images)} of {len(paths)} images")
    return told


if __name__ == "__main__":
    run(main, parse(Config))
