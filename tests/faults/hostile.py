"""Promise 10, of states that no run wrote: made from ones that a run wrote, by a new seed each day.

The authors of a check cannot tune it to cases that they do not know. A failing case is printed with the seed
that makes it again: HOSTILE_SEED=... python tests/faults --only hostile
"""

import random
import shutil

import torch
from faults.killed import command, differences, uninterrupted
from faults.suite import SEED, STAGES, Fault, Guard, Tally, fork, many, share_out

from mff_run import files, resume, run

MORE = {"pretrain": (), "probe": (), "finetune": ("--ema", "0.9")}

# ---------------------------------------------------------------- what is put in the place of a value


def deep():
    """Lists in lists, a hundred of them."""
    value = []
    for _ in range(100):
        value = [value]
    return value


VALUES = [None, True, -1, 10 ** 400, float("nan"), float("-inf"), "", "\x1b[31m", [], {}, [None], {"a": {}},
          deep(), {1: 2}, b"bytes", torch.zeros(0), torch.tensor(float("nan")),
          torch.zeros(1, dtype=torch.complex64)]
TENSORS = {
    "one number": lambda x: x.flatten()[:1].clone(),
    "one number in the place of all": lambda x: x.flatten()[0].clone().expand(x.shape),
    "complex": lambda x: x.to(torch.complex64),
    "infinite": lambda x: torch.full_like(x, float("inf")),
    "NaN": lambda x: x * float("nan"),
    "one dimension more": lambda x: x[None],
    "empty": lambda x: x.flatten()[:0],
    "a list": lambda x: x.tolist(),
    "sparse": lambda x: x.to_sparse(),
    "whole": lambda x: x.to(torch.int64),
    "true": lambda x: x.to(torch.bool),
    "without content": lambda x: x.to("meta"),
}


def places(value, most=6):
    """(dict or list, key) of all that is nested in value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in list(items):
        yield value, key
        if most:
            yield from places(inside, most - 1)


def make_hostile(state, draw):
    """Put one thing into a state that no run would have put there; what it is, as text."""
    part = draw.choice(sorted(state, key=str))
    found = [(state, part), *places({part: state[part]})]
    holder, key = draw.choice(found)
    value, what = holder[key], draw.random()
    name = f"{part}: {str(key)[:40]}"
    if what < 0.1 and isinstance(holder, dict):
        del holder[key]
        return f"{name} is gone"
    if what < 0.2 and isinstance(holder, dict):
        holder[draw.choice([f"{key}x", 7, None, "\x1b]"])] = value
        return f"{name} is there twice"
    if isinstance(value, torch.Tensor) and value.is_floating_point() and what < 0.7:
        kinds = [kind for kind in TENSORS if part == "optimizer" or kind != "one number in the place of all"]
        kind = draw.choice([*kinds, "negative"] if key in ("step", "exp_avg_sq") else kinds)
        holder[key] = TENSORS[kind](value) if kind in TENSORS else -value - 1
        return f"{name} is {kind}"
    holder[key] = draw.choice(VALUES)
    return f"{name} is {str(holder[key])[:60]}"


def make_known(state, part, kind):
    """The same with the first tensor of numbers in a part."""
    holder, key = next((holder, key) for holder, key in places(state[part]) if key != "step"
                       and isinstance(holder[key], torch.Tensor) and holder[key].is_floating_point())
    holder[key] = TENSORS[kind](holder[key])
    return f"{part}: {key} is {kind}"


KNOWN = [(part, kind) for kind in ("one number", "complex", "infinite") for part in ("optimizer", "model")]
KNOWN += [("optimizer", "one number in the place of all")]

# ---------------------------------------------------------------- runs that go on from it


def hostile_states(folder, quick):
    """A run that is to go on from such a state refuses in a line, or it comes to what it should."""
    wholes = {name: uninterrupted(name, folder / f"{name}-whole", *MORE[name]) for name in STAGES}

    def trial(number):
        name = list(STAGES)[number % 3]
        whole, run = wholes[name], folder / f"run{number}"
        shutil.copytree(whole, run)
        state = files.read_checkpoint(whole / "previous.pt")
        known, draw = number < len(KNOWN), random.Random(SEED * 1000 + number)
        what = make_known(state, *KNOWN[number]) if known else make_hostile(state, draw)
        (run / "previous.pt").unlink()
        files.write_tensors(run / "last.pt", state)
        ended = fork(command(name, run, *MORE[name]))
        errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
        if ended.code == 2 and len(errors) == 1 and "\x1b" not in ended.said:
            problem = ""
        elif ended.code == 0:
            problem = ", ".join(differences(name, run, whole))
        else:
            problem = f"code {ended.code}, {ended.last[:200]}"
        shutil.rmtree(run)
        yield f"HOSTILE_SEED={SEED}, {number}, {name}, {what}: {problem}" if problem else "", 0
    tally = Tally()
    share_out([lambda number=number: trial(number) for number in range(many(15, 120, quick))], tally)
    return tally.outcome()


def trust_the_optimizer():
    run.check_optimizer = lambda state, optimizer: None


def trust_what_parameters_hold():
    resume.is_like = lambda value, own: True


FAULTS = [Fault("a hostile state of a run", 10, hostile_states)]
GUARDS = [Guard("optimizer-compared", "a hostile state of a run", trust_the_optimizer),
          Guard("parameters-compared", "a hostile state of a run", trust_what_parameters_hold)]
