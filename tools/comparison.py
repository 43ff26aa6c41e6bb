"""What a study's results say: means, paired differences with their intervals, tables, sentences and figures.

Methods are paired by seed: the same seed gives them the same initial encoder, order of images and masks. So a
difference is taken seed by seed, and its spread over the seeds gives the interval.
"""

import math
import re
import statistics
from dataclasses import dataclass

from mff_min.mim import parse_out_indices
from mff_min.vit import MODELS
from mff_run.progress import duration
from tools.figures import Figure, Panel, Series

BASE = "MAE"
BASELINES = ("random", "pixels")
CONFIDENCE = 0.95
COLOURS = {"pixels": "ink", "random": "grey", "MAE": "blue", "PixMIM": "green", "MFF_MAE": "orange",
           "MFF_PixMIM": "red", "MFF_detach": "purple",
           "MFF_2": "teal", "MFF_4": "teal", "MFF_12": "teal"}          # the ablation has figures of its own
ORDER = tuple(COLOURS)
OTHERS = (("linear", "LARS", "acc1"), ("knn", "k-NN", "acc1"), ("finetune", "fine-tuning", "acc1"),
          ("segment", "mIoU", "mIoU"), ("detect", "box AP", "box_AP"),
          ("detect", "mask AP", "mask_AP"))                             # a stage, a figure of it and its name
LEVELS = {"MAE": 1, "MFF_2": 2, "MFF_4": 4,
          "MFF_MAE": 6, "MFF_12": 12}                                   # fused levels (MFF, table 4)
WEIGHTS_NOTE = ("A weight is no measure of what a level contributes: levels differ in norm, and all but the "
                "last pass through a learned projection, which can take up any scale.")


# ---------------------------------------------------------------- statistics


def t_within(t, df):
    """P(|T| <= t) of Student's t with df whole degrees of freedom (Abramowitz & Stegun, 26.7.3, 4)."""
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if df % 2 else (1.0, 0.0)
    for k in range(3 if df % 2 else 2, df + 1, 2):
        total += term
        term *= (k - 1) / k * cosine ** 2
    return 2 / math.pi * (angle + sine * total) if df % 2 else sine * total


def t_quantile(confidence, df):
    """The t with P(|T| <= t) = confidence, to the last digits of a float."""
    low, high = 0.0, 1.0
    while t_within(high, df) < confidence:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_within(middle, df) < confidence else (low, middle)
    return high


@dataclass(frozen=True)
class Difference:
    """Of two methods, over the seeds that both have: in points; half is the interval's, None of one seed."""
    mean: float
    half: float | None
    pairs: int

    @property
    def told(self):
        """Whether the interval excludes 0."""
        return self.half is not None and abs(self.mean) > self.half


def difference(values, others):
    """The Difference of {seed: value} to {seed: value}, or None where they share no seed."""
    found = [values[seed] - others[seed] for seed in values if seed in others]
    if not found:
        return None
    half = None
    if len(found) > 1:
        half = t_quantile(CONFIDENCE, len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found))
    return Difference(statistics.mean(found), half, len(found))


# ---------------------------------------------------------------- what was measured


@dataclass(frozen=True)
class Metric:
    """A measurement in percent: {method: {seed: value}}, on so many validation images, and chance.

    chance is None of mIoU and AP, which have none.
    """
    name: str
    values: dict
    val_images: int
    chance: float | None


def metrics_of(results):
    """The Metrics of a study: the last block's linear probes of each label, then the other measurements."""
    values, images, chance = {}, {}, {}

    def add(name, record, method, value):
        values.setdefault(name, {}).setdefault(method, {})[record["seed"]] = value
        images[name] = record["metrics"]["val_images"]

    for record in results["records"]:
        last = last_block(record)
        for row in record["metrics"].get("rows", ()):
            name = f"{row['label']}, linear"
            if row["kind"] == "chance":
                chance[row["label"]] = row["acc1"]
            elif row["kind"] == "pixels" or row["layer"] == last:
                add(name, record, "pixels" if row["kind"] == "pixels" else record["method"], row["acc1"])
    main = next(iter(chance), "")                                       # the label that the other stages use
    for stage, text, figure in OTHERS:
        for record in results["records"]:
            if record["stage"] == stage and main:
                add(f"{main}, {text}", record, record["method"], record["metrics"][figure])
    return [Metric(name, {method: found[method] for method in ORDER if method in found}, images[name],
                   None if name.endswith(("mIoU", "AP")) else chance[name.rpartition(", ")[0]])
            for name, found in values.items()
            if name.rpartition(", ")[0] in chance]


