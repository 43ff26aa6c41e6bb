"""Draw what an encoder attends to in one's own images, and its patch features as colours. Nothing is masked.

    python -m tools.attention runs/mff IMAGES --output-dir runs/attention
    python -m tools.attention runs/mae photo.jpg --beside runs/mff --layers 5,11 --patch 3,7

CHECKPOINT is of any family that tools.convert reads. IMAGES are folders, which are searched wholly, and
images; the model sees the middle of each, and more patches of it with a larger --img-size. The output folder
gets heads/, every head of the chosen blocks, and overview/: the mean of the heads, rollout (arXiv 2005.00928)
and the first three principal components of the patch features.

Shapes: B images, C H W, L patches, D width, T = 1 + L tokens (class token first), h heads.
"""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mff_data import crops
from mff_data.decode import reading_of
from mff_min.config import REQUIRED, check_ranges, knob, opt, parse
from mff_min.errors import UserError, printable
from mff_min.probe import check_measured
from mff_min.vit import VisionTransformer
from mff_run.files import make_folder, write_json
from mff_run.picture import grid, painted, principal_colours, to_uint8
from mff_run.process import run
from mff_run.progress import Progress
from mff_run.world import pick_ops, start_world
from mff_weights.checkpoint import IN_FOLDER, encoder_of
from mff_weights.pretrained import CheckpointFlags, open_pretrained
from tools.measures import attention_weights
from tools.own_images import OwnImages, check_folder, list_images, write_picture
from tools.probe_layers import parse_layers

# From no attention to the most, evenly spaced, over the grey image.
COLOURS = np.array([(10, 10, 60), (110, 25, 130), (215, 65, 85), (250, 160, 60), (255, 250, 190)], np.float32)
OPAQUE = 0.65                                                           # the share of a map in an overlay
ABOUT_MAPS = ("Each map is scaled to its largest value, which stands in its corner. A row of attention sums "
              "to 1; what goes to the class token is not shown.")
ABOUT_OVERVIEW = ("Rollout multiplies the mean attention of all blocks, each averaged with the identity. The "
                  "colours are the first three principal components of the last block's patch features, of "
                  "this image and this model alone: equal colours of two models mean nothing.")


@dataclass(frozen=True)
class Config(CheckpointFlags):
    # these change the result
    checkpoint: str = opt(REQUIRED, "the encoder: a checkpoint of any family, or the folder of a run")
    images: tuple[str, ...] = opt(REQUIRED, "folders of images, or images")
    beside: str = opt("", "another checkpoint, which is drawn below the first")
    layers: str = opt("last", "blocks: last, all, or a list such as 5,11")
    patch: str = opt("", "ROW,COLUMN, from 0 on, of the patch that attends; not given: the class token")
    allow_missing: bool = opt(False, "take an encoder although something in it is missing or unknown")

    # these change only how it is reached
    output_dir: str = knob("runs/attention", "gets heads/ and overview/: a new or empty folder")
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    ops: str = knob("auto", "implementation of the kernels", choices=["auto", "torch", "triton"])


@dataclass(frozen=True)
class Viewer:
    """An encoder, with what it takes to look at an image with it."""
    name: str
    encoder: VisionTransformer
    cfg: Config                                                         # with the checkpoint's settings
    layers: list
    query: int                                                          # the token that attends


def main(cfg):
    """Write the pictures; returns {"images": how many, "unreadable": {name: reason}}."""
    check_ranges(cfg)
    paths, root, places = list_images(*cfg.images)
    check_folder(cfg.output_dir, places)
    with start_world(cfg.device) as world:
        if world.size > 1:
            raise UserError("tools.attention runs in one process: expected no --nproc-per-node")
        return draw(cfg, world, root, paths)


def open_viewer(cfg, path, say):
    """The Viewer of a checkpoint. Raises UserError."""
    pretrained, cfg = open_pretrained(replace(cfg, checkpoint=path), say)
    encoder = encoder_of(pretrained.weights, cfg.img_size, allow_missing=cfg.allow_missing, say=say)
    depth, path = len(encoder.blocks), Path(path)
    layers = [depth - 1] if cfg.layers == "last" else parse_layers(cfg.layers, depth)
    name = path.parent.name if path.name in IN_FOLDER and path.parent.name else path.resolve().name
    return Viewer(printable(name)[:24], encoder.requires_grad_(False), cfg, layers,
                  token_of(cfg.patch, encoder.grid))


