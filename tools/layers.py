"""A figure of where in an encoder the information is, of the rows that tools.probe_layers writes."""

from tools.chart import Figure, Panel, Series
from tools.pens import LINES


def figure_of_layers(runs):
    """A Figure with a panel for each label: accuracy over the layers, with both baselines and chance.

    runs are {name: rows}; a run that lacks a label is not in its panel. The baselines in a panel are those of
    the first run in it, where that has them.
    """
    rows = [row for of_run in runs.values() for row in of_run]
    present = {row["layer"] for row in rows if row["kind"] == "trained"}
    blocks = sorted(int(layer.removeprefix("block ")) for layer in present - {"fused"})
    layers = [*(f"block {i}" for i in blocks), *({"fused"} & present)]
    ticks = [layer.removeprefix("block ") for layer in layers]
    owners = {}                                                         # {label: whose baselines are shown}
    for name, of_run in runs.items():
        for row in of_run:
            owners.setdefault(row["label"], name)
    panels = []
    for label, owner in owners.items():
        series = []
        lines = [(name, "trained", name, LINES[i % len(LINES)]) for i, name in enumerate(runs)]
        lines.append((owner, "random", "random weights", "grey" if len(runs) > 1 else "orange"))
        for run, kind, name, colour in lines:
            found = [row for row in runs[run] if (row["label"], row["kind"]) == (label, kind)]
            blocks = [row for row in found if row["layer"] != "fused"]
            for part in filter(None, (blocks, found[len(blocks):])):    # no line leads to the fused feature
                points = [(layers.index(row["layer"]), row["acc1"]) for row in part]
                series.append(Series(name, points, [row["acc1_error"] for row in part], colour))
        for kind, dash in (("pixels", 6), ("chance", 2)):
            for level in (row for row in runs[owner] if (row["label"], row["kind"]) == (label, kind)):
                ends = [(-0.5, level["acc1"]), (len(layers) - 0.5, level["acc1"])]
                series.append(Series(kind, ends, [0.0, level["acc1_error"]], "grey", dash))
        panels.append(Panel(f"label: {label}", "block", "accuracy, %", ticks, series))
    images = sorted({row["val_images"] for row in rows if row["kind"] == "trained"})
    return Figure(f"Linear probes of frozen features: accuracy on {' or '.join(map(str, images))} validation "
                  f"images, bars of one standard error", panels, share_y=True,
                  note=whose_is_grey(owners) if len(runs) > 1 else "")


def whose_is_grey(owners):
    """The note that says which run the baselines are of: {label: run}."""
    runs = dict.fromkeys(owners.values())
    if len(runs) == 1:
        return f"What is grey is of {next(iter(runs))}."
    return "What is grey is of " + ", ".join(f"{run} for {label}" for label, run in owners.items()) + "."