def last_block(record):
    """The name of the deepest of the blocks that a record's rows tell of, or None."""
    blocks = {row["layer"] for row in record["metrics"].get("rows", ()) if row["layer"].startswith("block ")}
    return max(blocks, key=lambda name: int(name.split()[1]), default=None)


def layers_of(results, label):
    """{method: {layer: accuracies of its seeds}} of a label, in percent."""
    found = {}
    for record in results["records"]:
        for row in record["metrics"].get("rows", ()):
            if row["label"] == label and row["kind"] == "trained":
                found.setdefault(record["method"], {}).setdefault(row["layer"], []).append(row["acc1"])
    return {method: found[method] for method in ORDER if method in found}


def labels_of(results):
    """The names of the labels that were probed, the main one first."""
    return list(dict.fromkeys(row["label"] for record in results["records"]
                              for row in record["metrics"].get("rows", ())))


def differences(metric):
    """{method: Difference to MAE} of the others, as far as they share seeds."""
    found = {method: difference(values, metric.values.get(BASE, {}))
             for method, values in metric.values.items() if method != BASE}
    return {method: each for method, each in found.items() if each}


# ---------------------------------------------------------------- tables and sentences


def table_of(metric):
    """Lines of Markdown: each method's mean, deviation and n, and its difference to MAE with the interval."""
    yield f"| {metric.name} | n | mean, % | sd | minus {BASE} | 95 % interval |"
    yield "|---|---|---|---|---|---|"
    for method, values in metric.values.items():
        spread = f"{statistics.stdev(values.values()):.2f}" if len(values) > 1 else ""
        found = differences(metric).get(method)
        points = f"{found.mean:+.2f}" if found else ""
        cells = (method, len(values), f"{statistics.mean(values.values()):.2f}", spread, points,
                 interval_of(found) if found else "")
        yield f"| {' | '.join(map(str, cells))} |"


def interval_of(found):
    """A Difference's interval as text."""
    if found.half is None:
        return "one pair: none"
    return f"{found.mean - found.half:+.2f} to {found.mean + found.half:+.2f}"


def verdict(metric):
    """A sentence on how MAE differs from random weights and which methods differ from MAE; "" without MAE.

    A method is better or worse where the interval excludes 0; else no difference can be told.
    """
    told = {"better than": [], "worse than": [], "no difference can be told from": []}
    for method, found in differences(metric).items():
        if method not in BASELINES:
            key = ("better than" if found.mean > 0 else "worse than") if found.told else list(told)[-1]
            told[key].append(f"{method} ({found.mean:+.2f}{f', {found.pairs} pair' * (found.pairs < 2)})")
    said = [f"{text} {BASE}: {', '.join(methods)}" for text, methods in told.items() if methods]
    learnt = difference(metric.values.get(BASE, {}), metric.values.get("random", {}))
    if learnt:
        text = ("better" if learnt.mean > 0 else "worse") + " than" if learnt.told else "not told apart from"
        said.insert(0, f"{BASE} is {text} random weights ({learnt.mean:+.2f})")
    return f"{metric.name}: {'; '.join(said)}." if said else ""


def origin(results, planned):
    """Where a study's numbers come from and how long they took; planned are the units that it is to have."""
    seeds = sorted({record["seed"] for record in results["records"]})
    where = "; ".join(dict.fromkeys(f"{found['device']}, {found['cpus']} cores, PyTorch {found['torch']}"
                                    for found in results["environments"]))
    done = {(record["method"], record["seed"], record["stage"]) for record in results["records"]}
    lacking = len(set(planned) - done)
    state = f", {len(planned) - lacking} of {len(planned)} units so far" if lacking else ""
    parts, took = results["parts"], ""
    known = all(record["seconds"] for record in results["records"])     # that of a unit that was cut is not
    if known and sum(part["units"] for part in parts) == len(done):
        jobs = " or ".join(map(str, sorted({part["jobs"] for part in parts})))
        seconds = sum(part["seconds"] for part in parts)
        took = f" {len(done)} units took {duration(seconds)}, {jobs} at a time."
    return (f"Preset {results['preset']} on {results['data']}, seeds {', '.join(map(str, seeds))}{state}; "
            f"measured on {where}.{took}")