def token_of(patch, grid):
    """The token of the patch "ROW,COLUMN" of a (rows, columns) grid; of "" the class token, 0. UserError."""
    if not patch:
        return 0
    place = [int(number) for number in patch.split(",")] if re.fullmatch(r"\d{1,6},\d{1,6}", patch) else []
    if not place or place[0] >= grid[0] or place[1] >= grid[1]:
        raise UserError(f"--patch {printable(patch)}: expected ROW,COLUMN, from 0,0 to "
                        f"{grid[0] - 1},{grid[1] - 1}: there are {grid[0]} rows of {grid[1]} patches")
    return 1 + place[0] * grid[1] + place[1]


# ---------------------------------------------------------------- what is drawn


def look(encoder, images, layers, query):
    """What unmasked images (B, C, H, W) tell of an encoder, as three.

    {block: how much the token query attends to each token, by head, (B, h, T)}; its rollout (B, T); and the
    features of the patches (B, L, D), after the final norm where there is one for each token.
    """
    x, found = encoder.embed(images), {}                                # (B, T, D)
    rolled = torch.eye(x.shape[1], device=x.device).expand(len(x), -1, -1)      # (B, T, T)
    for i, block in enumerate(encoder.blocks):
        weights = attention_weights(block.attn, block.norm1(x))         # (B, h, T, T)
        if i in layers:
            found[i] = weights[:, :, query]                             # (B, h, T)
        rolled = roll(rolled, weights)                                  # (B, T, T)
        x = block(x)                                                    # (B, T, D)
    x = encoder.norm(x) if encoder.global_pool == "token" else x        # (B, T, D)
    return found, rolled[:, query], x[:, 1:]


