"""Where images come from: CIFAR's files, lists with labels, splits, subsets, classes; bad input."""

import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sources import ROOT

from mff_data.sources import ImageArray, ImageFolder, match_labels, open_data, relabel, subset
from mff_min.errors import UserError, listed

COMPOSED, DECOMPOSED = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")


def source_of(spec, split="train", say=print):
    return open_data(str(spec), split, "nowhere", say)


def matched(spec, say=print):
    """(train, val) as the stages have them."""
    return match_labels(spec, source_of(spec, say=say), source_of(spec, "val", say=say), say)


def named(source):
    """{path below the data's folder: name of its class} of all images."""
    paths = (Path(source.name(i)).relative_to(source.root).as_posix() for i in range(len(source)))
    return {path: source.classes[source.label(i)] for i, path in enumerate(paths)}


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
    assert "has no val folder: expected" in refusal(matched, f"cars:{root}")
    (root / "val.txt").write_text("cars_test/00001.jpg\tLada\n")
    assert "val has classes that train has not: Lada (1)" in refusal(matched, f"cars:{root}")
    (root / "train.txt").write_text("# nothing\n")
    assert "train.txt lists no images" in refusal(source_of, f"cars:{root}")


# ---------------------------------------------------------------- lists with labels


def write_list_data(root, text, file="train.txt"):
    """Three images, one in a folder of the split's name, and a list of this text (or these bytes)."""
    write_images(root, "a b/c d.jpg", "x.jpg", "train/in, split.jpg")
    (root / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    return f"list:{root}"


@pytest.mark.parametrize("text", [
    "a b/c d.jpg 7\nx.jpg 12\nin, split.jpg 7\n", "a b/c d.jpg\t7\nx.jpg\t12\ntrain/in, split.jpg\t7",
    "a b/c d.jpg,7\r\n\r\nx.jpg,12\r\n# one more\r\nin, split.jpg, 7\r\n",
    b"\xef\xbb\xbfpath,label\n" + b'"a b/c d.jpg","7"\n./x.jpg,12\n"in, split.jpg",7',
    "image\tclass\n  a b/c d.jpg\t 7 \nx.jpg\t12\rin, split.jpg  7\r",
])
def test_a_line_of_a_list_is_a_path_and_a_label(tmp_path, text):
    source = source_of(write_list_data(tmp_path, text))
    assert named(source) == {"a b/c d.jpg": "7", "x.jpg": "12", "train/in, split.jpg": "7"}
    assert source.classes == ["7", "12"] and source.open(0).size == (8, 8)


def test_a_label_may_be_a_number_of_any_length_and_hold_doubled_quotes(tmp_path):
    long = "9" * 5000
    assert source_of(write_list_data(tmp_path, f"x.jpg 10\na b/c d.jpg {long}\nin, split.jpg 2")).classes == [
        "2", "10", long]
    assert source_of(write_list_data(tmp_path, 'x.jpg,"a ""b"""\n')).classes == ['a "b"']


@pytest.mark.parametrize("code", ["utf-32", "utf-16"])
def test_a_wide_list_is_called_what_it_is(tmp_path, code):
    said = refusal(source_of, write_list_data(tmp_path, "x.jpg 1".encode(code)))
    assert f"is in {code.upper()}: expected UTF-8; iconv -f {code.upper()} " in said


def test_a_pipe_is_no_list(tmp_path):
    os.mkfifo(tmp_path / "train.txt")
    assert "has train.txt, which is no regular file" in refusal(source_of, f"list:{tmp_path}")


def test_labels_of_a_list_may_be_names_with_spaces_and_commas(tmp_path):
    source = source_of(write_list_data(
        tmp_path, f'a b/c d.jpg,tabby cat\nx.jpg\tmaillot, tank suit\nin, split.jpg,"{DECOMPOSED}, au lait"'))
    assert list(named(source).values()) == ["tabby cat", "maillot, tank suit", f"{COMPOSED}, au lait"]
    assert source.classes == sorted(source.classes) and source.origin == f"{tmp_path}/train.txt"


@pytest.mark.parametrize("line, message", [
    ("b.jpg", "line 3, is b.jpg: expected a path and a label, with a tab, space or comma between them"),
    ("x.jpg\t", "line 3, is x.jpg: expected a path and a label"),
    ("no.jpg 1\nnot.jpg 2", "line 3: no.jpg is no file in {0} or {0}/train (first of 2 such lines); exp"),
    ("label path", "line 3: label is no file in"), ("path label", "line 3: path is no file in"),
    ("x.jpg 1\n./x.jpg 1", "line 4: ./x.jpg is listed in line 3 already; expected each image once"),
    ("a b/c d.jpg 2", "line 3: a b/c d.jpg is listed in line 1 already"),
    ("x.jpg 3 7", "line 3, is x.jpg 3 7: expected two columns"),
    ("x.jpg,3,7", "line 3, is x.jpg,3,7: expected two columns"),
    ("x.jpg\tn01\t0\t62", "line 3, is 'x.jpg\\tn01\\t0\\t62': expected two columns"),
    ("../x.jpg 1", "line 3 is refused: ../x.jpg may lie outside"),
    ("/etc/passwd 1", "line 3 is refused: /etc/passwd is an absolute path; expected a path below"),
    ("sub\\a.png 1", "with / between folders"), ("photo,breed", "a header begins with"),
    ("x.jpg,3,", "and nothing behind it"), ("x.jpg;cat", "space or comma between them, not ;"),
    ("x.jpg|cat", "space or comma between them, not |"),
    ("a b/../../x.jpg\t1", "line 3 is refused: a b/../../x.jpg may"), (".. 1", "line 3 is refused: .. may"),
    ("\x1b[31mred.jpg 1", "line 3: '\\x1b[31mred.jpg' is no file"),
    ("x.jpg\0 1", "line 3: 'x.jpg\\x00' is no file"),
])
def test_a_wrong_line_of_a_list_is_named_by_its_number(tmp_path, line, message):
    spec = write_list_data(tmp_path / "data", f"a b/c d.jpg 1\n\n{line}\n")
    write_images(tmp_path, "x.jpg")
    said = refusal(source_of, spec)
    assert message.format(tmp_path / "data") in said and f"{tmp_path}/data/train.txt, line" in said, said


def test_a_list_that_is_no_list_is_refused(tmp_path):
    assert "has no train.txt: expected train.txt and val.txt" in refusal(source_of, f"list:{tmp_path}")
    assert "nowhere is no folder: expected" in refusal(source_of, f"list:{tmp_path}/nowhere")
    for text in ("", "# no\n", "path label\n"):
        assert "train.txt lists no images: expected" in refusal(source_of, write_list_data(tmp_path, text))
    text = "x.jpg 1\n".encode("utf-16")
    assert "is in UTF-16: expected UTF-8" in refusal(source_of, write_list_data(tmp_path, text))


def test_the_splits_of_a_list_have_trains_classes(tmp_path):
    """Numbers as caffe's lists of ImageNet have them, of paths below the split."""
    write_images(tmp_path, *(f"train/n{i}/{i}.png" for i in range(12)))
    write_images(tmp_path, "val/8.png", "val/11.png", "test/3.png")
    (tmp_path / "train.txt").write_text("".join(f"n{i}/{i}.png {i}\n" for i in range(12)))
    (tmp_path / "val.txt").write_text("8.png 8\n11.png 11\n")
    said = []
    train, val = matched(f"list:{tmp_path}", said.append)
    assert train.classes == val.classes == [str(i) for i in range(12)]
    assert [val.label(i) for i in range(2)] == [8, 11] and val.name(0) == f"{tmp_path}/val/8.png"
    assert said == [f"train: 12 images of 12 classes in {tmp_path}/train.txt",
                    f"val: 2 images of 2 classes in {tmp_path}/val.txt",
                    "warning: val has no images of 0, 1, 10, 2, 3, ... (10); labels are by train's 12 classes"
                    ]
    (tmp_path / "val.txt").rename(tmp_path / "test.txt")
    (tmp_path / "test.txt").write_text("3.png 3\n")
    assert [source_of(f"list:{tmp_path}", "val").name(i) for i in range(1)] == [f"{tmp_path}/test/3.png"]
    (tmp_path / "test.txt").write_text("3.png 12\n")
    assert "val has classes that train has not: 12 (1)" in refusal(matched, f"list:{tmp_path}")
    (tmp_path / "test.txt").unlink()
    alone = source_of(f"list:{tmp_path}", "val", said.append)           # pre-training needs no val
    assert not alone.is_split and len(alone) == 12 and "val: none; 12 images" in said[-1]
    assert "has no val folder: expected train/<class>/*, val/<class>/*, or list:DIR" in refusal(
        matched, f"list:{tmp_path}")


def test_the_lines_of_the_docs_make_lists_of_flat_validation_images(tmp_path, monkeypatch):
    """ILSVRC's layout and Tiny-ImageNet's."""
    ilsvrc, tiny = tmp_path / "CLS-LOC", tmp_path / "tiny-imagenet-200"
    write_images(ilsvrc, "train/n01/n01_1.JPEG", "train/n02/n02_1.JPEG", "val/ILSVRC2012_val_00000001.JPEG")
    (ilsvrc / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00000001,n02 85 1 499 272 n02 1 2 3 4\n")
    write_images(tiny, "train/n01/images/n01_1.JPEG", "train/n02/images/n02_1.JPEG", "val/images/val_0.JPEG")
    (tiny / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t32\t44\t62\n")
    (tiny / "train" / "n01" / "n01_boxes.txt").write_text("n01_1.JPEG\t0\t10\t63\t58\n")
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.S)
    for root, word in ((ilsvrc, "LOC_val"), (tiny, "val_annotations")):
        assert "list:DIR" in refusal(matched, root)
        monkeypatch.chdir(root)
        exec(next(lines for lines in code if word in lines), {})
        train, val = matched(f"list:{root}")
        assert sorted(named(train).values()) == train.classes == ["n01", "n02"]
        assert list(named(val).values()) == ["n02"]


def test_a_path_of_a_list_is_found_in_the_other_unicode_form(tmp_path):
    write_images(tmp_path, f"{DECOMPOSED}.png")
    (tmp_path / "train.txt").write_text(f"{COMPOSED}.png a\n")
    assert source_of(f"list:{tmp_path}").name(0) == f"{tmp_path}/{DECOMPOSED}.png"


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
    assert "is no plain file: expected a text file of" in refusal(subset, photos, Path("/dev/zero"))
    os.mkfifo(tmp_path / "pipe")
    assert "is no plain file: expected a text file of" in refusal(subset, photos, tmp_path / "pipe")
    (tmp_path / "list.txt").write_bytes(bytes(range(256)))
    assert "lists images that the data has not" in refusal(subset, photos, tmp_path / "list.txt")


def test_a_subset_keeps_no_python_object_for_each_image(photos, tmp_path):
    few = subset(photos, write_list(tmp_path, "n01_1.JPEG", "n02_1.JPEG"))
    kept = {name: value for source in (few, photos) for name, value in vars(source).items()}
    many = {name for name, value in kept.items() if isinstance(value, list | dict | set | tuple)}
    assert many == {"classes", "labels"} and all(isinstance(v, np.ndarray) for v in few.labels.values())
    assert photos.paths.dtype.kind == "S" and few.indices.dtype.kind == "i"


# ---------------------------------------------------------------- classes


def of_classes(*names):
    """A source with an image of each class."""
    pixels = np.zeros((len(names), 4, 4, 3), np.uint8)
    return ImageArray(pixels, {"class": np.arange(len(names))}, list(names), "")


def test_labels_are_by_the_list_of_classes_that_is_given_whatever_its_order():
    said = []
    for wanted in (["a", "b"], ["b", "a"], ("b", "a")):
        found = relabel(of_classes("a", "b"), wanted, said.append)
        assert [found.classes[found.label(i)] for i in range(2)] == ["a", "b"] and found.classes == [*wanted]
    assert said == []
    found = relabel(of_classes("b"), ["a", "b", "c"], said.append)
    assert found.classes == ["a", "b", "c"] and found.label(0) == 1
    assert said == ["warning: the data has no images of a, c (2); labels are by the checkpoint's 3 classes"]


def test_classes_that_a_list_has_not_are_refused():
    said = refusal(relabel, of_classes("a", "c"), ["a", "b"], print, "val", "train")
    assert said.startswith("val has classes that train has not: c (1); train has a, b (2); expected no oth")
    said = refusal(relabel, of_classes("x\ny"), ["a"], print)
    assert r"the data has classes that the checkpoint has not: 'x\ny' (1)" in said
    assert "several classes called a (1)" in refusal(relabel, of_classes("a"), ["a", "a"], print)
    assert "label 2 of  1 is outside the 2 classes" in refusal(
        relabel, ImageArray(np.zeros((2, 4, 4, 3), np.uint8), {"class": np.array([0, 2])}, ["a", "b"], ""),
        ["a", "b"], print)


def test_other_labels_of_the_same_images_stay():
    labels = {"shape": np.array([0, 1]), "texture": np.array([1, 0])}
    source = ImageArray(np.zeros((2, 4, 4, 3), np.uint8), labels, ["a", "b"], "")
    found = relabel(source, ["b", "a"], print)
    assert {name: values.tolist() for name, values in found.labels.items()} == {"shape": [1, 0],
                                                                               "texture": [1, 0]}
    assert source.label(0) == 0 and list(found.labels) == ["shape", "texture"]


def test_names_of_cifars_classes_do_not_pass_for_its_numbers(tmp_path):
    write_cifar(tmp_path, "cifar10")
    numbers = source_of(f"cifar10:{tmp_path}").classes
    (tmp_path / "batches.meta.txt").write_text("\n".join(f"z{i}" for i in range(10)))
    assert "the checkpoint has 0, 1, 2, 3, 4, ... (10)" in refusal(
        relabel, source_of(f"cifar10:{tmp_path}"), numbers, print)


@pytest.mark.parametrize("paths", [["train/a.png", "val/a.png"],
                                   ["train/a.png", "train/x/b.png", "val/x/a.png", "val/y.png"]])
def test_images_outside_class_folders_have_no_label(tmp_path, paths):
    write_images(tmp_path, *paths)
    said = refusal(matched, tmp_path)
    assert said.startswith(f"train has images outside class folders, such as {tmp_path}/train/a.png: exp")
    assert "list:DIR" in said and "outside class folders" in refusal(
        relabel, source_of(tmp_path, "val"), ["x"], print)


def test_a_val_without_class_folders_is_told_of_lists(tmp_path):
    """ILSVRC as it is downloaded, and Tiny-ImageNet."""
    write_images(tmp_path, "train/n01/a.png", "train/n02/a.png", "val/ILSVRC2012_val_00000001.png")
    said = refusal(matched, tmp_path)
    assert "val has images outside class folders, such as" in said and "--data list:DIR" in said
    (tmp_path / "val" / "images").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.png").rename(tmp_path / "val" / "images" / "val_0.png")
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.png\tn01\t0\t0\t62\t62\n")
    said = refusal(matched, tmp_path)
    assert "train has not: images (1)" in said and "--data list:DIR" in said and "docs/data.md" in said


def test_folders_that_may_be_val_are_named(tmp_path):
    write_images(tmp_path, *(f"{split}/{name}/0.png" for split in ("train", "val1", "val2") for name in "ab"))
    assert "has no val folder, but val1, val2 (2), which may be meant: rename one val: exp" in refusal(
        matched, str(tmp_path))


def test_one_class_is_nothing_to_tell_apart(tmp_path):
    write_images(tmp_path, "train/x/a.png", "val/x/a.png")
    assert "has one class" in refusal(matched, tmp_path)


# ---------------------------------------------------------------- classes that are absent


def test_a_val_without_some_of_trains_classes_has_trains_labels_and_a_warning(tmp_path):
    write_images(tmp_path, *(f"train/{name}/0.png" for name in "abcd"), "val/b/0.png", "val/d/0.png")
    said = []
    train, val = matched(tmp_path, said.append)
    assert train.classes == val.classes == [*"abcd"] and [val.label(i) for i in range(2)] == [1, 3]
    assert said[2:] == ["warning: val has no images of a, c (2); labels are by train's 4 classes"]


def test_a_class_of_val_alone_is_refused_by_name(tmp_path):
    write_images(tmp_path, "train/a/0.png", "train/b/0.png", "val/a/0.png", "val/z/0.png")
    said = refusal(matched, tmp_path)
    assert "val has classes that train has not: z (1); train has a, b (2); expected no others" in said
    (tmp_path / "val" / "z").rename(tmp_path / "val" / "B")
    said = refusal(matched, tmp_path)
    assert said.endswith("expected the same names, and B and b (1) differ in case alone: rename the folders")


def test_the_way_on_from_a_strange_class_fits_the_data(tmp_path):
    write_list_data(tmp_path, "x.jpg a\na b/c d.jpg b\n")
    for label, way in (("z", "change or remove the lines"), ("B", "change the labels in the list")):
        write_list_data(tmp_path, f"x.jpg {label}\n", "val.txt")
        said = refusal(matched, f"list:{tmp_path}")
        assert way in said and "folders" not in said and "list:DIR" not in said
    write_images(tmp_path / "k", "seg_train/seg_train/a/0.png", "seg_test/seg_test/a/0.png")
    assert "one folder deeper, in seg_train/: move them up" in refusal(matched, tmp_path / "k")


def test_a_class_folder_without_images_is_a_class(tmp_path):
    write_images(tmp_path, "train/a/0.png", "train/c/0.png", "val/a/0.png", "val/b/0.png")
    (tmp_path / "train" / "b").mkdir()
    (tmp_path / "val" / "c").mkdir()
    (tmp_path / "val" / "nothing").mkdir()                              # of no image: no label is lost
    said = []
    train, val = matched(tmp_path, said.append)
    assert train.classes == val.classes == [*"abc"] and [val.label(i) for i in range(2)] == [0, 1]
    assert said[2:] == ["warning: train has no images of b (1); labels are by train's 3 classes",
                        "warning: val has no images of c (1); labels are by train's 3 classes"]


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", ".ipynb_checkpoints", ".thumbnails", "lost+found",
                                  "$RECYCLE.BIN", "~snapshot", "@__thumb", "@tmp", "RECYCLER",
                                  "Network Trash Folder", "CVS"])
