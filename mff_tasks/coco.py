"""Images with objects: COCO's annotation files, one's own of the same form, and the embedded scenes.

A source is one of mff_data's that also has objects(i), the Objects of image i, and size(i), its (H, W) by the
annotations. `classes` names the labels, in the order of `category_ids`, by which a file calls them;
`image_ids` are the file's. What bad input gets: docs/detect.md, "Data".

Shapes: n images, N objects of an image, m corners of a polygon, H W.
"""

import hashlib
import itertools
import os
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mff_data import crops
from mff_data.decode import AS_THEY_ARE, DECODE_ERRORS, reason_of
from mff_data.scenes import load_scenes, polygon_of
from mff_data.shapes import SHAPES
from mff_data.sources import ImageArray, ImageFiles, files_below, open_embedded, spread
from mff_data.unchanged import Rows
from mff_min.errors import UserError, listed, printable
from mff_run.jsonfile import is_number, is_path, misfit, opened, parse_json
from mff_tasks.ade20k import LOOKED_AT, is_name
from mff_tasks.masks import counts_of, decode, rasterise

LAYOUT = "annotations/instances_{train,val}*.json, {train,val}*/*"
MOST_BYTES = 2 ** 31                                                    # of a file; COCO's has 450 MB
MOST_CORNERS = 1000                                                     # of a polygon that is looked at
FARTHEST = 1e6                                                          # pixels, of a corner or a side
MOST_AREA = 1e10                                                        # pycocotools ignores larger objects


@dataclass(frozen=True)
class Objects:
    """The objects of an image of this size (H, W), as arrays; all are empty where it has none.

    Of each object, segments has a list of polygons (m, 2) or an RLE. A crowd is any number of objects.
    """
    size: tuple[int, int]
    labels: np.ndarray                                                  # (N,) int64
    bbox: np.ndarray                                                    # (N, 4) float64: x, y, width, height
    crowd: np.ndarray                                                   # (N,) bool
    area: np.ndarray                                                    # (N,) float64: pixels, of the mask
    segments: list

    @property
    def boxes(self):
        """(N, 4): x0, y0, x1, y1, half-open."""
        return corners_of(self.bbox)

    def masks(self):
        """(N, H, W) bool, at the image's own size."""
        found = [mask_of(segment, self.size) for segment in self.segments]
        return np.stack(found) if found else np.zeros((0, *self.size), bool)


def corners_of(bbox):
    """Boxes (N, 4) of x, y, width, height as x0, y0, x1, y1."""
    return np.concatenate([bbox[:, :2], bbox[:, :2] + bbox[:, 2:]], axis=1)     # (N, 4)


def mask_of(segment, size):
    """The mask (H, W) of one of Objects' segments in an image of this size."""
    return decode(segment) if isinstance(segment, dict) else rasterise(segment, *size)


# ---------------------------------------------------------------- the annotation file


def is_side(value):
    """a whole number of pixels, 1 or more"""
    return type(value) is int and 0 < value < FARTHEST


def is_flag(value):
    """0 or 1"""
    return value in (0, 1)


def is_box(value):
    """four numbers, x, y, width and height"""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def is_class(value):
    """a name of at most 200 letters, without control characters"""
    return isinstance(value, str) and is_name(value)


TAKEN = {}                                                              # is put in an annotation's place


def is_annotation(value):
    """an object with image_id"""
    return value is TAKEN


IMAGE = {"id": int, "file_name": is_path, "height": is_side, "width": is_side}
CATEGORY = {"id": int, "name": is_class}
FILE = {"images": [IMAGE], "annotations": [is_annotation], "categories": [CATEGORY]}
ANNOTATION = {"id": int, "image_id": int, "category_id": int, "iscrowd?": is_flag, "bbox": is_box,
              "area": float, "segmentation": (dict, [[float]])}
FEW_CORNERS = "a polygon of fewer than three points, or of an odd number of values"


