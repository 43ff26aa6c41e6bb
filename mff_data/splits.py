"""Which folders hold the splits of a data set: train/ and val/, or folders of other names, or none."""

import os
import re

from mff_min.errors import UserError, listed, printable

# What systems and programs leave beside images: thumbnails, trash, copies of resource forks.
LEFTOVERS = {"@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "__macosx", "__pycache__",
             "lost+found", "system volume information", "~snapshot", "@__thumb", "@tmp", "recycler",
             "network trash folder", "cvs"}
# trainA, TrainingSet and ImagesTrain are words too, trained is not.
WORD = re.compile(r"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))"
                  r"((?i:(?:train(?:ing|val)?|trn|val(?:id|idation)?|dev|eval(?:uation)?|"
                  r"test(?:ing)?|tst|hold[-_]?out)(?:[-_ ]?set)?))(?![a-z])")
KINDS = {"tra": "train", "trn": "train", "val": "val", "dev": "val", "eva": "val", "tes": "test",
         "tst": "test", "hol": "test"}
FEW = 5                                                                 # splits side by side, or fewer


def is_leftover(name):
    """Whether a folder of this name holds no images of anybody: a hidden one, or one of a system's own."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def is_of_runs(path):
    """Whether a folder is a run's, or that of the embedded images, or holds nothing but such folders."""
    if all(os.path.isfile(os.path.join(path, name)) for name in ("config.json", "env.json")):
        return True
    if re.fullmatch(r"shapes-v\d+-\d+px", os.path.basename(path)):
        return True
    try:
        with os.scandir(path) as entries:
            inside = [entry for entry in entries if not is_leftover(entry.name)]
    except OSError:                                                     # whoever lists it says so
        return False
    return bool(inside) and all(entry.is_dir(follow_symlinks=False) for entry in inside) and all(
        is_of_runs(entry.path) for entry in inside)


def folders_in(root):
    """The names of the folders in a folder, sorted, without leftovers and runs. UserError: cannot be read."""
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not is_leftover(entry.name)
                          and not is_of_runs(entry.path))
    except OSError as error:
        raise UserError(f"folder {root} cannot be read: {error.strerror}") from None


def split_groups(names):
    """[{"train": names, "val": names, "test": names}, ...] of folders that look like splits side by side.

    Those of a group differ in the word alone, as Train and Val do, or train2017 and val2017; a class may be
    called test_tube. Of several spellings of a kind the exact one counts.
    """
    groups = {}
    for name in names:
        if found := WORD.search(name):
            kind, rest = KINDS[found[0][:3].lower()], (name[:found.start()], name[found.end():])
            groups.setdefault(rest, {}).setdefault(kind, []).append(name)
    plain = groups.get(("", ""), {})
    for kind, found in plain.items():
        plain[kind] = [kind] if kind in found else found
    looks = {kind for group in groups.values() for kind in group}
    count = sum(len(found) for group in groups.values() for found in group.values())
    if count == len(names) and (len(looks) > 1 or plain):               # nothing else lies there
        return list(groups.values())
    clear = ["train"] in plain.values() or ["val"] in plain.values()
    return [group for group in groups.values() if len(group) > 1 or clear and group is plain]


def like_training(names):
    """Those of a few folders that are read as classes though their names speak of training images."""
    return [name for name in names if len(names) <= FEW and re.search("train|trn", name, re.I)]


def like_validation(root):
    """Those folders in root, if it is one, whose names speak of validation or test images."""
    names = folders_in(root) if os.path.isdir(root) else []
    return [name for name in names if re.search("val|test|tst|dev", name, re.I)]


def folder_of_split(root, split):
    """(folder, whether it is this split's own) of a data folder with or without splits.

    Where there is no val, the test images are it; without these the training images serve. Raises UserError
    where it is not clear which folder is meant, and where there are splits but no training images.
    """
    if (root / split).is_dir() and not is_of_runs(root / split):
        return root / split, True
    groups = split_groups(folders_in(root))
    if not groups:
        return root, False
    if len(groups) > 1:
        groups = [group for group in groups if ["train"] in group.values()] or groups
    named = ", ".join(f"{printable(name)}/" for group in groups for found in group.values() for name in found)
    if len(groups) > 1:
        raise UserError(f"data folder {root} has several folders that look like splits: {named}; expected "
                        f"train/ and val/: name the folders so, or make links of these names in a folder")
    group = groups[0]
    found = group.get(split, []) or (group.get("test", []) if split == "val" else [])
    if len(found) > 1:
        several = " and ".join(f"{printable(name)}/" for name in found)
        raise UserError(f"data folder {root} has {several} and no {split}/: it is not clear which is meant; "
                        f"expected one: rename it {split}, or make a link of that name")
    if found:
        return root / found[0], True
    if split == "val":
        return folder_of_split(root, "train")[0], False
    raise UserError(f"data folder {root} has {named} but no train/: expected both, or images alone; to train "
                    f"on one of these, give --data its own path")


def refuse_deeper_splits(root, paths):
    """Raise UserError where folders below root, seen from it as parts of paths, look like splits.

    Read together, they would give test images to training.
    """
    below = {}
    for folder in {os.path.dirname(path) for path in paths}:
        while folder:
            folder, name = os.path.split(folder)
            below.setdefault(folder, set()).add(name)
    for folder, names in sorted(below.items()):
        group = next((group for group in split_groups(sorted(names)) if len(group) > 1), None)
        if folder and group:
            found = listed(os.path.join(folder, name) for names in group.values() for name in names)
            raise UserError(f"data folder {root} has splits only further down: {found}; expected train/ and "
                            f"val/ in it, or images without splits: give --data {root / folder}, or a folder "
                            f"of links to what is meant")