def test_what_systems_leave_beside_images_is_no_class_and_holds_no_images(tmp_path, name):
    write_images(tmp_path, *(f"{split}/{path}" for split in ("train", "val") for path in (
        "a/0.png", "b/0.png", f"{name}/0.png", f"{name}/a/0.png", f"a/{name}/0.png/thumb.png")))
    for source in (*matched(tmp_path), source_of(tmp_path / "train")):
        assert source.classes == ["a", "b"] and len(source) == 2


# ---------------------------------------------------------------- names in two Unicode forms


def test_names_that_differ_in_unicode_form_alone_are_the_same_class(tmp_path):
    write_images(tmp_path, f"train/{DECOMPOSED}/0.png", "train/cafz/0.png", f"val/{COMPOSED}/0.png",
                 "val/cafz/0.png")
    train, val = matched(tmp_path)
    assert train.classes == val.classes == ["cafz", COMPOSED]
    assert named(train)[f"{DECOMPOSED}/0.png"] == named(val)[f"{COMPOSED}/0.png"] == COMPOSED
    old = relabel(val, [DECOMPOSED, "cafz"], print)                     # the list of a checkpoint
    assert old.classes == [DECOMPOSED, "cafz"] and sorted(old.label(i) for i in range(2)) == [0, 1]
    few = subset(train, write_list(tmp_path, f"{COMPOSED}/0.png"))
    assert len(few) == 1 and few.classes[few.label(0)] == COMPOSED


