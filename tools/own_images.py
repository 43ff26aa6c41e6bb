"""Somebody's own images, one after the other: those that cannot be read are named, and the others go on.

tools.segment, detect, reconstruct, attention and predict read folders, which are searched wholly, and images.
"""

import os
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from mff_data.decode import DECODE_ERRORS, reason_of, suffixes
from mff_data.outages import Patience
from mff_data.sources import ImageFiles, check_output, counted_suffixes, files_below
from mff_min.config import check_reachable
from mff_min.errors import UserError, listed, printable
from mff_run.files import write_atomically


def list_images(*given, unique=True):
    """(paths of the images in folders, and of images; the folder they are seen from; those looked into).

    Raises UserError where there is none, and where what is written for two would have one name (unique).
    """
    paths, all_places = [], set()
    for path in map(Path, given):
        check_reachable("images", path)
        if path.is_file():
            paths.append(os.path.abspath(path))
            continue
        if not path.is_dir():
            problem = "is neither a file nor a folder" if path.exists() else "does not exist"
            raise UserError(f"{path} {problem}: expected a folder of images, or images")
        found, places, _ = files_below(path)
        images = [name for name in found if name.lower().endswith(suffixes())]
        if not images:
            others = counted_suffixes(found)
            raise UserError(f"{path} holds no images ({len(found)} other files{': ' * bool(others)}{others}"
                            f"): expected files that end in {' '.join(suffixes())}")
        paths += [os.path.abspath(path / name) for name in images]
        all_places |= places
    root = given[0] if len(given) == 1 and not os.path.isfile(given[0]) else os.path.commonpath(
        [os.path.dirname(path) for path in paths])
    paths = sorted({os.path.relpath(path, os.path.abspath(root)) for path in paths})
    counts = Counter(os.path.splitext(name)[0] for name in paths)
    twice = [name for name in paths if counts[os.path.splitext(name)[0]] > 1]
    if twice and unique:
        raise UserError(f"{root} has images that differ in their endings alone: {listed(twice)}; what is "
                        f"written for them would have one name: rename them")
    return paths, Path(root), all_places


def check_folder(out, places):
    """Raise UserError unless the output folder is new or empty, and lies outside of the images' folders."""
    out = Path(out)
    check_reachable("--output-dir", out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--output-dir {out} is there already and not an empty folder: name another")
    check_output(out, [SimpleNamespace(folders=set(map(os.fsencode, places)))])


class OwnImages:
    """The images at paths below a folder. bad is {path: reason} of those that could not be read so far."""

    def __init__(self, root, paths, reading, progress):
        self.root, self.paths, self.progress, self.bad = root, paths, progress, {}
        self.source = ImageFiles(root, paths, {}, [], reading=reading)

    def each(self, load):
        """(index, path, load(image)) of each image that can be read; a disk that goes away is waited for.

        load may raise ValueError for an image that it cannot take. Raises UserError where there is no image.
        """
        patience = Patience(self.source, self.source.open)

        def read(i):
            return load(self.source.open(i))
        for i, name in enumerate(self.paths):
            try:
                loaded = patience.read(i, partial(read, i))
            except DECODE_ERRORS as error:
                self.bad[name] = reason_of(error, os.path.join(self.root, name))
                continue
            yield i, name, loaded
            self.progress.tick(i + 1)
        if len(self.bad) == len(self.paths):
            name, reason = next(iter(self.bad.items()))
            raise UserError(f"none of the {len(self.paths)} images in {self.root} can be read: the first is "
                            f"{printable(name)} ({reason})")
        for name, reason in sorted(self.bad.items())[:5]:
            self.progress.say(f"warning: {printable(name)} cannot be read ({reason})")

    @property
    def counted(self):
        """How many could be read, as text: "3 of 4 images"."""
        return f"{len(self.paths) - len(self.bad)} of {len(self.paths)} images"


def write_picture(folder, name, picture):
    """Write a picture as a PNG, for the image of this path, in a folder that is made where there is none."""
    path = Path(folder) / f"{os.path.splitext(name)[0]}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: picture.save(file, "PNG"), sweep=False)
