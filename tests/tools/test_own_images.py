"""Images of several folders and single ones: which they are, what they are called, and which are refused."""

import os

import pytest
from images import noise_image
from PIL import Image

from mff_data.decode import AS_THEY_ARE
from mff_min.errors import UserError
from tools.own_images import OwnImages, check_folder, list_images, write_picture


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """a/1.png, a/b/2.jpg and c/1.png; their folder is where we are."""
    for name in ("a/1.png", "a/b/2.jpg", "c/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(9, 9).save(tmp_path / name)
    (tmp_path / "a/notes.txt").write_text("none")
    monkeypatch.chdir(tmp_path)
    return tmp_path


ALL = ["a/1.png", "a/b/2.jpg", "c/1.png"]


@pytest.mark.parametrize("given, root, names", [
    (["a"], "a", ["1.png", "b/2.jpg"]), (["a/b/2.jpg"], "a/b", ["2.jpg"]), (["."], ".", ALL),
    (["a/b/2.jpg", "c/1.png"], ".", ALL[1:]), (["c", "a"], ".", ALL), (["a/1.png"] * 2, "a", ["1.png"]),
    (["a", "a/1.png", "./a/1.png"], "a", ["1.png", "b/2.jpg"]),
])
def test_images_are_named_below_the_folder_that_they_share(photos, given, root, names):
    found, folder, places = list_images(*given)
    assert found == names and folder.resolve() == (photos / root).resolve()
    assert all((folder / name).is_file() for name in found)
    folders = [os.path.realpath(each) for each in given if os.path.isdir(each)]
    assert places >= set(folders) and bool(places) == bool(folders)


def test_what_is_written_for_two_images_has_no_one_name(photos):
    noise_image(9, 9).save("a/1.jpg")
    with pytest.raises(UserError, match="differ in their endings alone: 1.jpg, 1.png"):
        list_images("a")
    assert list_images("a", unique=False)[0] == ["1.jpg", "1.png", "b/2.jpg"]
    for given, message in ((["a", "x"], "x does not exist: expected a folder of images, or images"),
                           (["/dev/null"], "/dev/null is neither a file nor a folder: expected"),
                           (["c", "empty"], "empty holds no images"),
                           (["9" * 5000], "images 9.* cannot be read: File name too long")):
        (photos / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=message):
            list_images(*given)


def test_pictures_are_written_to_a_new_folder_outside_of_the_images(photos):
    _, _, places = list_images("a", "c")
    check_folder("out", places)
    for out in ("a", "a/new", "c/b/new"):
        with pytest.raises(UserError, match="not an empty folder|expected another folder to write"):
            check_folder(out, places)
    write_picture("out", "b/2.jpg", Image.new("L", (3, 4)))
    assert Image.open("out/b/2.png").size == (3, 4)


def test_every_image_that_can_be_read_is_seen_once_with_its_number(photos):
    (photos / "a/1.png").write_bytes(b"no")
    said, paths = [], list_images(".")[0]
    progress = type("", (), dict(tick=lambda self, done: None, say=lambda self, text: said.append(text)))()
    images = OwnImages(".", paths, AS_THEY_ARE, progress)
    assert [(i, name) for i, name, _ in images.each(lambda image: image.size)] == [(1, "a/b/2.jpg"),
                                                                                   (2, "c/1.png")]
    assert images.bad == {"a/1.png": "not an image"} and images.counted == "2 of 3 images"
    assert said == ["warning: a/1.png cannot be read (not an image)"]

    def refuse(image):
        raise ValueError("it is too green")
    with pytest.raises(UserError, match="none of the 3 images in . can be read: the first is a/1.png"):
        list(OwnImages(".", paths, AS_THEY_ARE, progress).each(refuse))