def test_two_folders_that_differ_in_unicode_form_alone_are_one_class_and_that_is_said(tmp_path):
    write_images(tmp_path, f"train/{COMPOSED}/0.png", f"train/{DECOMPOSED}/1.png", "train/z/0.png")
    said = []
    train = source_of(tmp_path, say=said.append)
    assert train.classes == [COMPOSED, "z"] and [train.label(i) for i in range(3)].count(0) == 2
    assert "warning: " in said[0] and "differ in Unicode form alone: café (1); they are one class" in said[0]


# ---------------------------------------------------------------- splits of other names


def write_splits(root, *splits):
    """Class folders a and b in each split; the image of a split is named for it."""
    write_images(root, *(f"{split}/{name}/{Path(split).name}.png" for split in splits for name in "ab"))
    return root


@pytest.mark.parametrize("splits, train, val", [
    (["training", "validation", "testing"], "training", "validation"), (["Train", "Val"], "Train", "Val"),
    (["TRAIN", "TEST"], "TRAIN", "TEST"), (["train", "valid", "test"], "train", "valid"),
    (["train", "dev"], "train", "dev"), (["train", "test"], "train", "test"),
    (["train", "val", "validation", "Train"], "train", "val"),
    (["train2017", "val2017", "test2017", "annotations"], "train2017", "val2017"),
    (["cars_train", "cars_test", "devkit"], "cars_train", "cars_test"),
    (["trainval", "test"], "trainval", "test"), (["trainingset", "testset"], "trainingset", "testset"),
    (["training", "validationset"], "training", "validationset"), (["trn", "tst"], "trn", "tst"),
    (["ImagesTrain", "ImagesTest"], "ImagesTrain", "ImagesTest"),
    (["training", "holdout"], "training", "holdout"), (["TrainingSet", "TestSet"], "TrainingSet", "TestSet"),
    (["training_set", "test_set"], "training_set", "test_set"),
])
def test_splits_of_other_names_are_found_and_named(tmp_path, splits, train, val):
    said = []
    sources = [source_of(write_splits(tmp_path, *splits), split, said.append) for split in ("train", "val")]
    for source, folder in zip(sources, (train, val), strict=True):
        assert {Path(source.name(i)).stem for i in range(len(source))} == {folder} and source.is_split
    assert said == [f"train: 2 images of 2 classes in {tmp_path}/{train}",
                    f"val: 2 images of 2 classes in {tmp_path}/{val}"]