class Columns:
    """The annotations of a file, taken while it is parsed: as dicts they would need gigabytes.

    parts counts an object's polygons. Their numbers stand one behind the other, and lengths counts those of
    each. An RLE has one part, its run lengths, and `of` is its (H, W).
    """

    def __init__(self, path):
        self.path = path
        self.id, self.image, self.category, self.parts, self.lengths = (array("q") for _ in range(5))
        self.box, self.area, self.numbers, self.of = (array("d") for _ in range(4))
        self.crowd, self.is_rle = array("b"), array("b")
        self.taken, self.broken = 0, {}                                 # {place: why it is of no use}

    def take(self, entry):
        """Note an annotation and return TAKEN; any other object is returned as it is. Raises UserError."""
        if "image_id" not in entry:
            return entry
        try:
            segment, crowd, count = entry["segmentation"], entry.get("iscrowd", 0), len(entry["bbox"])
            if not isinstance(segment, dict | list) or not is_flag(crowd) or count != 4:
                raise TypeError
            self.take_segment(segment, isinstance(segment, dict))
            self.crowd.append(int(crowd))
            self.id.append(entry["id"])
            self.image.append(entry["image_id"])
            self.category.append(entry["category_id"])
            self.area.append(entry["area"])
            self.box.extend(entry["bbox"])
        except (KeyError, TypeError, OverflowError):                    # only now: misfit takes a while
            problem = misfit(entry, ANNOTATION, f"annotations[{self.taken}]")
            raise UserError(f"{self.path} holds {problem}; correct the file") from None
        self.taken += 1
        return TAKEN

    def take_segment(self, segment, is_rle):
        """Note polygons or an RLE. Raises TypeError where a polygon is no list of numbers."""
        size, parts = (0, 0), []
        if is_rle:
            try:
                counts, size = counts_of(segment).tolist(), segment["size"]
                parts = [counts + [0] * (len(counts) % 2)]              # all are pairs
            except ValueError as error:
                self.broken[self.taken] = str(error)
        else:
            parts = [array("d", part) for part in segment]
            if not parts:
                self.broken[self.taken] = "no polygon"
            elif any(len(part) < 6 or len(part) % 2 for part in parts):
                self.broken[self.taken], parts = FEW_CORNERS, []
        for part in parts:
            self.numbers.extend(part)
            self.lengths.append(len(part))
        self.parts.append(len(parts))
        self.is_rle.append(is_rle)
        self.of.extend(size)