def summary(results, planned):
    """A table of every method's means with their deviations and n, and the sentences, as Markdown."""
    metrics = metrics_of(results)
    if not metrics:
        return origin(results, planned)
    lines = ["| | " + " | ".join(metric.name for metric in metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for method in ORDER:
        cells = [short(metric.values.get(method, {})) for metric in metrics]
        if any(cells):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n\n".join([origin(results, planned), "\n".join(lines), *sentences(metrics)])


def sentences(metrics):
    """The verdicts as a list, and what to think of so many of them; nothing where there are none."""
    said = [f"- {text}" for metric in metrics if (text := verdict(metric))]
    count = sum(found.half is not None for metric in metrics for found in differences(metric).values())
    if said:
        yield "\n".join(said)
    if count:
        yield (f"Each interval is for one comparison, and there are {count}. If no row differed from {BASE}, "
               f"{count / 20:.1f} of them would exclude 0 by chance. All share {BASE}'s runs, so such "
               f"chances come together.")


def short(values):
    """Mean, deviation and n of {seed: value} as text."""
    if not values:
        return ""
    spread = f" +- {statistics.stdev(values.values()):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values.values()):.1f}{spread} ({len(values)})"


def report(results, planned):
    """All tables and sentences of a study as Markdown; planned are the units that it is to have."""
    metrics = metrics_of(results)
    parts = [origin(results, planned)]
    for metric in metrics:
        parts.append("\n".join(table_of(metric)))
    if metrics:
        errors = [f"{metric.name}: {binomial_error(metric):.2f} points of {metric.val_images} images, chance "
                  f"{metric.chance:.1f} %" for metric in metrics if metric.chance is not None]
        parts.append("The spread above is over seeds. The validation images are a sample too, the same one "
                     "for every method from a seed: one standard error of an accuracy from it alone is, for "
                     + "; ".join(errors) + ".")
    parts += sentences(metrics)
    for label in labels_of(results):
        parts.append("\n".join(layer_table(results, label)))
    if text := weights_text(results):
        parts.append(text)
    return "\n\n".join(parts)


def weights_text(results):
    """Sentences on the levels that ended with more weight than an equal share, in all seeds, or ""."""
    said = []
    for method in ORDER:
        records = [each for each in results["records"] if each["method"] == method and "fusion" in each]
        if records:
            blocks, ends = blocks_of(records[0]), [record["fusion"][-1][1:] for record in records]
            means = [statistics.mean(column) for column in zip(*ends, strict=True)]
            heavy = [f"{block} ({means[i]:.3f})" for i, block in enumerate(blocks)
                     if all(end[i] > 1 / len(blocks) for end in ends)]
            said.append(f"{method} (equal: {1 / len(blocks):.3f}): block {', '.join(heavy) or 'none'}")
    return ("Fused levels that ended above an equal weight from every seed, with their mean weight: "
            + "; ".join(said) + ".") if said else ""


def blocks_of(record):
    """The numbers of the blocks that a pre-training record's flags fuse."""
    depth = MODELS[re.search(r"--model (\S+)", record["flags"])[1]]["depth"]
    return parse_out_indices(re.search(r"--out-indices (\S+)", record["flags"])[1], depth)


def binomial_error(metric):
    """One standard error, in points, of the methods' mean accuracy on the metric's validation images."""
    p = statistics.mean(statistics.mean(values.values()) for values in metric.values.values()) / 100
    return 100 * math.sqrt(p * (1 - p) / metric.val_images)


def layer_table(results, label):
    """Lines of Markdown: what the linear probe of each layer finds of a label, mean over the seeds."""
    found = layers_of(results, label)
    layers = list(dict.fromkeys(layer for row in found.values() for layer in row))
    yield f"| {label}, linear, % | " + " | ".join(layers) + " |"
    yield "|---" * (len(layers) + 1) + "|"
    for method, row in found.items():
        cells = [f"{statistics.mean(row[layer]):.1f}" if layer in row else "" for layer in layers]
        yield f"| {method} | {' | '.join(cells)} |"


# ---------------------------------------------------------------- figures


def figures_of(results):
    """{name: Figure} of a study, those for which it has numbers."""
    about = f"{results['data']}, preset {results['preset']}"
    found = {"differences": forest(results, about), "levels": levels(results, about),
             "layers": layers(results, about), "loss": losses(results, about),
             "weights": weights(results, about)}
    return {name: figure for name, figure in found.items() if figure.panels}


def forest(results, about):
    """The paired difference of every method to MAE with its interval, a panel for each metric.

    Metrics of one method alone share a panel: one point has nothing beside it.
    """
    rows, alone = {}, {}                                                # {title: {tick: Difference}}
    for metric in metrics_of(results):
        found = {method: each for method, each in differences(metric).items()
                 if method not in BASELINES and each.half is not None}
        if len(found) == 1:
            (method, each), = found.items()
            alone.setdefault(method, {})[metric.name] = each
        else:
            rows[metric.name] = found
    panels = []
    for title, found in (rows | alone).items():
        if len(found) > 1:
            points = [(float(x), each.mean) for x, each in enumerate(found.values())]
            zero = [(-0.5, 0.0), (len(found) - 0.5, 0.0)]
            series = [Series("no difference", zero, (), "grey", dash=4),
                      Series("mean over the seeds, 95 % interval", points,
                             [each.half for each in found.values()], "ink", line=False)]
            panels.append(Panel(title, "", f"points over {BASE}", list(found), series, zero=False))
    return Figure(f"Difference to {BASE} from the same seeds: {about}", panels,
                  columns=min(2, len(panels)), width=620)


def means_and_deviations(samples, first=0.0):
    """([(first, mean), (first + 1, mean) ...], [deviation ...]) of lists of values; of one value it is 0."""
    samples = list(samples)
    return ([(first + x, statistics.mean(values)) for x, values in enumerate(samples)],
            [statistics.stdev(values) if len(values) > 1 else 0.0 for values in samples])


def levels(results, about):
    """Accuracy over the number of fused levels (MFF, table 4): mean and deviation over the seeds."""
    panels = []
    for metric in metrics_of(results):
        found = {levels: list(metric.values[method].values()) for method, levels in LEVELS.items()
                 if method in metric.values}
        if len(found) > 2:
            points, errors = means_and_deviations(found.values())
            series = [Series("mean over the seeds, bars of one standard deviation", points, errors, "teal")]
            panels.append(Panel(metric.name, "fused levels; 1 is MAE", "accuracy, %", list(map(str, found)),
                                series, zero=False))
    return Figure(f"The number of fused levels: {about}", panels, columns=min(2, len(panels)))


def layers(results, about):
    """The linear probe of every layer, a panel for each label: mean and deviation over the seeds."""
    panels = []
    for label in labels_of(results):
        found, series = layers_of(results, label), []
        names = [layer for layer in dict.fromkeys(layer for row in found.values() for layer in row)
                 if layer != "fused" and all(layer in row for row in found.values())]
        for aside, method in ((-0.06, "random"), (0.0, BASE), (0.06, "MFF_MAE")):       # else bars hide bars
            if names and method in found:
                points, errors = means_and_deviations((found[method][name] for name in names), aside)
                series.append(Series(method, points, errors, COLOURS[method]))
        ticks = [name.removeprefix("block ") for name in names]
        panels += [Panel(label, "block", "accuracy, %", ticks, series, zero=False)] if series else []
    return Figure(f"Linear probe of each layer, mean over the seeds: {about}", panels,
                  note="Bars: one standard deviation over the seeds. The y axis does not begin at 0.")


def mean_curves(results, key):
    """{method: (record, rows of the step and means over the seeds)} of pre-training records with a curve."""
    found = {}
    for method in ORDER:
        records = [record for record in results["records"]
                   if (record["method"], record["stage"]) == (method, "pretrain") and key in record]
        if records:
            curves = [{row[0]: row for row in record[key]} for record in records]
            steps = [step for step in curves[0] if all(step in curve for curve in curves)]
            rows = [zip(*(curve[step] for curve in curves), strict=True) for step in steps]
            if rows:
                found[method] = records[0], [[statistics.mean(column) for column in row] for row in rows]
    return found


def losses(results, about):
    """The pre-training loss of each method over the steps, but for the first, which all share."""
    series = [Series(method, [(float(step), value) for step, value in curve[1:]], (), COLOURS[method],
                     dots=False)
              for method, (_, curve) in mean_curves(results, "loss").items()
              if COLOURS[method] != "teal" and curve[1:]]
    panels = [Panel("", "step", "loss on masked patches", None, series, zero=False)] if series else []
    filtered = any("PixMIM" in line.name for line in series)
    return Figure(f"Pre-training loss, mean over the seeds: {about}", panels, width=800,
                  note="PixMIM's target is another, smoother image: its loss is not comparable." * filtered)


def weights(results, about):
    """The weight of each fused level over the steps, a panel for each method that fuses."""
    panels = []
    for method, (record, curve) in mean_curves(results, "fusion").items():
        blocks = blocks_of(record)
        series = [Series(f"block {block}", [(float(row[0]), row[1 + i]) for row in curve], (),
                         block / max(blocks), dots=False, tag=f"block {block}")
                  for i, block in enumerate(blocks)]
        equal = [(float(row[0]), 1 / len(blocks)) for row in (curve[0], curve[-1])]
        series.append(Series("equal", equal, (), "grey", dash=4))
        panels.append(Panel(f"{method}: {len(blocks)} levels", "step", "weight", None, series, zero=False))
    panels.sort(key=lambda panel: len(panel.series))
    return Figure(f"Fusion weight of every level, mean over the seeds: {about}", panels,
                  columns=min(3, len(panels)), width=400, note=WEIGHTS_NOTE)