@pytest.mark.parametrize("splits, parts", [
    (["Train", "Training", "Test"], ["has Train/ and Training/ and no train/", "not clear"]),
    (["validation", "testing"], ["testing/, validation/ but no train/", "images alone"]),
    (["val", "a"], ["val/ but no train/"]), (["test"], ["test/ but no train/", "its own path"]),
    (["trainA", "testA", "trainB", "testB"], ["several folders that look like splits", "trainB/"]),
    (["training_images", "validation"], ["several folders that look like splits"]),
    (["bottle/train", "bottle/test", "cable/train"], ["further down: bottle/test, bottle/train", "links"]),
    (["data/tiny/train", "data/tiny/val"], ["only further down: data/tiny/train", "give --data"]),
])
def test_splits_that_are_not_clear_are_refused(tmp_path, splits, parts):
    said = refusal(source_of, write_splits(tmp_path, *splits))
    assert all(part in said for part in parts), said


@pytest.mark.parametrize("names", [["cat", "dog"], ["valid", "invalid"], ["bus", "test_tube", "bullet_train"],
                                   ["Bus", "Train"], ["dev", "cat"]])
def test_classes_whose_names_look_like_a_split_are_classes(tmp_path, names):
    said = []
    assert source_of(write_splits(tmp_path, *names), say=said.append).classes == sorted(names)
    assert said[-1] == f"train: {2 * len(names)} images of {len(names)} classes in {tmp_path}"
    trains = [name for name in names if "train" in name.lower()]
    assert [line.startswith(f"warning: {tmp_path} has {trains[0]} (1), read as a class")
            for line in said[:-1]] == [True] * len(trains)
    said.clear()
    source_of(tmp_path, "val", said.append)
    assert len(said) == 1 and said[0].startswith("val: none; ")


