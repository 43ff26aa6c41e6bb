"""Where images come from: CIFAR's two versions, the layouts of Stanford Cars, lists, classes; bad input."""

import builtins
import os
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_mat import mat_file

from mff_data.lists import read_list
from mff_data.sources import ImageArray, ImageFolder, check_classes, check_labels, open_data, subset
from mff_min.errors import UserError, listed


def source_of(spec, split="train"):
    return open_data(str(spec), split, "nowhere", print)


def refusal(work, *arguments):
    """The text of the UserError that a call must raise: one line."""
    with pytest.raises(UserError) as error:
        work(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def write_images(folder, *paths):
    """A PNG of its own colour at each path."""
    for i, path in enumerate(paths):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 2 * i, 3 * i)).save(folder / path, format="PNG")


# ---------------------------------------------------------------- CIFAR

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
LABELS = [3, 1, 4, 1, 5, 9]


def pickled(values):
    """As Python 3 and NumPy 2 pickle for Python 2: bytes by _codecs.encode, arrays by numpy._core."""
    return pickle.dumps(values, protocol=2)


def pickled_by_python_2(values):
    """As Python 2 and NumPy 1 pickle, as the published files are: byte strings, arrays by numpy.core."""
    def text(value):
        return b"T" + struct.pack("<i", len(value)) + value

    def write(value):
        if isinstance(value, bytes):
            return text(value)
        if isinstance(value, int):
            return b"K" + bytes([value])
        if isinstance(value, list):
            return b"](" + b"".join(map(write, value)) + b"e"
        dtype = (b"cnumpy\ndtype\n(" + text(b"u1") + b"K\0K\1tR(K\3" + text(b"|") + b"NNN"
                 + b"J\xff\xff\xff\xff" * 2 + b"K\0tb")
        return (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0t" + text(b"b") + b"tR(K\1("
                + b"".join(b"J" + struct.pack("<i", side) for side in value.shape) + b"t" + dtype + b"\x89"
                + text(value.tobytes()) + b"tb")
    return b"\x80\2}(" + b"".join(write(part) for item in values.items() for part in item) + b"u."


def batch(key=b"labels", **changed):
    values = {b"data": PIXELS, key: LABELS, b"batch_label": b"a batch", b"filenames": [b"a.png"] * 6}
    return values | {name.encode(): value for name, value in changed.items()}


def write_cifar(folder, kind, dump=pickled, key=None):
    """The files of the python version."""
    folder.mkdir(parents=True, exist_ok=True)
    fine = kind == "cifar100"
    names = ["train", "test"] if fine else [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names:
        (folder / name).write_bytes(dump(batch(key or (b"fine_labels" if fine else b"labels"))))
    return folder


@pytest.mark.parametrize("dump", [pickled, pickled_by_python_2])
@pytest.mark.parametrize("kind, below", [("cifar10", ""), ("cifar10", "cifar-10-batches-py"),
                                         ("cifar100", ""), ("cifar100", "cifar-100-python")])
def test_cifar_is_read_from_its_python_version(tmp_path, dump, kind, below):
    write_cifar(tmp_path / below, kind, dump)
    assert pickle.loads((tmp_path / below / ("test" if kind == "cifar100" else "test_batch")).read_bytes(),
                        encoding="bytes")[b"data"].shape == (6, 3072)   # a true pickle
    train, val = source_of(f"{kind}:{tmp_path}"), source_of(f"{kind}:{tmp_path}", "val")
    assert len(train) == (6 if kind == "cifar100" else 30) and len(val) == 6
    assert [val.label(i) for i in range(6)] == LABELS
    assert train.classes == val.classes == [str(i) for i in range(int(kind[5:]))]
    want = PIXELS.reshape(6, 3, 32, 32).transpose(0, 2, 3, 1)
    assert all(np.array_equal(np.asarray(val.open(i)), want[i]) for i in range(6))


def test_both_versions_of_cifar_give_the_same_source(tmp_path):
    python = write_cifar(tmp_path / "python", "cifar100")
    (tmp_path / "binary" / "cifar-100-binary").mkdir(parents=True)
    for file in ("train.bin", "test.bin"):
        labels = np.array([[7, label] for label in LABELS], np.uint8)   # coarse, fine
        np.concatenate([labels, PIXELS], axis=1).tofile(tmp_path / "binary" / "cifar-100-binary" / file)
    a, b = source_of(f"cifar100:{python}"), source_of(f"cifar100:{tmp_path / 'binary'}")
    assert np.array_equal(a.images, b.images) and np.array_equal(a.labels["class"], b.labels["class"])
    (python / "train.bin").write_bytes(b"x")                            # of both, the binary one is taken
    assert "train.bin has 1 bytes: expected a multiple of 3074" in refusal(source_of, f"cifar100:{python}")


@pytest.mark.parametrize("kind, file, key", [("cifar10", "batches.meta", b"label_names"),
                                             ("cifar100", "meta", b"fine_label_names")])
def test_cifars_classes_have_names_in_the_order_of_the_labels(tmp_path, kind, file, key):
    names = [f"z{99 - i}" for i in range(int(kind[5:]))]                # not in the order of the alphabet
    write_cifar(tmp_path, kind)
    (tmp_path / file).write_bytes(pickled({key: [name.encode() for name in names], b"num_vis": 3072}))
    assert source_of(f"{kind}:{tmp_path}").classes == names
    (tmp_path / file).write_bytes(pickled({key: [b"one"]}))
    assert f"does not name {kind[5:]} different classes" in refusal(source_of, f"{kind}:{tmp_path}")


@pytest.mark.parametrize("kind, file", [("cifar10", "batches.meta.txt"),
                                        ("cifar100", "fine_label_names.txt")])
def test_cifars_binary_version_has_its_names_in_a_text_file(tmp_path, kind, file):
    names = [f"z{99 - i}" for i in range(int(kind[5:]))]
    for name in ["test.bin"] if kind == "cifar100" else ["test_batch.bin"]:
        (tmp_path / name).write_bytes(bytes(3074 if kind == "cifar100" else 3073))
    (tmp_path / file).write_text("\n".join(names) + "\n\n")
    assert source_of(f"{kind}:{tmp_path}", "val").classes == names
    (tmp_path / file).write_text("\n".join(names[:-1]))
    assert f"{file} does not name" in refusal(source_of, f"{kind}:{tmp_path}", "val")


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def malicious(marker):
    """Pickles that make the file `marker` when they are loaded as pickles are: {what they ask for: bytes}."""
    line = f"open({str(marker)!r}, 'w')"
    nested = Call(getattr, Call(getattr, Path(marker), "touch"), "__call__")
    return {"posix.system": pickled(batch(evil=Call(os.system, f"touch {marker}"))),
            "__builtin__.eval": pickled(Call(eval, line)),
            "__builtin__.exec": pickled([batch(), Call(exec, line)]),
            "io.open": pickle.dumps(Call(builtins.open, str(marker), "w"), protocol=4),      # STACK_GLOBAL
            "os.mkdir": f"(S'{marker}'\nios\nmkdir\n.".encode(),                            # INST
            "pathlib.PosixPath": b"\x80\2" + pickled(nested)[2:-1] + b")R."}


@pytest.mark.parametrize("asked", list(malicious("x")))
def test_code_in_a_pickle_does_not_run_and_is_named(tmp_path, asked):
    marker, folder = tmp_path / "marker", write_cifar(tmp_path / "data", "cifar100")
    data = malicious(marker)[asked]
    (folder / "train").write_bytes(data)
    said = refusal(source_of, f"cifar100:{folder}")
    expected = {"__builtin__.eval": "builtins.eval", "__builtin__.exec": "builtins.exec",
                "io.open": "_io.open",                                  # Python 3.12 names it so
                "pathlib.PosixPath": "__builtin__.getattr"}
    assert re.search(rf"train is refused: it asks for ({asked}|{expected.get(asked, asked)}), ", said), said
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists()                                              # it is what it claims to be


@pytest.mark.parametrize("data, message", [
    (b"", "train has 0 bytes and cannot be read (ValueError: pickle exhausted before"),
    (pickled(batch(b"fine_labels"))[:9000], "train has 9000 bytes and cannot be read ("),
    (b"<html>not found</html>", "train has 22 bytes and cannot be read (ValueError: at pos"),
    (pickled([1, 2]), "train holds a list: expected the dict of CIFAR's python version"),
    (pickled(batch(b"fine_labels", data=PIXELS[:, :9])), "has 54 bytes in the shape (6, 9) as its data"),
    (pickled_by_python_2(batch(b"fine_labels", data=PIXELS[:0])), "has 0 bytes in the shape (0, 3072)"),
    (pickled(batch(b"fine_labels", data=b"x")), "has nothing as its data: expected n images of 3072 bytes"),
    (pickled(batch(b"fine_labels", data=PIXELS.astype(np.float32))), "an array of f4: expected u1, bytes"),
    (pickled(batch(b"fine_labels", data=np.array([{}]))), "an array of O8: expected u1, bytes"),
    (pickled(batch(b"labels")), "train has no fine_labels for 6 images: expected a list of 6 numbers"),
    (pickled(batch(b"fine_labels", fine_labels=LABELS[:5])), "train has no fine_labels for 6 images"),
    (pickled(batch(b"fine_labels", fine_labels=[1, 2, 3, 4, 5, "6"])), "train has no fine_labels"),
    (pickled(batch(b"fine_labels", fine_labels=[1, 2, 3, 4, 5, 2 ** 70])), "train has no fine_labels"),
    (b"\x80\2cnumpy\nload\n.", "refused: it asks for numpy.load, and CIFAR's files need numpy's arrays"),
    (b"\x80\2cx\x1b[31m\ny\n.", r"it asks for x\x1b[31m.y,"),
    (b"\x80\2}r\xff\xff\xff\x7f.", "(ValueError: place 2147483647 of the memo)"),
    (b"\x80\5\x96" + struct.pack("<Q", 3) + b"abc.", "(ValueError: opcode BYTEARRAY8, of protocol 5)"),
    (b"\x80\2X\xff\0\0\0" + b"a" * 255 + b"q\0" + b"c_codecs\nencode\nh\0X\1\0\0\0a\x86R" * 99 + b".",
     "(ValueError: it encodes more text than it has)"),
])
def test_other_pickles_are_refused_with_the_reason(tmp_path, data, message):
    folder = write_cifar(tmp_path, "cifar100")
    (folder / "train").write_bytes(data)
    said = refusal(source_of, f"cifar100:{folder}")
    assert message in said and said.isprintable()


def test_a_damaged_pickle_is_read_or_refused_and_nothing_else(tmp_path):
    folder, rng, refused = write_cifar(tmp_path, "cifar100"), np.random.default_rng(0), 0
    whole = bytearray(pickled_by_python_2(batch(b"fine_labels", data=PIXELS[:1], fine_labels=[1])))
    code = [i for i in range(len(whole)) if not 200 < i < 3200]         # pixels may be anything
    for _ in range(300):
        data = whole.copy()
        for position in rng.choice(code, rng.integers(1, 4)):
            data[position] = rng.integers(256)
        (folder / "train").write_bytes(data)
        try:
            source_of(f"cifar100:{folder}")
        except UserError:
            refused += 1
    assert refused > 40


def test_missing_files_of_cifar_are_named(tmp_path):
    said = refusal(source_of, f"cifar10:{tmp_path}")
    assert said == (f"{tmp_path}/data_batch_1.bin does not exist, nor does data_batch_1: expected the binary "
                    f"or the python version of CIFAR-10")
    write_cifar(tmp_path, "cifar10")
    for i in (2, 4):
        (tmp_path / f"data_batch_{i}").unlink()
    assert "has no data_batch_2, data_batch_4: expected all of" in refusal(source_of, f"cifar10:{tmp_path}")


# ---------------------------------------------------------------- Stanford Cars

CARS = {"train": [("00001.jpg", 2), ("00002.jpg", 1), ("00003.jpg", 3)],
        "test": [("00001.jpg", 3), ("00002.jpg", 1), ("00003.jpg", 2)]}     # classes count from 1
NAMES = ["AM General Hummer", "Acura RL", "Acura Integra"]              # not in the order of the alphabet


def write_devkit(root, beside=False, classes=NAMES, **changed):
    """The devkit's layout, its files in devkit/ or beside it."""
    write_images(root, *(f"cars_{split}/{name}" for split in CARS for name, _ in CARS[split]))
    folder = root if beside else root / "devkit"
    folder.mkdir(exist_ok=True)
    for split, file in (("train", "cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        entries = [{"bbox_x1": np.array([[3]], np.uint8), "class": np.array([[label]], np.uint8),
                    "fname": name} for name, label in CARS[split]]
        (folder / file).write_bytes(mat_file({"annotations": changed.get(split, entries)}))
    (folder / "cars_meta.mat").write_bytes(mat_file({"class_names": classes}))
    return root


def write_text_lists(root, names=NAMES, val="val"):
    write_images(root, *(f"cars_{split}/{name}" for split in CARS for name, _ in CARS[split]))
    for split, file in (("train", "train"), ("test", val)):
        lines = [f"cars_{split}/{name}\t{names[label - 1]}" for name, label in CARS[split]]
        (root / f"{file}.txt").write_text("# path and label\n\n" + "\n".join(lines))
    return root


def write_class_folders(root, val="val"):
    for split, folder in (("train", "train"), ("test", val)):
        write_images(root, *(f"{folder}/{NAMES[label - 1]}/{name}" for name, label in CARS[split]))
    return root


@pytest.mark.parametrize("write, flags", [
    (write_devkit, {}), (write_devkit, {"beside": True}), (write_text_lists, {}),
    (write_text_lists, {"val": "test"}), (write_class_folders, {}), (write_class_folders, {"val": "test"}),
])
def test_the_layouts_of_cars_give_the_same_images_with_the_same_classes(tmp_path, write, flags):
    write(tmp_path, **flags)
    for split, given in (("train", "train"), ("val", "test")):
        source = source_of(f"cars:{tmp_path}", split)
        found = {Path(source.name(i)).name: source.classes[source.label(i)] for i in range(len(source))}
        assert found == {name: NAMES[label - 1] for name, label in CARS[given]} and source.is_split
        assert source.open(0).size == (8, 8)
    assert sorted(source.classes) == sorted(NAMES)


def test_the_devkits_labels_count_from_0_and_its_classes_stand_in_its_order(tmp_path):
    train, val = (source_of(f"cars:{write_devkit(tmp_path)}", split) for split in ("train", "val"))
    assert train.classes == val.classes == NAMES
    assert [train.label(i) for i in range(3)] == [1, 0, 2] and [val.label(i) for i in range(3)] == [2, 0, 1]
    check_labels("cars", train, val)


@pytest.mark.parametrize("names, classes", [
    (["10", "9", "2"], ["2", "9", "10"]), (["1", "2", "3"], ["1", "2", "3"]),
    (["0", "1", "2"], ["0", "1", "2"]), (["b", "10", "9"], ["10", "9", "b"]),
])
def test_numbers_in_text_lists_are_classes_in_their_own_order_from_0_or_from_1(tmp_path, names, classes):
    train = source_of(f"cars:{write_text_lists(tmp_path, names)}")
    assert train.classes == classes
    assert [train.classes[train.label(i)] for i in range(3)] == [names[1], names[0], names[2]]


def test_a_line_of_a_text_list_ends_with_its_label(tmp_path):
    (tmp_path / "a.txt").write_text("a b/c d.jpg 7\r\n  x.jpg\tname with spaces \n# no\n")
    assert read_list(tmp_path / "a.txt") == [("a b/c d.jpg", "7"), ("x.jpg", "name with spaces")]
    (tmp_path / "a.txt").write_text("a.jpg 1\n\nb.jpg\n")
    assert refusal(read_list, tmp_path / "a.txt").endswith("line 3, is b.jpg: expected a path and a label")


@pytest.mark.parametrize("path", ["../secret.jpg", "/etc/passwd", "cars_train/../../secret.jpg", ".."])
def test_paths_that_leave_the_folder_are_refused(tmp_path, path):
    write_images(tmp_path, "secret.jpg")
    root = write_text_lists(tmp_path / "lists")
    with open(root / "train.txt", "a") as file:
        file.write(f"\n{path}\tAcura RL\n")
    assert f"train.txt is refused: {path} (1) may lie outside" in refusal(source_of, f"cars:{root}")
    bad = [{"class": np.array([[1]]), "fname": path}]
    root = write_devkit(tmp_path / "devkit", train=bad)
    assert f"annos.mat is refused: {path} (1) may lie outside" in refusal(source_of, f"cars:{root}")


@pytest.mark.parametrize("write", [write_text_lists, write_devkit])
def test_the_first_five_missing_images_are_named(tmp_path, write):
    names = [f"{i:05d}.jpg" for i in range(4, 11)]
    root = write(tmp_path)
    if write is write_text_lists:
        lines = "".join(f"\ncars_train/{name}\tAcura RL" for name in names)
        (root / "train.txt").write_text((root / "train.txt").read_text() + lines)
    else:
        write_devkit(root, train=[{"class": np.array([[1]]), "fname": name} for name in names])
    said = refusal(source_of, f"cars:{root}")
    assert "lists images that are not in" in said and said.endswith("00008.jpg, ... (7)")
    assert "00009" not in said


def entry(label, name="00001.jpg"):
    return [{"class": label, "fname": name}]


@pytest.mark.parametrize("flags, message", [
    (dict(train=entry(np.array([[0]]))),
     "image 1: expected a struct of fname, text, and class, a number of 1 to 3"),
    (dict(train=entry(np.array([[4]]))), "image 1: expected a struct"),
    (dict(train=entry(np.array([[1.5]]))), "image 1: expected a struct"),
    (dict(train=entry(np.array([[np.nan]]))), "image 1: expected a struct"),
    (dict(train=entry(np.array([[1, 2]]))), "image 1: expected a struct"),
    (dict(train=entry("1")), "image 1: expected a struct"),
    (dict(train=entry(np.array([[1]]), name=np.array([[1]]))), "image 1: expected a struct"),
    (dict(train=[{"class": np.array([[1]])}]), "image 1: expected a struct"),
    (dict(train=["a", "b"]), "image 1: expected a struct"),
    (dict(train=np.ones((2, 2))), "has no annotations: expected a struct array"),
    (dict(classes=[np.ones((1, 1))]), "cars_meta.mat has no class_names: expected a cell array of text"),
    (dict(classes="abc"), "cars_meta.mat has no class_names"),
])
def test_annotations_of_another_kind_are_refused(tmp_path, flags, message):
    assert message in refusal(source_of, f"cars:{write_devkit(tmp_path, **flags)}")


def test_what_is_missing_from_cars_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    said = refusal(source_of, f"cars:{tmp_path}/empty")
    assert "empty has neither train.txt nor devkit/cars_train_annos.mat nor train/" in said
    root = write_devkit(tmp_path / "devkit")
    (root / "devkit" / "cars_test_annos_withlabels.mat").unlink()
    assert "annos_withlabels.mat does not exist" in refusal(source_of, f"cars:{root}", "val")
    (root / "devkit" / "cars_meta.mat").unlink()
    assert "cars_meta.mat does not exist" in refusal(source_of, f"cars:{root}")
    root = write_text_lists(tmp_path / "lists")
    (root / "val.txt").unlink()
    assert "test.txt cannot be read: No such file" in refusal(source_of, f"cars:{root}", "val")
    (root / "val.txt").write_text("cars_test/00001.jpg\tLada\n")
    assert "train.txt has not: Lada (1)" in refusal(source_of, f"cars:{root}", "val")
    (root / "train.txt").write_text("# nothing\n")
    assert "train.txt lists no images" in refusal(source_of, f"cars:{root}")


# ---------------------------------------------------------------- subsets


@pytest.fixture
def photos(tmp_path):
    """Two classes of three images each; each class has an image called same.JPEG."""
    names = [f"{wnid}/{wnid}_{i}.JPEG" for wnid in ("n01", "n02") for i in (1, 22)]
    write_images(tmp_path / "data", *(f"train/{name}" for name in (*names, "n01/same.JPEG", "n02/same.JPEG")))
    return ImageFolder(tmp_path / "data", "train")


def write_list(tmp_path, *lines):
    (tmp_path / "list.txt").write_text("\n".join(lines))
    return tmp_path / "list.txt"


def test_a_subset_has_the_images_listed_and_all_classes(photos, tmp_path):
    path = write_list(tmp_path, "# one percent", "", "n02_22.JPEG", "  n02/same.JPEG\r")
    few = subset(photos, path)
    assert [Path(few.name(i)).name for i in range(len(few))] == ["n02_22.JPEG", "same.JPEG"]
    assert few.classes == ["n01", "n02"] and few.is_split and few.labels["class"].tolist() == [1, 1]
    assert [few.label(i) for i in range(2)] == [1, 1] and few.open(0).size == (8, 8)
    assert subset(photos, write_list(tmp_path, "n02/same.JPEG", "n02_22.JPEG")).name(0) == few.name(0)
    assert len(subset(few, write_list(tmp_path, "same.JPEG"))) == 1     # no longer ambiguous


def test_a_subset_of_arrays_is_listed_by_number_or_by_name(tmp_path):
    labels = {"shape": np.arange(20) % 3, "texture": np.arange(20) % 4}
    images = np.arange(20 * 48, dtype=np.uint8).reshape(20, 4, 4, 3)
    source = ImageArray(images, labels, list("abc"), "shapes train")
    few = subset(source, write_list(tmp_path, "11", "shapes train 3", "7"))
    assert [few.name(i) for i in range(3)] == [f"shapes train {i}" for i in (3, 7, 11)]
    assert {name: values.tolist() for name, values in few.labels.items()} == {"shape": [0, 1, 2],
                                                                            "texture": [3, 3, 3]}
    assert np.array_equal(np.asarray(few.open(1)), source.images[7])
    assert "has not: 20 (1); expected names such as 0, shapes train 0" in refusal(
        subset, source, write_list(tmp_path, "20"))
    assert "more than once: shapes train 3 (1)" in refusal(
        subset, source, write_list(tmp_path, "3", "shapes train 3"))


@pytest.mark.parametrize("lines, message", [
    (["# nothing", " "], "lists no images: expected a path or a file name a line"),
    ([f"{i}.JPEG" for i in range(9)] + ["n01_1.JPEG"],
     "that the data has not: 0.JPEG, 1.JPEG, 2.JPEG, 3.JPEG, 4.JPEG, ... (9); expected names such as "
     "n01/n01_1.JPEG, n01_1.JPEG"),
    (["train/n01/n01_1.JPEG"], "that the data has not: train/n01/n01_1.JPEG (1)"),
    (["same.JPEG"], "has names of more than one image: same.JPEG (1)"),
    (["n01_1.JPEG", "n01_22.JPEG", "n01_1.JPEG"], "n01_1.JPEG (1)"),
    (["n01_1.JPEG", "n01/n01_1.JPEG"], "lists images more than once"),
    (["\x1b[31mred"], r"'\x1b[31mred' (1)"),
])
def test_lists_that_do_not_fit_the_data_are_refused(photos, tmp_path, lines, message):
    said = refusal(subset, photos, write_list(tmp_path, *lines))
    assert message in said and said.startswith(f"--subset {tmp_path}/list.txt ") and said.isprintable()


def test_a_list_that_cannot_be_read_is_refused(photos, tmp_path):
    assert "nowhere.txt cannot be read: No such file" in refusal(subset, photos, tmp_path / "nowhere.txt")
    assert "cannot be read: Is a directory" in refusal(subset, photos, tmp_path)
    (tmp_path / "list.txt").write_bytes(bytes(range(256)))
    assert "lists images that the data has not" in refusal(subset, photos, tmp_path / "list.txt")


def test_a_subset_keeps_no_python_object_for_each_image(photos, tmp_path):
    few = subset(photos, write_list(tmp_path, "n01_1.JPEG", "n02_1.JPEG"))
    kept = {name: value for source in (few, photos) for name, value in vars(source).items()}
    many = {name for name, value in kept.items() if isinstance(value, list | dict | set | tuple)}
    assert many == {"classes", "labels"} and all(isinstance(v, np.ndarray) for v in few.labels.values())
    assert photos.paths.dtype.kind == "S" and few.indices.dtype.kind == "i"


# ---------------------------------------------------------------- classes


def test_class_lists_must_be_the_same_in_the_same_order():
    check_classes(["a", "b"], ["a", "b"])
    check_classes(("a", "b"), ["a", "b"])
    assert refusal(check_classes, ["a", "c"], ["a", "b"], "train", "val") == (
        "the classes differ: train has a, c (2), val has a, b (2); only train: c (1); only val: b (1)")
    assert refusal(check_classes, ["b", "a"], ["a", "b"]) == (
        "the classes stand in another order: number 0 is b for the data and a for the checkpoint")
    assert "only the checkpoint: a (1)" in refusal(check_classes, ["a"], ["a", "a"])
    assert r"only the data: 'x\ny' (1)" in refusal(check_classes, ["x\ny"], ["a"])


def test_names_of_cifars_classes_do_not_pass_for_its_numbers(tmp_path):
    write_cifar(tmp_path, "cifar10")
    numbers = source_of(f"cifar10:{tmp_path}").classes
    (tmp_path / "batches.meta").write_bytes(pickled({b"label_names": [b"z%d" % i for i in range(10)]}))
    assert "only the checkpoint: 0, 1, 2, 3, 4, ... (10)" in refusal(
        check_classes, source_of(f"cifar10:{tmp_path}").classes, numbers)


@pytest.mark.parametrize("paths", [["train/a.png", "val/a.png"],
                                   ["train/a.png", "train/x/b.png", "val/x/a.png", "val/y.png"]])
def test_images_outside_class_folders_have_no_label(tmp_path, paths):
    write_images(tmp_path, *paths)
    train, val = (ImageFolder(tmp_path, split) for split in ("train", "val"))
    assert refusal(check_labels, tmp_path, train, val).startswith("train has images outside class folders")
    assert refusal(check_classes, val.classes, ["x"]).startswith("the data has images outside class folders")


def test_one_class_is_nothing_to_tell_apart(tmp_path):
    write_images(tmp_path, "train/x/a.png", "val/x/a.png")
    splits = [ImageFolder(tmp_path, split) for split in ("train", "val")]
    assert "has one class" in refusal(check_labels, tmp_path, *splits)


def test_names_in_messages_stay_on_one_line():
    assert listed(["b", "a\nb", "c"]) == r"'a\nb', b, c (3)" and listed([]) == "none"
    assert listed(map(str, range(7))) == "0, 1, 2, 3, 4, ... (7)"