def roll(rolled, weights):
    """Attention rollout (arXiv 2005.00928, sec. 3) through one more block, whose weights are (B, h, T, T).

    rolled (B, T, T) is that of the blocks before, the identity at first. Half of each block is its residual.
    """
    mean = weights.mean(dim=1)                                          # (B, T, T)
    return (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2 @ rolled


def overlay(image, weights, size):
    """An image (H, W, 3) in grey under a map (rows, columns): a tile of (height, width) with the maximum."""
    most = float(weights.max())
    shares = Image.fromarray((weights / max(most, 1e-12)).astype(np.float32)).resize(
        size[::-1], Image.Resampling.NEAREST)
    place = np.asarray(shares) * (len(COLOURS) - 1)
    low = np.minimum(place.astype(int), len(COLOURS) - 2)
    part = (place - low)[..., None]
    colours = COLOURS[low] * (1 - part) + COLOURS[low + 1] * part
    grey = np.asarray(resized(image, size).convert("L"), np.float32)[..., None]
    tile = Image.fromarray((OPAQUE * colours + (1 - OPAQUE) * grey).round().astype(np.uint8))
    font, text, draw = ImageFont.load_default(11), f"{100 * most:.2g} %", ImageDraw.Draw(tile)
    draw.rectangle([0, size[0] - 15, font.getlength(text) + 5, size[0]], (0, 0, 0))
    draw.text((3, size[0] - 14), text, (255, 255, 255), font=font)
    return np.asarray(tile)


def resized(image, size):
    """An image (H, W, 3) as Pillow's of (height, width)."""
    return Image.fromarray(np.ascontiguousarray(image)).resize(size[::-1], Image.Resampling.BICUBIC)


def marked(image, viewer, size):
    """The tile of an image, with a frame around the patch that attends."""
    tile, (rows, columns) = resized(image, size), viewer.encoder.grid
    if viewer.query:
        row, column = divmod(viewer.query - 1, columns)
        box = [column * size[1] // columns, row * size[0] // rows,
               (column + 1) * size[1] // columns - 1, (row + 1) * size[0] // rows - 1]
        draw = ImageDraw.Draw(tile)
        draw.rectangle(box, outline=(0, 0, 0), width=3)
        draw.rectangle(box, outline=(255, 255, 255), width=1)
    return np.asarray(tile)


def sheet(rows, title, note):
    """A picture of rows (caption, {caption of the column: tile}); what a row lacks is white."""
    columns = dict.fromkeys(caption for _, tiles in rows for caption in tiles)
    blank = np.full_like(next(iter(rows[0][1].values())), 255)
    return grid({caption: np.stack([tiles.get(caption, blank) for _, tiles in rows]) for caption in columns},
                title, note=note, rows=[caption for caption, _ in rows])


# ---------------------------------------------------------------- images


def sides_of_tiles(img_size, least):
    """(height, width) of tiles of an image, whose shorter side has this many pixels."""
    return tuple(round(side * least / min(img_size)) for side in img_size)


@torch.no_grad()
def draw(cfg, world, root, paths):
    device, ops = world.device, pick_ops(cfg.ops, world.device)
    viewers = [open_viewer(cfg, path, world.say) for path in (cfg.checkpoint, cfg.beside) if path]
    shapes = [viewer.cfg.img_size for viewer in viewers]
    if shapes[0][0] * shapes[-1][1] != shapes[0][1] * shapes[-1][0]:
        raise UserError(f"{cfg.checkpoint} sees {shapes[0][0]}x{shapes[0][1]} pixels and {cfg.beside} "
                        f"{shapes[-1][0]}x{shapes[-1][1]}: expected one shape; --img-size gives it to both")
    if len({viewer.name for viewer in viewers}) < len(viewers):
        viewers = [replace(viewer, name=f"{i + 1}: {viewer.name}") for i, viewer in enumerate(viewers)]
    for viewer in viewers:
        viewer.encoder.to(device)
    out, asks = Path(cfg.output_dir), f"patch {cfg.patch}" if cfg.patch else "the class token"
    make_folder("--output-dir", out)
    reading = reading_of(viewers[0].cfg)
    images = OwnImages(root, paths, reading, Progress(len(paths), 0, world))

    def load(image):
        """The crop for each of the viewers, (H, W, C)."""
        return [torch.from_numpy(crops.center(crops.to_mode(image, viewer.cfg.in_chans),
                                              viewer.cfg.img_size)) for viewer in viewers]
    for _, name, loaded in images.each(load):
        of_heads, of_all = [], []
        for viewer, pixels in zip(viewers, loaded, strict=True):
            mean, std = (torch.tensor(values, device=device) for values in (viewer.cfg.mean, viewer.cfg.std))
            batch = ops.prepare(pixels.permute(2, 0, 1)[None].to(device), mean, std)    # (1, C, H, W)
            weights, rolled, features = look(viewer.encoder, batch, viewer.layers, viewer.query)
            check_measured(torch.cat([rolled, features.flatten(1)], dim=1), "the features")
            tiles_of(viewer, to_uint8(batch, mean, std)[0], weights, rolled, features, of_heads, of_all)
        title = f"attention from {asks}"
        write_picture(out / "heads", name, sheet(of_heads, title, ABOUT_MAPS))
        write_picture(out / "overview", name, sheet(of_all, title, f"{ABOUT_MAPS} {ABOUT_OVERVIEW}"))
    found = dict(images=len(paths), unreadable=images.bad)
    write_json(out / "metrics.json", found | dict(layers=viewers[0].layers, config=asdict(viewers[0].cfg)))
    images.progress.say(f"{out}: heads/ and overview/ of {images.counted}, from {asks}")
    return found


def tiles_of(viewer, image, weights, rolled, features, of_heads, of_all):
    """Add to the rows of both pictures what look gave of one image (H, W, 3)."""
    grid_of, patch_size = viewer.encoder.grid, viewer.encoder.patch_size

    def tile(row, size):
        """The overlay of one token's attention (T,)."""
        return overlay(image, row[1:].unflatten(0, grid_of).cpu().numpy(), size)
    large, small = (sides_of_tiles(viewer.cfg.img_size, side) for side in (224, 128))
    overview = {"image": marked(image, viewer, large)}
    for layer, (heads,) in weights.items():                             # (h, T)
        overview[f"block {layer}, mean"] = tile(heads.mean(dim=0), large)
        of_heads.append((f"{viewer.name}, block {layer}", {"image": marked(image, viewer, small)} | {
            f"head {i}": tile(head, small) for i, head in enumerate(heads)}))
    overview["rollout"] = tile(rolled[0], large)
    colours = painted(principal_colours(features)[0], patch_size, grid_of[1] * patch_size)[0]
    flat = Image.fromarray(colours).resize(large[::-1], Image.Resampling.NEAREST)
    overview["patch features"] = np.asarray(flat)
    of_all.append((viewer.name, overview))


if __name__ == "__main__":
    run(main, parse(Config))
