"""Where images come from: CIFAR's files, the layouts of Stanford Cars, lists, classes; bad input."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sources import ROOT

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


def write_cifar(folder, kind, suffix=".bin"):
    """Files of black images of class 0, by the names of the binary version, or of another one's suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    batches = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in ["train", "test"] if kind == "cifar100" else batches:
        (folder / f"{name}{suffix}").write_bytes(bytes(2 * (3074 if kind == "cifar100" else 3073)))
    return folder


@pytest.mark.parametrize("kind, below", [("cifar10", ""), ("cifar10", "cifar-10-batches-bin"),
                                         ("cifar100", ""), ("cifar100", "cifar-100-binary")])
def test_cifar_is_found_where_its_archive_unpacks_to(tmp_path, kind, below):
    write_cifar(tmp_path / below, kind)
    train, val = source_of(f"{kind}:{tmp_path}"), source_of(f"{kind}:{tmp_path}", "val")
    assert len(train) == (2 if kind == "cifar100" else 10) and len(val) == 2
    assert train.classes == val.classes == [str(i) for i in range(int(kind[5:]))]


@pytest.mark.parametrize("kind, below, archive", [
    ("cifar10", "", "cifar-10-binary.tar.gz"), ("cifar10", "cifar-10-batches-py", "cifar-10-binary.tar.gz"),
    ("cifar100", "", "cifar-100-binary.tar.gz"), ("cifar100", "cifar-100-python", "cifar-100-binary.tar.gz"),
])
@pytest.mark.parametrize("split", ["train", "val"])
def test_cifars_python_version_is_refused_and_the_archive_is_named(tmp_path, kind, below, archive, split):
    write_cifar(tmp_path / below, kind, suffix="")
    said = refusal(source_of, f"{kind}:{tmp_path}", split)
    assert "python version, whose files are programs (pickles): expected the binary version" in said
    assert said.endswith(archive)
    write_cifar(tmp_path, kind)                                         # of both, the binary one is read
    assert len(source_of(f"{kind}:{tmp_path}", split))


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


def test_missing_files_of_cifar_are_named(tmp_path):
    said = refusal(source_of, f"cifar10:{tmp_path}")
    assert said == (f"{tmp_path}/data_batch_1.bin does not exist: expected the binary version, "
                    f"cifar-10-binary.tar.gz, unpacked")
    write_cifar(tmp_path, "cifar10")
    for i in (2, 4):
        (tmp_path / f"data_batch_{i}.bin").unlink()
    said = refusal(source_of, f"cifar10:{tmp_path}")
    assert "has no data_batch_2.bin, data_batch_4.bin: expected all of" in said


# ---------------------------------------------------------------- Stanford Cars

CARS = {"train": [("00001.jpg", 2), ("00002.jpg", 1), ("00003.jpg", 3)],
        "test": [("00001.jpg", 3), ("00002.jpg", 1), ("00003.jpg", 2)]}     # classes count from 1
NAMES = ["AM General Hummer", "Acura RL", "Acura Integra"]              # not in the order of the alphabet


def write_images_of_cars(root):
    write_images(root, *(f"cars_{split}/{name}" for split in CARS for name, _ in CARS[split]))


def write_text_lists(root, names=NAMES, val="val"):
    write_images_of_cars(root)
    for split, file in (("train", "train"), ("test", val)):
        lines = [f"cars_{split}/{name}\t{names[label - 1]}" for name, label in CARS[split]]
        (root / f"{file}.txt").write_text("# path and label\n\n" + "\n".join(lines))
    return root


def write_class_folders(root, val="val"):
    for split, folder in (("train", "train"), ("test", val)):
        write_images(root, *(f"{folder}/{NAMES[label - 1]}/{name}" for name, label in CARS[split]))
    return root


@pytest.mark.parametrize("write, flags", [
    (write_text_lists, {}), (write_text_lists, {"val": "test"}),
    (write_class_folders, {}), (write_class_folders, {"val": "test"}),
])
def test_the_layouts_of_cars_give_the_same_images_with_the_same_classes(tmp_path, write, flags):
    write(tmp_path, **flags)
    for split, given in (("train", "train"), ("val", "test")):
        source = source_of(f"cars:{tmp_path}", split)
        found = {Path(source.name(i)).name: source.classes[source.label(i)] for i in range(len(source))}
        assert found == {name: NAMES[label - 1] for name, label in CARS[given]} and source.is_split
        assert source.open(0).size == (8, 8)
    assert sorted(source.classes) == sorted(NAMES)


def test_the_lines_of_the_docs_make_text_lists_of_the_devkit(tmp_path, monkeypatch):
    savemat = pytest.importorskip("scipy.io").savemat
    write_images_of_cars(tmp_path)
    (tmp_path / "devkit").mkdir()
    for split, file in (("train", "cars_train_annos"), ("test", "cars_test_annos_withlabels")):
        entries = np.array([(3.0, label, name) for name, label in CARS[split]],
                           dtype=[("bbox_x1", object), ("class", object), ("fname", object)])
        savemat(tmp_path / "devkit" / f"{file}.mat", {"annotations": entries[None]})
    savemat(tmp_path / "devkit" / "cars_meta.mat", {"class_names": np.array(NAMES, dtype=object)[None]})
    docs = (ROOT / "docs" / "data.md").read_text()
    lines = next(code for code in re.findall(r"```python\n(.*?)```", docs, re.S) if "loadmat" in code)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    for split, given in (("train", "train"), ("val", "test")):
        source = source_of(f"cars:{tmp_path}", split)
        assert [(Path(source.name(i)).name, source.classes[source.label(i)]) for i in range(len(source))] == [
            (name, NAMES[label - 1]) for name, label in CARS[given]]


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


def test_the_first_five_missing_images_are_named(tmp_path):
    root = write_text_lists(tmp_path)
    lines = "".join(f"\ncars_train/{i:05d}.jpg\tAcura RL" for i in range(4, 11))
    (root / "train.txt").write_text((root / "train.txt").read_text() + lines)
    said = refusal(source_of, f"cars:{root}")
    assert "lists images that are not in" in said and said.endswith("00008.jpg, ... (7)")
    assert "00009" not in said


def test_what_is_missing_from_cars_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    said = refusal(source_of, f"cars:{tmp_path}/empty")
    assert "empty has no train.txt and no train/: expected Stanford Cars as text lists" in said
    for file in ("empty/cars_meta.mat", "below/devkit/cars_meta.mat"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
        said = refusal(source_of, f"cars:{tmp_path / file.split('/')[0]}")
        assert "the devkit's .mat files, which are not read: expected" in said and "docs/data.md" in said
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
    (tmp_path / "batches.meta.txt").write_text("\n".join(f"z{i}" for i in range(10)))
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
