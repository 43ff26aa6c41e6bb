"""Where in a file an encoder is: found by its patch projection, in nested dicts and under any prefix.

Others call their containers and prefixes as they like (state_dict, teacher, module, backbone.vit), so no name
is needed but those of families.PROJECTIONS.
"""

import re
from collections import Counter, deque

import torch

from mff_min.errors import UserError, printable
from mff_run.state import RUN_STATE
from mff_run.torchfile import StandIn
from mff_weights.families import PROJECTIONS, find_places, strip_wrappers

# What is looked at of a stranger's file: dicts inside one another, letters of a key, encoders.
DEEPEST, LONGEST, MOST = 16, 500, 100


def flatten(path, content):
    """{name: tensor} of nested dicts and lists, with dots between the keys. A dict counts once."""
    found, seen, waiting = {}, {id(content)}, deque([("", content, 0)])
    while waiting:
        before, holder, depth = waiting.popleft()
        for key, value in entries_of(holder):
            if not isinstance(key, str | int) or len(str(key)) > LONGEST:
                continue
            name = f"{before}{key}"
            if isinstance(value, torch.Tensor):
                bare = strip_wrappers(name)
                if bare in found:
                    raise UserError(f"checkpoint {path} has two tensors of the name {shown([bare])[0]}, one "
                                    f"of them as {shown([name])[0]}: expected one of each")
                found[bare] = torch.Tensor.detach(value)                # of the class: a file may set others
            elif isinstance(value, dict | list | tuple) and id(value) not in seen and depth < DEEPEST:
                seen.add(id(value))
                waiting.append((f"{name}.", value, depth + 1))
    return found


def entries_of(holder):
    """The (key, value) pairs of a dict, of a StandIn for one, or of a list."""
    if isinstance(holder, StandIn):
        return holder.entries.items()
    return dict.items(holder) if isinstance(holder, dict) else enumerate(holder)


def choose_place(path, tensors, content, key, flag="--key"):
    """(place, base) of the encoder to take, as find_places has them. UserError where that is not clear."""
    places = find_places(tensors)
    if not places:
        looked = " or ".join(PROJECTIONS)
        holds = ", ".join(shown(list(tensors or content)[:3])) or "nothing"
        raise UserError(f"checkpoint {path} is of no known family (ours, MAE, timm, mmpretrain, "
                        f"Transformers): expected a ViT, with a tensor named {looked}, anywhere in the file; "
                        f"it holds {holds} ...")
    names = ", ".join(shown([place.rstrip(".") or "." for place in places]))
    if key is not None:
        chosen = [place for place in places if place.rstrip(".") == key.strip(".")]
        chosen = chosen or [place for place in places if f".{key.strip('.')}." in f".{place}"]
        if len(chosen) != 1:
            raise UserError(f"{flag} {printable(key)} names {len(chosen)} encoders of checkpoint {path}: "
                            f"expected one of {names}")
        places = {chosen[0]: places[chosen[0]]}
    elif set(RUN_STATE) <= set(content):                                # a run of ours: not its average
        places = {place: base for place, base in places.items() if base == "model."} or places
    first, *others = places
    if len(places) > MOST or any(contents(tensors, other) != contents(tensors, first) for other in others):
        raise UserError(f"checkpoint {path} holds {len(places)} encoders: {names}; {flag} NAME takes one of "
                        f"them, for example {flag} {shown([others[-1].rstrip('.')])[0]}")
    return first, places[first]


def contents(tensors, place):
    """Where in memory the tensors of a place are, by name: the same for two names of one state dict."""
    return {name.removeprefix(place): tensor.data_ptr() for name, tensor in tensors.items()
            if name.startswith(place)}


def part_in_file(name, base):
    """The part of a file that a tensor left behind is of: its name as far as it differs from the base."""
    shared = 0
    for ours, theirs in zip(base.split("."), name.split("."), strict=False):
        if ours != theirs:
            break
        shared += 1
    return ".".join(name.split(".")[:shared + 1])


def shown(names, most=20):
    """Names for a line of text: those of all blocks as one, and nothing in them that could forge a line."""
    counts = Counter(re.sub(r"\.[0-9]+(?=\.)", ".*", str(name)[:200], count=1) for name in names)
    texts = [ascii(name)[1:-1] + f" x{count}" * (count > 1) for name, count in counts.items()]
    return texts[:most] + [f"and {len(texts) - most} more"] * (len(texts) > most)
