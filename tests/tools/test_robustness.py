"""ImageNet-A, -R, -Sketch and -C: which logit is meant, published metrics, and folders that do not fit."""

import re

import pytest
import torch
from PIL import Image

from mff_data.crops import CROPS
from mff_data.views import Views
from mff_min.errors import UserError
from mff_min.probe import count_hits
from tools.robustness import ALEXNET, PUBLISHED, SEVERITIES, open_robustness, summarise, table

CLASSES = ["n04", "n07", "n01", "n05", "n03", "n06", "n02"]             # not in the folders' order
FOLDERS = ["n01", "n02", "n03", "n04", "n05"]
CORRUPTIONS = {name: error for group in ALEXNET.values() for name, error in group.items()}


def write_classes(folder, names=FOLDERS):
    """Two images of 8 x 8 in each class folder; their colour is the number of the class."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (int(name[1:]), 0, 0)).save(folder / name / f"{i}.png")
    return folder


def write_corruptions(folder, groups=True, without=()):
    for group, corruptions in ALEXNET.items():
        for name in corruptions:
            for severity in SEVERITIES:
                if f"{name}/{severity}" not in without:
                    write_classes(folder / group / name / str(severity) if groups else
                                  folder / name / str(severity), FOLDERS[:2])
    return folder


def stub(images, wrong=()):
    """Logits (B, 7), by CLASSES, of a model that knows classes by their colour, but says n07 of the wrong."""
    names = [f"n{int(image[0, 0, 0]):02d}" for image in images]
    logits = torch.zeros(len(names), len(CLASSES))
    for i, name in enumerate(names):
        logits[i, CLASSES.index(name)] = 1
        logits[i, CLASSES.index("n07")] = 2 if name in wrong else 0
    return logits


def measure(found, wrong=()):
    """Counts of one set, as a stage counts them."""
    views = Views(found.source, found.crop, (8, 8), 3, 1, seed=0)
    items = [views[0, i] for i in range(len(found.source))]
    logits = stub([item["image"] for item in items], wrong)
    return count_hits(logits[:, found.columns], torch.tensor([item["label"] for item in items]))


def refusal(*arguments):
    with pytest.raises(UserError) as error:
        open_robustness(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- which logit is meant


@pytest.mark.parametrize("kind", ["imagenet-a", "imagenet-r", "imagenet-sketch"])
def test_a_folders_name_says_which_logit_it_is(tmp_path, kind):
    found, = open_robustness(f"{kind}:{write_classes(tmp_path)}", CLASSES)
    assert found.name == kind and found.crop == "evaluation" and found.source.classes == FOLDERS
    assert found.columns.dtype == torch.int64 and found.columns.tolist()[:5] == [2, 6, 4, 0, 3]
    assert measure(found) == [10, 10, 10]
    metrics = summarise(kind, {kind: measure(found)})
    assert metrics["acc1"] == 100 and metrics["val_images"] == 10


def test_the_order_of_the_checkpoints_classes_matters(tmp_path):
    found, = open_robustness(f"imagenet-a:{write_classes(tmp_path)}", sorted(CLASSES))
    assert measure(found)[1] < 10                                       # the stub's logits have another order


@pytest.mark.parametrize("kind, hits", [("imagenet-a", 10), ("imagenet-r", 10), ("imagenet-sketch", 6)])
def test_logits_of_classes_without_a_folder_compete_only_where_published_so(tmp_path, kind, hits):
    found, = open_robustness(f"{kind}:{write_classes(tmp_path)}", CLASSES)
    assert measure(found, wrong=("n01", "n04"))[1] == hits
    assert sorted(found.columns.tolist()) == ([0, 2, 3, 4, 6] if hits == 10 else list(range(7)))


@pytest.mark.parametrize("groups", [True, False])
def test_imagenet_c_is_found_with_and_without_the_folders_of_its_groups(tmp_path, groups):
    write_corruptions(tmp_path, groups)
    write_classes(tmp_path / "extra" / "spatter" / "1")
    sets = open_robustness(f"imagenet-c:{tmp_path}", CLASSES)
    assert [found.name for found in sets] == [f"{name}/{i}" for name in CORRUPTIONS for i in range(1, 6)]
    assert len(sets) == 75 and {found.crop for found in sets} == {"center"}
    assert measure(sets[0]) == [4, 4, 4] and measure(sets[-1], wrong=("n01",)) == [4, 2, 4]


def test_images_of_the_crops_own_size_stay_as_they_are_in_imagenet_c(tmp_path):
    write_corruptions(tmp_path)
    found = open_robustness(f"imagenet-c:{tmp_path}", CLASSES)[0]
    image = Image.effect_noise((32, 32), 80).convert("RGB")
    assert CROPS[found.crop](image, (32, 32)).tobytes() == image.tobytes()
    assert CROPS["evaluation"](image, (32, 32)).tobytes() != image.tobytes()


# ---------------------------------------------------------------- metrics


def alexnets(scale=1.0):
    """Counts of a model with AlexNet's mean errors times scale, spread unevenly over the severities."""
    images = 10 ** 6
    return {f"{name}/{i}": (images, images - round(images * error * scale) + (i - 3) * 1000, images)
            for name, error in CORRUPTIONS.items() for i in SEVERITIES}


