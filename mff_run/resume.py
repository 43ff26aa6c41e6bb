"""What a run goes on from: its folder, its settings, its newest sound checkpoint.

A run is a folder: config.json, env.json, log.jsonl, last.pt and previous.pt, encoder.pt, pictures, run.lock.
How these files are written, so that no fault leaves half of one: files.py.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path

import torch

from mff_min.config import check_reachable
from mff_min.errors import Fault, UserError, printable
from mff_run import files
from mff_run.files import check_lock, seal_of, write_tensors
from mff_run.jsonfile import read_json
from mff_run.log import read_log, step_of
from mff_run.sharded import gathered, local
from mff_run.state import is_like, read_state
from mff_run.world import describe_environment

# ---------------------------------------------------------------- checkpoints


def save_run(folder, world, model, step, hint, **state):
    """Write last.pt, all that a run needs to go on from this step, on rank 0; all ranks call this together.

    state holds the other entries of RUN_STATE in state.py, and what else the stage needs. What is sharded is
    written whole. Raises Fault on every rank, with the hint, where a weight is not finite.
    """
    broken = not all(local(parameter).isfinite().all() for parameter in model.parameters())
    if world.max(int(broken)):
        raise Fault(f"weights are not finite at step {step} and are not saved; {hint}")
    state = gathered({"model": model.state_dict(), "step": step, **state}, world.is_main)
    if world.is_main:
        check_lock(folder, world)
        save_checkpoint(folder, state)
    world.barrier()                                                     # a save may outlast --timeout


def resumed_state(cfg, world):
    """The state that a stage goes on from, the same on all ranks, or None for a new run.

    From here on the folder, if there is one, is this run's alone. The state's "path" is where it comes from.
    Raises UserError where the folder is another's, or the run would go on with other settings.
    """
    claim(cfg.output_dir, world)
    state = None
    if cfg.resume:
        state = find_checkpoint(cfg.output_dir, cfg.resume, world.say)
        if not state:
            check_nothing_lost(cfg.output_dir, cfg.save_every)
    elif traces_of(cfg.output_dir):
        raise UserError(already_a_run(cfg))
    if state:
        check_same_settings(cfg, state["config"])
    if len(set(world.all_gather(state["step"] if state else 0))) > 1:
        raise UserError(f"the processes would resume from different steps: --output-dir {cfg.output_dir} "
                        f"must be one folder that all hosts see")
    return state


def claim(folder, world):
    """Keep a run folder, where there is one, to this run until it ends. UserError where another has it."""
    check_reachable("--output-dir", folder)
    if world.is_main and os.path.isdir(folder):
        try:
            world.held.append(files.lock(folder, world.say))
        except OSError as error:
            raise UserError(f"--output-dir {folder} cannot be written: {error.strerror}") from None


def settings_of_result(cfg):
    """The names of a configuration's settings that change the result."""
    return [field.name for field in dataclasses.fields(cfg) if field.metadata["changes_result"]]


def already_a_run(cfg):
    """What to say of a folder that holds a run already, with what differs from its settings."""
    changes, began = [], ""
    with contextlib.suppress(UserError):
        saved = read_json(Path(cfg.output_dir) / "config.json")
        changes = changed_settings(saved, dataclasses.asdict(cfg), settings_of_result(cfg))
        began = began_with(cfg, saved) if changes else ""
    table = f", of other settings:\n{table_of(changes)}\n" if changes else ": "
    return (f"{cfg.output_dir} already holds a run{table}add --resume auto to go on with it{began}, or name "
            f"another --output-dir")


def began_with(cfg, saved):
    """The flag to add where a run of these saved settings began with the other of --small and --no-small."""
    small = bool(saved.get("small"))                                    # it may be older than the flag
    if small == getattr(cfg, "small", small):
        return ""
    return f" (the run began with {'--small' if small else '--no-small'}: add it)"