class Annotations:
    """The content of an annotation file, checked: objects by image, in arrays that loader processes share.

    left_out is why objects are of no use, by annotation id. Raises UserError where the file is none of
    COCO's, and where it is not clear what belongs together.
    """

    def __init__(self, path):
        columns = Columns(path)
        with opened(path, MOST_BYTES) as file:
            content = file.read()                                       # as large as opened allows
        self.path, self.digest = path, hashlib.sha256(content).digest()
        try:
            found = parse_json(content, columns.take)
        except ValueError as error:
            raise UserError(f"{path} cannot be read: {error}; expected COCO's annotations as JSON") from None
        del content
        problem = misfit(found, FILE)
        if not problem and len(found["annotations"]) != columns.taken:
            problem = "objects with image_id outside annotations: expected none"
        problem = problem or not found["categories"] and "no categories: expected one or more"
        if problem:
            raise UserError(f"{path} holds {problem}; --data coco:DIR needs instances as COCO has them")
        self.take_lists(found["images"], found["categories"])
        self.take_columns(columns)

    def take_lists(self, images, categories):
        """Note images, and categories by the order of their ids."""
        categories = sorted(categories, key=lambda one: one["id"])
        self.files, self.image_ids = [one["file_name"] for one in images], ids_of(images)      # (n,)
        self.sizes = np.array([(one["height"], one["width"]) for one in images], int).reshape(-1, 2)
        self.category_ids, self.classes = ids_of(categories), [one["name"] for one in categories]
        places = [os.path.normpath(name) for name in self.files]
        for what, names in (("an image id", self.image_ids.tolist()), ("a file_name of an image", places),
                            ("a category id", self.category_ids.tolist()),
                            ("the name of a category", self.classes)):
            self.refuse(f"uses {what} more than once", repeated(names), "each once")
        outside = [name for name in places if os.path.isabs(name) or name.split(os.sep)[0] in ("..", ".")]
        self.refuse("has a file_name that leaves the folder of the images", outside, "paths below it")

    def take_columns(self, columns):
        """Note annotations; those of no use are left out. Raises UserError for ids that are unclear."""
        ids, image, category = (np.array(values) for values in (columns.id, columns.image, columns.category))
        self.refuse("uses an annotation id more than once", repeated(ids.tolist()), "each once")
        self.refuse("has annotation ids below 1", ids[ids < 1], "numbers from 1 on, since pycocotools never "
                    "finds an object of id 0: docs/detect.md, Data, numbers them anew")
        order = np.argsort(self.image_ids)
        image_at = place_of(image, self.image_ids[order])
        label = place_of(category, self.category_ids)
        for what, at in (("images", image_at), ("categories", label)):
            self.refuse(f"has annotations of {what} that it does not list", ids[at < 0],
                        f"the {what} of all; these are the annotations' ids")
        image_at = order[image_at] if len(order) else image_at
        parts, lengths = np.array(columns.parts), np.array(columns.lengths)
        self.ids = ids
        self.numbers = np.frombuffer(columns.numbers) if columns.numbers else np.zeros(0)
        self.part_of = np.cumsum(parts) - parts                         # the first part of each
        self.start_of = np.append(0, np.cumsum(lengths))                # of each part, in numbers
        self.parts, self.label, self.is_rle = parts, label, np.array(columns.is_rle, bool)
        self.crowd, self.area = np.array(columns.crowd, bool), np.array(columns.area)
        self.bbox = np.array(columns.box).reshape(-1, 4)
        self.image_at = image_at
        self.left_out = self.find_faults(ids, image_at, columns)
        self.keep(~np.isin(ids, list(self.left_out)))
        fixed = np.rint(100 * self.numbers)                             # COCO has two digits: half the memory
        self.scale = 1
        if (fixed / 100 == self.numbers).all() and (np.abs(fixed) < 2 ** 31).all():
            self.numbers, self.scale = fixed.astype(np.int32), 100

    def keep(self, chosen):
        """Let images have only the objects that are chosen, (N,) bool."""
        rows = np.flatnonzero(chosen)
        self.rows = rows[np.argsort(self.image_at[rows], kind="stable")]
        self.first = np.searchsorted(self.image_at[self.rows], np.arange(len(self.files) + 1))

    def find_faults(self, ids, image_at, columns):
        """{annotation id: why the object is of no use}. Raises UserError for numbers that are none."""
        huge = ~((np.abs(self.bbox) < FARTHEST).all(axis=1) & (self.area <= MOST_AREA))
        self.refuse("has a bbox or an area that is not finite, or huge", ids[huge], "pixels; these are the "
                    "annotations' ids")
        why = {int(ids[place]): reason for place, reason in columns.broken.items()}
        self.apart = []                                                 # ids where box and polygons differ
        H, W = self.sizes[image_at].T if len(ids) else np.zeros((2, 0))

        def note(bad, reason):
            why.update({int(one): reason for one in ids[bad] if int(one) not in why})
        x0, y0, x1, y1 = corners_of(self.bbox).T                        # each (N,)
        note(self.area < 0, "an area below 0")                          # in no range of AP's sizes
        note((x1 <= x0) | (y1 <= y0), "a box of no area")
        note(is_outside(x0, y0, x1, y1, H, W), "a box outside the image")
        whole = np.flatnonzero(self.parts)
        if len(whole):
            at = self.start_of[self.part_of[whole]] // 2
            (x0, x1), (y0, y1) = [[np.minimum.reduceat(values, at), np.maximum.reduceat(values, at)]
                                  for values in (self.numbers[::2], self.numbers[1::2])]
            drawn, rle = ~self.is_rle[whole], whole[self.is_rle[whole]]
            huge = drawn & ~np.all([np.abs(value) < FARTHEST for value in (x0, x1, y0, y1)], axis=0)
            self.refuse("has a segmentation with numbers that are not finite, or huge", ids[whole[huge]],
                        "pixels; these are the annotations' ids")
            note(whole[drawn & ((x1 <= x0) | (y1 <= y0))], "a polygon of no area")
            beside = is_outside(x0, y0, x1, y1, H[whole], W[whole])
            note(whole[drawn & beside], "a polygon outside the image")
            left, top, right, bottom = corners_of(self.bbox[whole]).T
            both = ((np.minimum(x1, right) - np.maximum(x0, left)).clip(0)
                    * (np.minimum(y1, bottom) - np.maximum(y0, top)).clip(0))
            union = (x1 - x0) * (y1 - y0) + (right - left) * (bottom - top) - both
            self.apart = [int(one) for one in ids[whole[drawn & (2 * both < union)]] if int(one) not in why]
            size = np.array(columns.of).reshape(-1, 2)[rle]
            wrong = (size[:, 0] != H[rle]) | (size[:, 1] != W[rle])
            note(rle[wrong], "an RLE of another size than its image")
            empty = np.add.reduceat(self.numbers[1::2], at)[self.is_rle[whole]] == 0
            note(rle[empty], "an RLE without a pixel")
        return why

    def refuse(self, what, names, expected):
        """Raise UserError where there are any of these names."""
        if len(names):
            raise UserError(f"{self.path} {what}: {listed(map(str, names))}; expected {expected}")

    def parts_of(self, row):
        """The polygons (m, 2) of an object; of an RLE its run lengths, in pairs."""
        bounds = self.start_of[self.part_of[row]:self.part_of[row] + self.parts[row] + 1]
        found = [self.numbers[start:end].reshape(-1, 2) for start, end in itertools.pairwise(bounds)]
        return [numbers / self.scale for numbers in found] if self.scale > 1 else found

    def objects(self, image):
        """The Objects of the image at this place of the file's list."""
        rows, size = self.rows[self.first[image]:self.first[image + 1]], tuple(self.sizes[image].tolist())
        segments = [self.parts_of(row) for row in rows]
        for i in np.flatnonzero(self.is_rle[rows]):
            segments[i] = dict(size=list(size), counts=segments[i][0].ravel().astype(int).tolist())
        return Objects(size, self.label[rows], self.bbox[rows], self.crowd[rows], self.area[rows], segments)


