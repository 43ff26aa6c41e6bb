"""Where in an encoder the information is: the features of every layer, and what probes of them found.

What is found is a list of rows, dicts with label, kind ("trained", "random", "pixels" or "chance"), layer and
the accuracy there.

Shapes: B images, D width.
"""

import math

from mff_min.errors import UserError
from mff_min.mim import fuse
from mff_min.probe import pool_tokens


def parse_layers(text, depth):
    """The blocks that --layers names, ascending. Raises UserError."""
    if text in ("", "all"):
        return list(range(depth))
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) < depth for part in parts):
        raise UserError(f"--layers {text}: expected all, or numbers of blocks from 0 to {depth - 1}")
    return sorted({int(part) for part in parts})


def features_of_layers(encoder, fusion, layers, images, pool, ops):
    """{"block 0": features (B, D), ...} of unmasked images, and "fused", what MFF's decoder would receive."""
    levels = encoder.forward_blocks(encoder.embed(images), range(len(encoder.blocks)))
    found = {f"block {i}": pool_tokens(levels[i], pool).float() for i in layers}
    if fusion:
        fused = fuse([levels[i] for i in fusion.out_indices], fusion.proj_layers, fusion.proj_weights,
                     encoder.norm, ops)
        found["fused"] = pool_tokens(fused, pool).float()
    return found


def margin(rows, label):
    """How far the best trained layer is ahead of both baselines' best, in points and in standard errors."""
    best = {kind: max((row for row in rows if row["label"] == label and row["kind"] == kind),
                      key=lambda row: row["acc1"]) for kind in ("trained", "random", "pixels")}
    found = dict(layer=best["trained"]["layer"], acc1=best["trained"]["acc1"])
    for kind in ("random", "pixels"):
        points = best["trained"]["acc1"] - best[kind]["acc1"]
        # Where both are all right or all wrong there is no error: at least one image's worth is taken.
        error = max(math.hypot(best["trained"]["acc1_error"], best[kind]["acc1_error"]),
                    100 / best["trained"]["val_images"])
        found[kind] = dict(layer=best[kind]["layer"], points=points, standard_errors=points / error)
    return found


def margin_line(label, found):
    """A margin as a line of text; "errors" are standard errors of the difference."""
    names = {"random": f"{found['random']['layer']} with random weights", "pixels": "pixels"}
    return f"{label}: {found['layer']} has {found['acc1']:.1f} %, " + ", ".join(
        f"{found[kind]['points']:+.1f} points ({found[kind]['standard_errors']:+.1f} errors) over {name}"
        for kind, name in names.items())


def table_of_layers(rows):
    """Top-1 accuracy in percent as text: a line a layer, and for each label trained and random weights.

    What was not measured is left blank.
    """
    labels = list(dict.fromkeys(row["label"] for row in rows))
    cells = {(row["label"], row["kind"], row["layer"]): f"{row['acc1']:.1f} +- {row['acc1_error']:.1f}"
             for row in rows}
    lines = [" " * 10 + "".join(f"{label + ', trained':>20}{'random weights':>20}" for label in labels)]
    for layer in dict.fromkeys(row["layer"] for row in rows if row["kind"] == "trained"):
        lines.append(f"{layer:10}" + "".join(f"{cells.get((label, kind, layer), ''):>20}"
                                             for label in labels for kind in ("trained", "random")))
    for kind in ("pixels", "chance"):
        lines.append(f"{kind:10}" + "".join(f"{cells.get((label, kind, kind), ''):>20}{'':20}"
                                            for label in labels))
    return "\n".join(line.rstrip() for line in lines)