def check_same_settings(cfg, saved, data=()):
    """Raise UserError when a resumed run would go on with other settings than it began with, and show them.

    saved is the checkpoint's config; data is what check_same_data found. --allow-change names, separated by
    commas, those that may differ.
    """
    known = settings_of_result(cfg)
    for field in dataclasses.fields(cfg):                               # it may be older than a flag
        before = getattr(cfg, field.name) if field.default is None else field.default
        saved = {field.name: before} | saved
    allowed = [name.strip().replace("-", "_") for name in cfg.allow_change.split(",") if name.strip()]
    for name in allowed:
        if name not in known:
            raise UserError(f"--allow-change {name}: expected names of settings, such as {known[0]}")
    changes = [change for change in (*changed_settings(saved, dataclasses.asdict(cfg), known), *data)
               if change[0] not in allowed]
    if changes:
        names = ",".join(dict.fromkeys(name for name, *_ in changes))
        raise UserError(f"the run to resume began with other settings:\n{table_of(changes)}\n"
                        f"give the same flags again{began_with(cfg, saved)}, or --allow-change {names}")


def check_same_data(cfg, state, seen):
    """Raise UserError when a resumed run would go on with other images; seen is their fingerprint."""
    if not state or "data" not in state or torch.equal(state["data"], seen):
        return
    saved, now = (set(images.tolist()) for images in (state["data"], seen))
    changed = ("data", f"{len(state['data'])} images",
               f"{len(seen)} images (+{len(now - saved)} -{len(saved - now)})")
    check_same_settings(cfg, state["config"], [changed])


def load_state(model, state, origin):
    """Load parameters by name. UserError names the first that differ."""
    own = model.state_dict()
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{origin} holds more than tensors: expected parameters by name")
    problems = [f"{name} has shape {tuple(state[name].shape)}, here {tuple(own[name].shape)}"
                for name in own if name in state and state[name].shape != own[name].shape]
    problems += [f"{name} holds other values than finite ones of {own[name].dtype}" for name in own
                 if name in state and not problems and not is_like(state[name], own[name])]
    problems += [f"{name} is below 0" for name in own
                 if name.endswith((".running_var", ".num_batches_tracked"))
                 and name in state and not problems and bool((state[name] < 0).any())]
    problems += [f"{name} is missing" for name in own if name not in state]
    problems += [f"{printable(str(name))} is unknown here" for name in state if name not in own]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{origin} is of another model: {'; '.join(problems[:3])}{more}")
    model.load_state_dict(state)


def open_folder(cfg, world, state=None):
    """Make the run folder and write config.json and env.json into it. Raises UserError where it cannot.

    state is what the run goes on from: what is newer in the folder is set aside.
    """
    folder = Path(cfg.output_dir)
    if world.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not world.held:
                claim(folder, world)
                if traces_of(folder):                                   # of another run, since we looked
                    raise UserError(already_a_run(cfg))
            files.remove_leftovers(folder)
            if state:
                set_newer_aside(folder, state["path"], world.say)
            files.write_json(folder / "config.json", dataclasses.asdict(cfg))
            files.write_json(folder / "env.json", describe_environment(world))
        except OSError as error:
            raise UserError(f"--output-dir {folder} cannot be written: {error.strerror}") from None
    world.barrier()                                                     # it exists now
    return folder


def open_measuring_folder(cfg, world):
    """open_folder for a tool that measures: what it writes replaces the records of an earlier measurement.

    Raises UserError where the folder holds a run, whose records are not to be replaced.
    """
    if traces_of(cfg.output_dir):
        raise UserError(f"{cfg.output_dir} holds a run, whose records this would replace: name another "
                        f"--output-dir")
    return open_folder(cfg, world)


def record(folder, cfg, world, metrics):
    """Write metrics.json: what was measured, with the flags and the environment."""
    if world.is_main:
        about = dict(config=dataclasses.asdict(cfg), environment=describe_environment(world))
        files.write_json(folder / "metrics.json", metrics | about)