def ids_of(entries):
    return np.array([one["id"] for one in entries], np.int64)


def repeated(names):
    """Those of some names that occur more than once."""
    counts = Counter(names)
    return [name for name, count in counts.items() if count > 1] if len(counts) < len(names) else []


def place_of(values, ordered):
    """Where each value stands in an ordered array, or -1."""
    if not len(ordered):
        return np.full(len(values), -1)
    at = np.searchsorted(ordered, values).clip(max=len(ordered) - 1)
    return np.where(ordered[at] == values, at, -1)


def is_outside(x0, y0, x1, y1, H, W):
    """Whether no pixel of an image (H, W) lies in a box."""
    return (x1 <= 0) | (y1 <= 0) | (x0 >= W) | (y0 >= H)


# ---------------------------------------------------------------- sources


class WrongSize(ValueError):
    """An image of another size than its annotations say."""


class BoxFiles(ImageFiles):
    """Image files with objects: those of an annotation file at the places `chosen` of its list."""

    def __init__(self, root, annotations, chosen, reading):
        files = [annotations.files[i] for i in chosen]
        super().__init__(root, files, np.zeros(len(files), int), annotations.classes, reading=reading)
        self.annotations, self.chosen, self.content = annotations, chosen, annotations.digest
        self.category_ids, self.image_ids = annotations.category_ids.tolist(), annotations.image_ids[chosen]
        self.num_objects = len(annotations.rows)

    def objects(self, i):
        return self.annotations.objects(self.chosen[i])

    def size(self, i):
        return tuple(self.annotations.sizes[self.chosen[i]].tolist())


class BoxArray(ImageArray):
    """The embedded scenes with their shapes' polygons."""

    def __init__(self, arrays, kind, origin):
        nothing = np.zeros(len(arrays["images"]), int)
        super().__init__(Rows(arrays["images"]), {"class": nothing}, list(SHAPES), kind, origin)
        self.scenes = np.array(arrays["objects"])                       # (n, 4, 5)
        self.category_ids, self.image_ids = [*range(1, len(SHAPES) + 1)], np.arange(1, len(self) + 1)
        self.num_objects = int((self.scenes[..., 0] >= 0).sum())

    def size(self, i):
        return self.images.shape[1:3]

    def objects(self, i):
        found = self.scenes[i][self.scenes[i, :, 0] >= 0]               # (N, 5)
        polygons = [polygon_of(one) for one in found]
        bbox = [np.concatenate([polygon.min(axis=0), np.ptp(polygon, axis=0)]) for polygon in polygons]
        area = [rasterise([polygon], *self.size(i)).sum() for polygon in polygons]
        return Objects(self.size(i), found[:, 0].astype(np.int64), np.array(bbox).reshape(-1, 4),
                       np.zeros(len(found), bool), np.array(area, float), [[one] for one in polygons])


def open_pair(source, i):
    """(image, Objects) of a source; the image may not be decoded yet. Raises WrongSize."""
    image, (H, W) = source.open(i), source.size(i)
    sides = crops.sides(image)
    if sides != (H, W):
        turned = "; its EXIF orientation, which is ignored here, may be what differs" * (sides == (W, H))
        raise WrongSize(f"{sides[1]} x {sides[0]} pixels, and the annotations say {W} x {H}: expected the "
                        f"same size{turned}")
    return image, source.objects(i)