def test_splits_that_no_word_tells_are_warned_of(tmp_path):
    said = []
    source_of(write_splits(tmp_path, "imagestrain", "imagestest"), say=said.append)
    assert said[0].startswith(f"warning: {tmp_path} has imagestrain (1), read as a class")
    source_of(write_splits(tmp_path, *"abcdef"), say=said.append)       # one of many folders is a class
    assert len(said) == 3


def test_val_has_no_clear_folder_where_two_may_be_meant(tmp_path):
    root = write_splits(tmp_path, "train", "valid", "dev")
    assert len(source_of(root)) == 2
    assert "it is not clear which is meant" in refusal(source_of, root, "val")


@pytest.mark.parametrize("spec", ["{}", "cifar10:{}", "list:{}", "cars:{}"])
def test_a_home_folder_is_found_behind_a_colon(tmp_path, monkeypatch, spec):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_images(tmp_path / "data", "train/a/0.png", "train/b/0.png")
    (tmp_path / "data" / "train.txt").write_text("a/0.png a\nb/0.png b\n")
    write_cifar(tmp_path / "data", "cifar10")
    assert len(source_of(spec.format("~/data"))) == len(source_of(spec.format(tmp_path / "data"))) > 1


def test_names_in_messages_stay_on_one_line():
    assert listed(["b", "a\nb", "c"]) == r"'a\nb', b, c (3)" and listed([]) == "none"
    assert listed(map(str, range(7))) == "0, 1, 2, 3, 4, ... (7)"


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse", "huge"])
def test_a_list_that_would_never_end_is_refused_unread(tmp_path, kind):
    write_images(tmp_path / "train" / "a", "x.jpg")
    path = tmp_path / "list.txt"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 2 ** 40 if kind == "huge" else 2 ** 20)
    said = refusal(subset, source_of(tmp_path), path)
    assert f"the list {path} " in said and "expected a text file" in said


def test_a_run_among_class_folders_is_no_class_and_another_config_is_one(tmp_path):
    write_images(tmp_path / "a", "x.jpg")
    write_images(tmp_path / "runs" / "one", "reconstruction.png")
    write_images(tmp_path / "b", "config.json.png")
    (tmp_path / "b" / "config.json").touch()                            # some data sets have one
    for name in ("config.json", "env.json"):
        (tmp_path / "runs" / "one" / name).touch()
    said = []
    source = source_of(tmp_path, say=said.append)
    assert source.classes == ["a", "b"] and len(source) == 2
    assert "runs (1) left out" in said[0]


def test_a_run_in_the_place_of_a_split_is_no_split(tmp_path):
    for name in ("Training", "Testing"):
        write_images(tmp_path / name / "a", "x.jpg")
    write_images(tmp_path / "train", "reconstruction.png")              # a run, in the place of a split
    for name in ("config.json", "env.json"):
        (tmp_path / "train" / name).touch()
    assert source_of(tmp_path).root == tmp_path / "Training"
