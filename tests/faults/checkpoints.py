"""Promise 2: a damaged checkpoint is found, named and kept, and the newest sound one is used."""

import functools
import random
import shutil
import signal

from faults.killed import SAVE_EVERY, command, differences, gone_on, uninterrupted, watched
from faults.suite import Fault, Guard, Tally, fork, many, share_out
from run_folders import same_bits

from mff_min.errors import UserError
from mff_run import files, resume


def mutate(content, others, draw):
    """(what was done, content with bits altered, cut short, made longer, or replaced)."""
    kind = draw.choices(("flip", "cut", "overwrite", "append", "empty", "other"), (60, 20, 10, 4, 1, 5))[0]
    at = draw.randrange(len(content))
    if kind == "flip":
        flipped = content[at] ^ 1 << draw.randrange(8)
        return f"with byte {at} flipped to {flipped}", content[:at] + bytes([flipped]) + content[at + 1:]
    if kind == "cut":
        keep = draw.choice((at, len(content) - draw.randrange(1, min(200, len(content)))))
        return f"cut to {keep} bytes", content[:keep]
    if kind == "overwrite":
        run = draw.randbytes(draw.randrange(1, 65))
        return f"with {len(run)} bytes from {at} overwritten", content[:at] + run + content[at + len(run):]
    if kind == "append":
        return "with bytes appended", content + draw.randbytes(draw.randrange(1, 100))
    name = draw.choice(sorted(others))
    return ("emptied", b"") if kind == "empty" else (f"replaced by {name}", others[name])


def checked(folder, want):
    """What is wrong with what find_checkpoint gives, which may be one of the states in want."""
    said = []
    try:
        state = resume.find_checkpoint(folder, "auto", said.append)
    except UserError as error:
        return str(error)
    path = state.pop("path")
    found = [name for name, wanted in want.items() if same_bits(state, wanted)]
    if not found:
        return "another state was loaded, without a word"
    named = any("last.pt" in text for text in said)
    if path.name == "previous.pt" and not named:
        return "last.pt was passed over without a word"
    return ""


def mutations(folder, quick):
    """Mutated checkpoints are named, the one before is used; where both are mutated, nothing is."""
    whole = uninterrupted("probe", folder / "whole")
    place, draw, tally = folder / "mutated", random.Random(0), Tally()
    place.mkdir()
    content = {name: (whole / name).read_bytes() for name in ("last.pt", "previous.pt")}
    states = {name: files.read_checkpoint(whole / name) for name in content}
    others = {name: (whole / name).read_bytes() for name in ("config.json", "log.jsonl", "previous.pt")}
    others["other.py"] = open(__file__, "rb").read()
    silent = 0
    for i in range(many(200, 2000, quick)):
        what, mutated = mutate(content["last.pt"], others, draw)
        (place / "last.pt").write_bytes(mutated)
        (place / "previous.pt").write_bytes(content["previous.pt"])
        problem = checked(place, states)
        silent += problem.startswith("another state")
        if i % 4 == 0 and not problem and "previous.pt" not in what:
            also, mutated = mutate(content["previous.pt"], {"nothing": b""}, draw)
            (place / "previous.pt").write_bytes(mutated)
            refused = checked(place, states)
            if not refused.startswith("no checkpoint in"):
                problem = f"and previous.pt {also}: {refused or 'it went on'}"
        tally.note(f"last.pt {what}: {problem}" if problem else "")
    return tally.outcome(loaded_wrong=silent, file_bytes=len(content["last.pt"]))


# ---------------------------------------------------------------- whole runs


def damaged_run(name, folder, whole, damage):
    """A finished run whose last.pt is damaged, given its command again."""
    shutil.copytree(whole, folder)
    last = folder / "last.pt"
    damage(last)
    content = last.read_bytes()
    ended = fork(command(name, folder))
    if ended.code:
        yield f"{name}, {damage.__name__}: code {ended.code}, {ended.last}", 0
        return
    problems = list(differences(name, folder, whole))
    if f"warning: checkpoint {last}" not in ended.said:
        problems.append("it is not named")
    aside = folder / "last.pt.aside-1"
    if not aside.exists() or aside.read_bytes() != content:
        problems.append("it is not kept")
    yield f"{name}, {damage.__name__}: {'; '.join(problems)}" if problems else "", SAVE_EVERY


def damaged_and_killed(name, folder, whole, at, when):
    """The same, killed in the first save after it: the sound one must not have been replaced."""
    shutil.copytree(whole, folder)
    flip(folder / "last.pt")
    ended = fork(watched(name, folder, at=at, when=when))
    if ended.code != -signal.SIGKILL:
        yield "", 0                                                     # there is nothing to rename
        return
    problem, lost = gone_on(name, folder, whole)
    yield f"{name}, killed {when} {' '.join(at)}: {problem}" if problem else "", lost


def all_damaged(name, folder, whole):
    """A run without one sound checkpoint is refused, and is left as it is."""
    shutil.copytree(whole, folder)
    for path in resume.checkpoints_in(folder):
        flip(path)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.lock"}
    ended = fork(command(name, folder))
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.lock"}
    fine = ended.code == 2 and "no checkpoint in" in ended.last and before == after
    yield "" if fine else f"{name}, all damaged: code {ended.code}, {ended.last}", 0


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def of_another_file(path):
    path.write_bytes((path.parent / "config.json").read_bytes())


def whole_runs(folder, quick):
    """Runs of every stage with damaged checkpoints."""
    trials = []
    for name in ("pretrain",) if quick else ("pretrain", "probe", "finetune"):
        whole = uninterrupted(name, folder / f"{name}-whole")
        place = folder / name
        place.mkdir()
        for damage in (flip, cut, empty, of_another_file):
            trials.append(functools.partial(damaged_run, name, place / damage.__name__, whole, damage))
        for target in ("previous.pt", "last.pt"):
            for when in ("before", "after"):
                trials.append(functools.partial(damaged_and_killed, name, place / f"{target}-{when}", whole,
                                                ("replace", target), when))
        trials.append(functools.partial(all_damaged, name, place / "all", whole))
    tally = Tally()
    share_out(trials, tally)
    return tally.outcome()


FAULTS = [Fault("mutated checkpoints", 2, mutations),
          Fault("a damaged checkpoint in a run folder", 2, whole_runs)]


def read_without_comparing():
    files.check_seal = lambda path: None


def leave_what_is_newer():
    resume.set_newer_aside = lambda folder, path, say: None


GUARDS = [Guard("no-sha256", "mutated checkpoints", read_without_comparing),
          Guard("damaged-one-not-set-aside", "a damaged checkpoint in a run folder", leave_what_is_newer)]