def open_boxes(spec, split, cache_dir, say, reading=AS_THEY_ARE, max_bad=0.01, num_classes=None):
    """The source with objects that --data names, for split "train" or "val"; say(text) is told what it has.

    shapes or shapes:COUNT      the embedded scenes: ten shapes, one to four in an image
    coco:DIR                    annotations/instances_{train,val}*.json and the folders of the same names

    Training leaves out images without objects, and crowds. Raises UserError for a file that is not COCO's,
    and where more than a share max_bad of the objects or images is of no use; fewer are named.
    """
    kind, _, argument = spec.partition(":")
    if kind not in ("shapes", "coco") or kind == "coco" and not argument:
        raise UserError(f"--data {printable(spec)}: expected shapes, shapes:COUNT or coco:DIR, in DIR "
                        f"{LAYOUT}")
    if kind == "shapes":
        arrays = open_embedded(load_scenes, spec, split, cache_dir, say)
        source = BoxArray(arrays, f"scenes {split}", spec)
    else:
        source = open_coco(Path(os.path.expanduser(argument)), split, say, reading, max_bad)
    if num_classes and num_classes != len(source.classes):
        raise UserError(f"--num-classes {num_classes}: --data {spec} has {len(source.classes)} classes; "
                        f"expected that number, or no --num-classes")
    say(f"{split}: {counted(len(source), 'image')} with {counted(source.num_objects, 'object')} of "
        f"{len(source.classes)} class{'es' * (len(source.classes) > 1)} in {printable(source.origin)}")
    return source


def counted(count, what):
    return f"{count} {what}{'s' * (count != 1)}"


def open_coco(root, split, say, reading, max_bad):
    """The BoxFiles of a split of coco:DIR. Raises UserError."""
    path, folder = find_split(root, split)
    annotations = Annotations(path)
    large = np.flatnonzero(annotations.sizes.prod(axis=1) > reading.max_pixels)
    annotations.refuse(f"lists images of more than {reading.max_pixels} pixels",
                       [annotations.files[i] for i in large], "fewer, or a larger --max-pixels")
    count_faults(annotations, say, split, max_bad)
    count_crossed(annotations, say, split)
    if annotations.apart:
        objects = counted(len(annotations.ids), "object")
        say(f"warning: {split}: the bbox of {len(annotations.apart)} of {objects} overlaps "
            f"the box around the polygons by less than half: annotation "
            f"{listed(map(str, annotations.apart))}; training takes boxes from polygons, and AP takes bbox: "
            f"expected x, y, width, height in pixels")
    present, places, _ = files_below(folder)
    check_present(annotations, folder, set(present), say, split, max_bad)
    chosen, used = np.arange(len(annotations.files)), np.zeros(len(annotations.parts), bool)
    used[annotations.rows] = True
    if not (used & ~annotations.crowd).any():                           # nothing to learn from, or to find
        raise UserError(f"{path} has no image with an object that is no crowd: expected some")
    if split == "train":
        annotations.keep(used & ~annotations.crowd)
        chosen = np.flatnonzero(np.diff(annotations.first))
        empty, crowds = len(annotations.files) - len(chosen), int((used & annotations.crowd).sum())
        if empty or crowds:
            say(f"train: {counted(empty, 'image')} without objects and {counted(crowds, 'crowd')} are left "
                f"out, which evaluation alone uses")
    source = BoxFiles(folder, annotations, chosen, reading)
    source.folders = {os.fsencode(place) for place in (*places, os.path.realpath(path.parent))}
    look_at_images(source, max_bad)
    return source


def find_split(root, split):
    """(annotation file, folder of images) of a split. UserError unless there is one of each."""
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        raise UserError(f"data folder {root} {problem}: expected one with {LAYOUT}")
    found = sorted(path.name for path in root.glob(f"annotations/instances_{split}*.json"))
    if len(found) != 1:
        raise UserError(f"{root / 'annotations'} has {listed(found)} called instances_{split}*.json: "
                        f"expected one; --data coco:DIR needs {LAYOUT}; docs/detect.md, Own data, shows how "
                        f"to bring other exports into this form")
    name = found[0].removeprefix("instances_").removesuffix(".json")
    folders = [root / name, root / "images" / name]
    for folder in folders:
        if folder.is_dir():
            return root / "annotations" / found[0], folder
    raise UserError(f"neither {folders[0]} nor {folders[1]} is a folder: expected the images of {found[0]} "
                    f"there; --data coco:DIR needs {LAYOUT}")


