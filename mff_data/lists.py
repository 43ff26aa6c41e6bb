"""Files that list images: a name per line, and text lists with labels.

Paths in them were written by others: absolute ones and those that leave their folder by ".." are refused.

Shapes: n images.
"""

import os
import re
import unicodedata

import numpy as np

from mff_min.errors import UserError, printable

HEADERS = {"path", "file", "filename", "file_name", "filepath", "file_path", "image", "images", "image_id",
           "image_name", "image_path", "imageid", "img", "img_path", "name", "id"}
MOST_BYTES = 2 ** 30                                                    # of a list: ImageNet-21k's fits
LAYOUT = ("expected train.txt and val.txt, on each line a path below that folder, its train/ or val/, then a "
          "tab, space or comma, and a label: docs/data.md, Labels in lists")


def same_name(name):
    """A name in one Unicode form: macOS writes an e and an accent where others write one letter."""
    return unicodedata.normalize("NFC", name)


def read_lines(path):
    """[(number, line)] of a text file, without blank lines and those that begin with #. Raises UserError.

    So it does for what is no plain file, which may never end, and for what is no text.
    """
    try:
        size, plain = os.path.getsize(path), path.is_file()
        if not (plain or path.is_dir()) or size > MOST_BYTES:
            found = f"has {size} bytes" if plain else "is no plain file"
            raise UserError(f"the list {path} {found}: expected a text file of {MOST_BYTES} bytes at most")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"the list {path} cannot be read: {error.strerror}") from None
    wide = 32 if content.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")) else 16
    if wide == 32 or content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"the list {path} is in UTF-{wide}: expected UTF-8; iconv -f UTF-{wide} -t UTF-8 "
                        f"converts it")
    if bytes(16) in content:                                            # a sparse file
        raise UserError(f"the list {path} has rows of zero bytes: expected a text file, in UTF-8")
    lines = [os.fsdecode(line).strip() for line in content.removeprefix(b"\xef\xbb\xbf").splitlines()]
    return [(number, line) for number, line in enumerate(lines, 1) if line and not line.startswith("#")]


def natural(name):
    """What sorts names by the numbers in them: 2 stands before 10, as in timm."""
    # Python's int takes 4,300 digits at most, so numbers are compared by length, then digit by digit.
    return [number_key(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def number_key(digits):
    """(how many digits, digits) of a number without zeros in front, which sorts as the number does."""
    digits = "".join(str(int(digit)) for digit in digits).lstrip("0")
    return len(digits), digits


def read_list(root, split):
    """(paths below root, labels (n,), classes, whether it is this split's, its name) of a list with labels.

    It is root/train.txt, for "val" val.txt or test.txt, or train.txt where there is neither. classes are
    the labels that stand in it, numbers in their own order. Raises UserError with the number of the line.
    """
    names = ["train.txt"] if split == "train" else ["val.txt", "test.txt", "train.txt"]
    path = next((root / name for name in names if (root / name).is_file()), None)
    if not path:
        what = f"has no {names[0]}" if root.is_dir() else "is no folder"
        if (root / names[0]).exists():
            what = f"has {names[0]}, which is no regular file"
        raise UserError(f"{root} {what}: {LAYOUT}")
    places = list(dict.fromkeys(["", path.stem, split]))
    paths, labels, before, absent = [], [], {}, []
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        image, file, label = columns_of(line, root, places, where)
        if not file:
            if before or absent or image.lower() not in HEADERS:        # a first line may name the columns
                absent.append(f"{where}: {printable(image)}")
            continue
        if file in before:
            raise UserError(f"{where}: {printable(image)} is listed in line {before[file]} already; expected "
                            f"each image once: remove one of these lines")
        before[file] = number
        paths.append(file)
        labels.append(same_name(label))
    if absent:
        more = f" (first of {len(absent)} such lines)" if len(absent) > 1 else ""
        raise UserError(f"{absent[0]} is no file in {root} or {root / places[1]}{more}; expected paths "
                        f"below one of them, before the label, with / between folders; a header begins with "
                        f"path, file or image, or with #")
    if not paths:
        raise UserError(f"{path} lists no images: {LAYOUT}")
    classes = sorted(set(labels))
    if all(name.isdecimal() for name in classes):
        classes.sort(key=natural)
    index = {name: i for i, name in enumerate(classes)}
    is_split = split == "train" or path.stem != "train"
    return paths, np.array([index[label] for label in labels]), classes, is_split, os.fspath(path)


def columns_of(line, root, places, where):
    """(path, its file below root or "", label) of a line.

    A tab ends the path; else a space or a comma does, the last one before which a file's name ends. Path and
    label may stand in double quotes. Raises UserError where there is no label, or more than one.
    """
    if "\t" in line:
        cuts = [line.index("\t")]
    else:
        cuts = [cut.start() for cut in re.finditer("[ ,]", line)]
    image = file = label = separator = ""
    for cut in cuts[::-1]:
        path = unquoted(line[:cut])
        file = file_of(path, root, places, where)
        if file or not separator:                                       # else the last one counts
            image, separator = path, line[cut]
            label = line[cut:].strip("\t ").removeprefix(",").strip()
        if file:
            break
    if not image or not label:
        other = next((f", not {mark}" for mark in ";|" if mark in line), "")
        raise UserError(f"{where}, is {printable(line[:80])}: expected a path and a label, with a tab, space "
                        f"or comma between them{other}")
    if separator in label and unquoted(label) == label:
        raise UserError(f"{where}, is {printable(line[:80])}: expected two columns, a path and a label; put "
                        f"a tab between them, or the label in double quotes, and nothing behind it")
    return image, file, unquoted(label)


def unquoted(text):
    """The text without the double quotes around it, if they are there; doubled ones in it are one."""
    text = text.strip()
    return text[1:-1].replace('""', '"').strip() if len(text) > 1 and text[0] == text[-1] == '"' else text


def file_of(image, root, places, where):
    """The path below root of the file that an image of a list is, "" where it is none in any of the places.

    Raises UserError for a path that could leave root.
    """
    if os.path.isabs(image):
        raise UserError(f"{where} is refused: {printable(image)} is an absolute path; expected a path below "
                        f"{root}, such as train/0.png")
    if ".." in image.split(os.sep):
        raise UserError(f"{where} is refused: {printable(image)} may lie outside {root}; expected a path "
                        f"below it, without ..")
    forms = () if image.isascii() else ("NFC", "NFD")
    for place in places:
        for spelling in (image, *(unicodedata.normalize(form, image) for form in forms)):
            if image and os.path.isfile(os.path.join(root, place, spelling)):
                return os.path.normpath(os.path.join(place, spelling))
    return ""


def has_lists(root):
    """Whether Stanford Cars lie in a folder as text lists, not as class folders. UserError for neither."""
    if (root / "train.txt").is_file():
        return True
    if (root / "train").is_dir():
        return False
    devkit = [*root.glob("*.mat"), *root.glob("devkit/*.mat")]
    found = "has the devkit's .mat files, which are not read" if devkit else "has no train.txt and no train/"
    raise UserError(f"{root} {found}: expected Stanford Cars as text lists, train.txt and test.txt, or class "
                    f"folders; docs/data.md has the lines that make the lists of the devkit")