def warn_of_space(folder, world, model, copies):
    """Say so where the disk has no room for two checkpoints, each so many times as large as the model."""
    need = 2 * copies * sum(value.numel() * value.element_size() for value in model.parameters())
    free = shutil.disk_usage(folder).free
    if free < need:
        world.say(f"warning: {free / 1e9:.1f} GB are free in {folder}, and two checkpoints take "
                  f"{need / 1e9:.1f} GB")


def save_checkpoint(folder, state):
    """Write last.pt; the one before becomes previous.pt, so that there is always a whole one."""
    write_tensors(Path(folder) / "last.pt", state, previous="previous.pt")


def checkpoints_in(folder):
    """The checkpoints of the run in a folder, the newest first."""
    return [path for path in (Path(folder) / "last.pt", Path(folder) / "previous.pt") if path.exists()]


def traces_of(folder):
    """The names that a run has left in a folder: links count, also to what is not there."""
    names = ("last.pt", "previous.pt", "log.jsonl", "encoder.pt", "classifier.pt",
             "segmenter.pt")
    return [name for name in names if os.path.lexists(Path(folder) / name)]


def check_nothing_lost(folder, save_every):
    """Raise UserError where a folder without a checkpoint has the log or results of one, or a link to one."""
    traces = traces_of(folder)
    links = [name for name in traces if not (Path(folder) / name).exists()]
    if links:
        raise UserError(f"{Path(folder) / links[0]} is a link to what is not there (is a disk not mounted?): "
                        f"name another --output-dir to begin anew")
    lines = read_log(Path(folder) / "log.jsonl")
    reached = max(filter(None, map(step_of, lines)), default=0)
    done = any("done" in line for line in lines)
    if done or reached > save_every or set(traces) - {"log.jsonl"}:
        raise UserError(f"{folder} has {' and '.join(traces)} of a run, and no checkpoint to go on from: "
                        f"name another --output-dir to begin anew")


def find_checkpoint(folder, resume, say):
    """The state to resume from, with its own path as "path", or None for a new run.

    resume is "auto" (the newest sound checkpoint of the folder, or a new run where there is none), or a file.
    """
    candidates = checkpoints_in(folder)
    if resume != "auto":
        if candidates and Path(resume).resolve().parent != Path(folder).resolve():
            raise UserError(f"{folder} holds another run than --resume {resume}: name another --output-dir")
        return read_state(resume) | dict(path=Path(resume))
    for path in candidates:
        try:
            state = read_state(path)
        except UserError as error:
            say(f"warning: {error}")
            continue
        if not seal_of(path):
            say(f"warning: {path} is not sealed by a SHA-256, as checkpoints were not once: damage would go "
                f"unnoticed until the next one is written")
        return state | dict(path=path)
    if candidates:
        raise UserError(f"no checkpoint in {folder} can be read: nothing to resume from, and a new run would "
                        f"overwrite it")
    return None


def set_newer_aside(folder, path, say):
    """Rename what is newer in a folder than the checkpoint at path, which a run goes on from.

    Else the next save would put it, damaged or not wanted, in the place of the one that is sound.
    """
    last = Path(folder) / "last.pt"
    if last.exists() and not last.samefile(path):
        aside = next(name for n in itertools.count(1) if not (name := Path(f"{last}.aside-{n}")).exists())
        os.replace(last, aside)
        say(f"warning: {last} is kept as {aside}, and the run goes on from {path}")


# ---------------------------------------------------------------- the settings of a run


def changed_settings(saved, now, names):
    """[(name, saved, now)] of the settings of these names that differ between two dicts."""
    def plain(settings, name):
        try:
            return json.dumps(settings.get(name), default=str)          # a tuple is a list
        except (TypeError, ValueError, RecursionError):                 # a stranger's
            return None
    return [(name, printable(str(saved.get(name))[:60]), printable(str(now.get(name))[:60])) for name in names
            if plain(saved, name) != plain(now, name)]


def table_of(changes):
    """Differences as the lines of a table."""
    rows = [("setting", "saved", "now"), *changes]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