def count_faults(annotations, say, split, max_bad):
    """Say which objects are of no use. UserError where they are more than a share max_bad of all."""
    why, total = annotations.left_out, len(annotations.parts)
    if not why:
        return
    ids = {}
    for one, reason in why.items():
        ids.setdefault(reason, []).append(str(one))
    named = "; ".join(f"{reason}: annotation {listed(found)}" for reason, found in ids.items())
    if len(why) > max_bad * total:
        raise UserError(f"{annotations.path} has {len(why)} of {total} objects that are of no use, more than "
                        f"--max-bad {max_bad:g} allows ({named}); expected of each a box and a mask within "
                        f"its image: correct or remove these annotations")
    say(f"warning: {split}: {len(why)} of {total} objects are of no use and left out ({named})")


def count_crossed(annotations, say, split, most=512):
    """Say how many of some objects have polygons whose lines cross, which are kept."""
    looked = [row for row in annotations.rows[spread(len(annotations.rows), most)] if annotations.is_rle[row]
              or max(map(len, annotations.parts_of(row))) <= MOST_CORNERS]
    crossed = [str(annotations.ids[row]) for row in looked if not annotations.is_rle[row]
               and any(map(crosses_itself, annotations.parts_of(row)))]
    if crossed:
        say(f"{split}: {len(crossed)} of {counted(len(looked), 'object')} looked at have polygons that cross "
            f"themselves: annotation {listed(crossed)}; they are filled by COCO's rule: what a line goes "
            f"around twice is outside")


def crosses_itself(polygon):
    """Whether two sides of a polygon (m, 2) cross; those that only touch do not."""
    x, y = polygon.T
    along_x, along_y = np.roll(x, -1) - x, np.roll(y, -1) - y           # each (m,)
    side = along_x[:, None] * (y - y[:, None]) - along_y[:, None] * (x - x[:, None])    # (m, m)
    apart = side * np.roll(side, -1, axis=1) < 0                        # of line i, the ends of side j
    return bool((apart & apart.T).any())


def check_present(annotations, folder, present, say, split, max_bad):
    """Say which images are listed and absent. UserError where they are more than a share max_bad of all."""
    absent = [name for name in annotations.files if os.path.normpath(name) not in present]
    if not absent:
        return
    total = len(annotations.files)
    text = f"{len(absent)} of {total} images that {annotations.path} lists are not in {folder}"
    if len(absent) > max_bad * total:
        raise UserError(f"{text}: {listed(absent)}, more than --max-bad {max_bad:g} allows; expected all: "
                        f"add them, or remove them from the list")
    say(f"warning: {split}: {text} and count as images that cannot be read: {listed(absent)}")


def look_at_images(source, max_bad):
    """Raise UserError where more than a share max_bad of some images have a wrong size, or none is of use."""
    looked, wrong, damaged = spread(len(source), LOOKED_AT), [], []
    for i in looked:
        try:
            open_pair(source, i)
        except WrongSize as error:
            wrong.append(f"{printable(source.name(i))}: {error}")
        except DECODE_ERRORS as error:                                  # the run counts and names it
            name = source.name(i)
            damaged.append(f"{printable(name)} cannot be read ({reason_of(error, name)})")
    chance = len(looked) < len(source)                                  # one may be the only one of them all
    if len(wrong) > max(max_bad * len(looked), chance):
        raise UserError(f"{wrong[0]} ({len(wrong)} such among {len(looked)} images looked at, more than "
                        f"--max-bad {max_bad:g} allows)")
    if len(wrong) + len(damaged) == len(looked):
        raise UserError(f"{(damaged + wrong)[0]}; none of {len(looked)} images that were looked at can be "
                        f"used: expected {LAYOUT}")


def match_classes(train, val):
    """Raise UserError unless two sources have the same categories under the same ids."""
    ours, theirs = (dict(zip(source.category_ids, source.classes, strict=True))
                    for source in (train, val))
    differ = [f"{one}: {ours.get(one, 'none')} and {theirs.get(one, 'none')}"
              for one in sorted({*ours, *theirs}) if ours.get(one) != theirs.get(one)]
    if differ:
        raise UserError(f"the categories of train and val differ, by id {listed(differ)}; expected the same "
                        f"in both annotation files")
