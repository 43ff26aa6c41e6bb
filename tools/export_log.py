"""The log of a run for TensorBoard or Weights & Biases, with the user's package. The stages know neither.

    python -m tools.export_log runs/mff --to tensorboard            into runs/mff/tensorboard
    python -m tools.export_log runs/mff --to wandb --project mff    as the login of the wandb package says

Each number of a line of log.jsonl becomes a scalar of its step, each fusion weight is one too, and the
pictures are images. While the run goes on, the export waits for more lines; --no-follow ends it at once.
"""

import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mff_data.decode import DECODE_ERRORS, MAX_PIXELS, open_pillow
from mff_min.config import REQUIRED, check_ranges, knob, opt, parse
from mff_min.errors import UserError
from mff_run.files import check_regular, is_held, make_folder
from mff_run.jsonfile import is_number, read_json
from mff_run.log import each_line, step_of
from mff_run.process import run
from tools.records import CONFIG, Run
from tools.report import PICTURE

# Packages that write its events, and the module of SummaryWriter for each.
TENSORBOARD = {"tensorboard": "torch.utils.tensorboard", "tensorboardX": "tensorboardX"}


@dataclass(frozen=True)
class Config:
    # these change what is written
    run: str = opt(REQUIRED, "the folder of a run")
    to: str = opt("tensorboard", "whose format", choices=["tensorboard", "wandb"])
    project: str = opt("mff_min", "of wandb")

    # these change only how
    output_dir: str = knob("", "folder of what is written; not given: RUN/tensorboard or RUN/wandb")
    follow: bool = knob(True, "wait for more lines while the run goes on")
    every: float = knob(30.0, "seconds between two looks at such a run", least=1, most=86_400)


class TensorBoard:
    """A folder of events, which replace those of an earlier export in RUN/tensorboard."""

    def __init__(self, cfg, folder, config):
        if not (name := next(filter(importlib.util.find_spec, TENSORBOARD), None)):
            raise UserError("neither tensorboard nor tensorboardX is installed: expected one of them, so run "
                            "pip install tensorboard")
        make_folder("--output-dir", folder)
        old = sorted(folder.glob("events.out.tfevents.*"))
        if old and cfg.output_dir:
            raise UserError(f"--output-dir {folder} holds {old[0].name}: expected no events, which would be "
                            f"shown twice; remove them, or name another folder")
        for path in old:
            path.unlink()
        self.writer = importlib.import_module(TENSORBOARD[name]).SummaryWriter(str(folder))

    def write(self, step, values, image):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        if image is not None:
            self.writer.add_image("picture", image, step, dataformats="HWC")

    def close(self):
        self.writer.close()


class Wandb:
    """A run of wandb by the name of the folder; a second export goes on with it."""

    def __init__(self, cfg, folder, config):
        if not importlib.util.find_spec("wandb"):
            raise UserError("wandb is not installed: expected it, so run pip install wandb, and wandb login")
        import wandb
        make_folder("--output-dir", folder)
        name = Path(cfg.run).resolve().name
        self.wandb = wandb
        self.run = wandb.init(project=cfg.project, name=name, id=name, resume="allow", config=config,
                              dir=str(folder))
        self.start = self.run.step                                      # the first that it does not have

    def write(self, step, values, image):
        if image is not None:
            values = values | {"picture": self.wandb.Image(image)}
        if step >= self.start and values:
            self.run.log(values, step=step)

    def close(self):
        self.run.finish()


def scalars(line, names):
    """{name: number} of a line of the log; names are those of the fusion weights."""
    found = {}
    for name, value in line.items():
        if name == "fusion_weights" and isinstance(value, list):
            value = {names[i] if i < len(names) else f"level {i}": each for i, each in enumerate(value)}
        nested = value if isinstance(value, dict) else {"": value}
        found |= {f"{name}/{key}" if key else name: each for key, each in nested.items()
                  if is_number(each) and name != "step"}
    return found


def pictures_of(folder):
    """{path: step} of a run's pictures of its steps."""
    found = ((path, PICTURE.fullmatch(path.name)) for path in folder.glob("*.png"))
    return {path: int(match[1]) for path, match in found if match and match[1]}


def read_picture(path):
    """A picture as an array of RGB, or None, and a line, where it cannot be read."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            return np.asarray(open_pillow(file, MAX_PIXELS).convert("RGB"))
    except (UserError, *DECODE_ERRORS) as error:
        print(f"warning: {path} cannot be read and is left out: {error}")
    return None


def main(cfg):
    """Write what the run has, and what it gets while it goes on; returns how many lines were written."""
    check_ranges(cfg)
    folder = Path(cfg.run)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no folder of a run: expected config.json in it; name the --output-dir "
                        f"of a stage")
    config = read_json(folder / "config.json", CONFIG)
    going = cfg.follow and is_held(folder)
    if not going and not any(True for _ in each_line(folder / "log.jsonl")):
        raise UserError(f"{folder} has no line in log.jsonl: expected one; train it first")
    names = []
    if config.get("model"):
        names = [f"block {block}" for block in Run("", folder, config, [], {}).fusion_weights()[1]]
    target = Path(cfg.output_dir or folder / cfg.to)
    sink = {"tensorboard": TensorBoard, "wandb": Wandb}[cfg.to](cfg, target, config)
    lines, pictures = 0, set()
    try:
        while True:
            going = cfg.follow and is_held(folder)                      # before the lines that it may add
            log = list(each_line(folder / "log.jsonl"))
            events = [(step, scalars(line, names), None) for line in log[min(lines, len(log)):]
                      if (step := step_of(line)) is not None]
            images = pictures_of(folder)
            events += [(step, {}, path) for path, step in images.items() if path not in pictures]
            for step, values, path in sorted(events, key=lambda event: event[0]):
                sink.write(step, values, read_picture(path) if path else None)
            lines, pictures = len(log), pictures | set(images)
            if not going:
                break
            time.sleep(cfg.every)
    finally:
        sink.close()
    print(f"{lines} lines and {len(pictures)} pictures of {folder}: {target}")
    return lines


if __name__ == "__main__":
    run(main, parse(Config))