def test_alexnets_own_errors_give_an_mce_of_100():
    assert len(CORRUPTIONS) == 15
    metrics = summarise("imagenet-c", alexnets())
    assert metrics["mce"] == pytest.approx(100, abs=1e-9) and metrics["missing"] == []
    assert list(metrics["ce"]) == list(CORRUPTIONS)
    assert all(ce == pytest.approx(100, abs=1e-9) for ce in metrics["ce"].values())
    assert summarise("imagenet-c", alexnets(0.5))["mce"] == pytest.approx(50, abs=1e-4)


def test_each_corruption_weighs_the_same_however_hard_it_is():
    counts = alexnets() | {f"brightness/{i}": (10 ** 6, 10 ** 6, 10 ** 6) for i in SEVERITIES}
    metrics = summarise("imagenet-c", counts)
    assert metrics["ce"]["brightness"] == 0 and metrics["mce"] == pytest.approx(100 * 14 / 15)
    assert metrics["sets"]["brightness/1"]["acc1"] == 100


def test_a_partial_tree_has_errors_of_whole_corruptions_and_no_mce(tmp_path):
    without = ["fog/2", "fog/5", *(f"snow/{i}" for i in SEVERITIES)]
    sets = open_robustness(f"imagenet-c:{write_corruptions(tmp_path, without=without)}", CLASSES)
    assert len(sets) == 68
    metrics = summarise("imagenet-c", {found.name: (2, 1, 2) for found in sets})
    assert metrics["mce"] is None and sorted(metrics["missing"]) == sorted(without)
    assert set(CORRUPTIONS) - set(metrics["ce"]) == {"fog", "snow"} and len(metrics["sets"]) == 68
    assert metrics["ce"]["frost"] == pytest.approx(100 * 0.5 / CORRUPTIONS["frost"])
    text = table("imagenet-c", metrics)
    assert "no mCE without fog/2, fog/5, snow/1, snow/2, snow/3, ... (7)" in text
    assert re.search(r"imagenet-c, mCE % +not run +51.7\n", text)


def test_the_published_number_stands_in_a_column_of_its_own():
    assert PUBLISHED == {"imagenet-a": 35.9, "imagenet-r": 48.3, "imagenet-sketch": 34.5, "imagenet-c": 51.7}
    head, row = table("imagenet-r", summarise("imagenet-r", {"imagenet-r": (8, 1, 8)})).splitlines()
    assert re.fullmatch(r" +here +published, MAE ViT-B", head)
    assert re.fullmatch(r"imagenet-r, acc1 % +12\.5 +48\.3", row) and len(row) == len(head)
    lines = table("imagenet-c", summarise("imagenet-c", alexnets())).splitlines()
    assert len(lines) == 17 and len({len(line) for line in lines}) == 1
    assert re.fullmatch(r"fog, CE % +100\.0 +-", lines[10])
    assert re.fullmatch(r"imagenet-c, mCE % +100\.0 +51\.7", lines[-1])


# ---------------------------------------------------------------- what is refused


def test_the_first_five_folders_that_the_checkpoint_does_not_know_are_named(tmp_path):
    write_classes(tmp_path, [*FOLDERS, *(f"n{i}" for i in range(91, 98))])
    said = refusal(f"imagenet-r:{tmp_path}", CLASSES)
    assert "classes that the checkpoint has not: n91, n92, n93, n94, n95, ... (7); it has n01, n02" in said


@pytest.mark.parametrize("spec, message", [
    ("imagenet-a", "--robustness imagenet-a: expected NAME:DIR with a NAME of imagenet-a, imagenet-r, "),
    ("imagenet-a:", "expected NAME:DIR"), ("imagenet-v2:DIR", "--robustness imagenet-v2:"),
    ("imagenet-a:DIR/nowhere", "nowhere does not exist"), ("imagenet-a:DIR/empty", "holds no images"),
    ("imagenet-sketch:DIR/flat", "flat has images outside class folders"),
    ("imagenet-c:DIR/flat", "has no corruptions: expected noise/gaussian_noise/1/<class>/*"),
    ("imagenet-c:DIR/c", "c/snow/1 has classes that the checkpoint has not: n08 (1)"),
])
def test_folders_that_are_none_of_these_sets_are_refused(tmp_path, spec, message):
    (tmp_path / "empty").mkdir()
    write_classes(tmp_path / "flat")
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "0.png")
    write_classes(tmp_path / "c" / "snow" / "1", ["n08"])
    assert message in refusal(spec.replace("DIR", str(tmp_path)), CLASSES)
