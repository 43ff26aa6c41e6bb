"""TensorBoard and wandb get every number of log.jsonl, also of a run that goes on; so does a watched page."""

import fcntl
import json
import struct
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from faults.suite import fork
from test_report import line_of, make_run

from mff_min.config import parse
from mff_min.errors import UserError
from mff_run.log import read_log
from tools import export_log, watch

EVALUATION = dict(step=2, epoch=0.04, val_images=40, acc1=50.5, iou={"cat": 1.5, "a dog": 2.5})


def export(folder, *flags):
    return export_log.main(parse(export_log.Config, [str(folder), *flags]))


def events_of(folder):
    """[(step, tag, value)] of TensorBoard's events in a folder: records of length, sum, data and sum."""
    proto = pytest.importorskip("tensorboardX.proto.event_pb2")
    path, = folder.glob("events.out.tfevents.*")
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        length, = struct.unpack_from("<Q", data, at)
        event = proto.Event.FromString(data[at + 12:at + 12 + length])
        at += 16 + length
        for value in event.summary.value:
            size = value.image.width, value.image.height
            number = size if value.HasField("image") else value.simple_value
            found.append((event.step, value.tag, number))
    return found


def test_tensorboard_gets_every_number_and_picture_of_the_log(tmp_path):
    pytest.importorskip("tensorboardX")
    lines = [line_of(1), line_of(2), EVALUATION, line_of(3, loss=float("nan"))]
    folder = make_run(tmp_path / "a", lines, pictures=(0, 2))
    assert export(folder, "--to", "tensorboard") == 4
    found = events_of(folder / "tensorboard")
    want = [(line["step"], key, np.float32(value)) for line in lines for key, value in line.items()
            if isinstance(value, int | float) and value == value and key != "step"]
    want += [(line["step"], f"fusion_weights/block {block}", np.float32(weight)) for line in lines
             for block, weight in zip((0, 2, 4, 6, 8, 11), line.get("fusion_weights", ()), strict=False)]
    want = [(step, tag.replace(" ", "_"), float(value)) for step, tag, value in want]
    want += [(2, "iou/cat", 1.5), (2, "iou/a_dog", 2.5), (0, "picture", (300, 200)),
             (2, "picture", (300, 200))]
    assert sorted(map(str, found)) == sorted(map(str, want))

    export(folder, "--to", "tensorboard")                               # replaces the first
    assert events_of(folder / "tensorboard") == found
    with pytest.raises(UserError, match="expected no events"):
        export(folder, "--output-dir", str(folder / "tensorboard"))


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package wandb: what init was given, and what was logged."""
    module, logged = ModuleType("wandb"), []
    module.__spec__, module.logged, module.begun, module.first = SimpleNamespace(), logged, [], 0

    def init(**given):
        module.begun.append(given)
        return SimpleNamespace(step=module.first, finish=lambda: logged.append("finished"),
                               log=lambda values, step: logged.append((step, values)))
    module.init, module.Image = init, lambda array: array.shape
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_the_log_in_the_order_of_steps_and_goes_on_where_it_ended(tmp_path, wandb):
    folder = make_run(tmp_path / "a", [line_of(1), line_of(2), EVALUATION], pictures=(0, 2))
    export(folder, "--to", "wandb", "--project", "p")
    assert wandb.begun[0]["project"] == "p" and wandb.begun[0]["id"] == "a"
    assert [entry[0] for entry in wandb.logged] == [0, 1, 2, 2, 2, "f"]         # finished
    assert wandb.logged[0] == (0, {"picture": (200, 300, 3)})
    assert wandb.logged[1][1]["loss"] == line_of(1)["loss"]
    assert wandb.logged[3][1] == {"epoch": 0.04, "val_images": 40, "acc1": 50.5, "iou/cat": 1.5,
                                  "iou/a dog": 2.5}
    wandb.logged.clear()
    wandb.first = 2
    export(folder, "--to", "wandb")
    assert [entry[0] for entry in wandb.logged[:-1]] == [2, 2, 2]


def test_a_run_that_goes_on_is_followed_to_its_end(tmp_path, wandb):
    folder = make_run(tmp_path / "a", [line_of(1), '{"step": 2, "lo'])
    ready, go = tmp_path / "ready", tmp_path / "go"

    def train():
        with open(folder / "run.lock", "w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            ready.touch()
            while not go.exists():
                time.sleep(0.02)
            (folder / "log.jsonl").write_text("".join(json.dumps(line_of(step)) + "\n" for step in (1, 2, 3)))
    thread = threading.Thread(target=lambda: fork(train))
    thread.start()
    while not ready.exists():
        time.sleep(0.02)
    threading.Timer(0.5, go.touch).start()
    assert export(folder, "--to", "wandb", "--every", "1") == 3
    thread.join()
    assert [entry[0] for entry in wandb.logged[:-1]] == [1, 2, 3]


def test_an_export_that_is_not_possible_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no folder of a run: expected config.json"):
        export(tmp_path)
    with pytest.raises(UserError, match="no line in log.jsonl: expected one"):
        export(make_run(tmp_path / "empty", []))
    folder = make_run(tmp_path / "a", [line_of(1)])
    monkeypatch.setattr(export_log.importlib.util, "find_spec", lambda name: None)
    for to, words in (("tensorboard", "pip install tensorboard"), ("wandb", "pip install wandb")):
        with pytest.raises(UserError, match=words):
            export(folder, "--to", to)


def test_a_watched_page_is_written_until_no_run_goes_on(tmp_path, capsys):
    folder = make_run(tmp_path / "a", [line_of(1)])
    ready, go, page = tmp_path / "ready", tmp_path / "go", folder / "report.html"

    def train():
        with open(folder / "run.lock", "w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            ready.touch()
            while not go.exists():
                time.sleep(0.02)
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps(line_of(100)) + "\n")
    thread = threading.Thread(target=lambda: fork(train))
    thread.start()
    while not ready.exists():
        time.sleep(0.02)
    seen = []

    def look():
        while not page.exists():
            time.sleep(0.02)
        seen.append(page.read_text())
        go.touch()
    threading.Thread(target=look).start()
    assert watch.main(parse(watch.Config, [str(folder), "--every", "1"])) == page
    thread.join()
    assert '<meta http-equiv="refresh" content="1">' in seen[0] and "Running: step 1 of 100" in seen[0]
    assert "http-equiv=\"refresh\"" not in page.read_text() and "step 100 of 100" in page.read_text()
    said = capsys.readouterr().out
    assert said.count("open it in a browser") == 1 and "no run goes on" in said
    assert read_log(folder / "log.jsonl")[-1]["step"] == 100
