"""What a study's results say: means, paired differences with their intervals, tables, sentences and figures.

Methods are paired by seed: the same seed gives them the same initial encoder, images, crops and masks. So a
difference is taken seed by seed, and its spread over the seeds gives the interval.
"""

import math
import statistics
from dataclasses import dataclass

BASE = "MAE"
CONFIDENCE = 0.95
ORDER = ("pixels", "random", "MAE", "PixMIM", "MFF_MAE", "MFF_PixMIM", "MFF_detach", "MFF_2", "MFF_4", "MFF_12")
OTHERS = {"linear": "LARS", "knn": "k-NN", "finetune": "fine-tuning"}   # stages with one accuracy
LEVELS = {"MFF_2": 2, "MFF_4": 4, "MFF_MAE": 6, "MFF_12": 12}           # fused by each (MFF, table 4)


# ---------------------------------------------------------------- statistics


def t_within(t, df):
    """P(|T| <= t) of Student's t with a whole number of degrees of freedom (Abramowitz & Stegun, 26.7.3, 4)."""
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
    """A measurement in percent: {method: {seed: value}}, on so many validation images; chance, if known."""
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
    for stage, text in OTHERS.items():
        for record in results["records"]:
            if record["stage"] == stage:
                add(f"{main}, {text}", record, record["method"], record["metrics"]["acc1"])
    return [Metric(name, {method: found[method] for method in ORDER if method in found}, images[name],
                   chance.get(name.split(", ")[0])) for name, found in values.items()]


def last_block(record):
    """The name of the deepest of the blocks that a record's rows tell of, or None."""
    blocks = {row["layer"] for row in record["metrics"].get("rows", ()) if row["layer"].startswith("block ")}
    return max(blocks, key=lambda name: int(name.split()[1]), default=None)


def layers_of(results, label):
    """{method: {layer: mean accuracy over its seeds}} of a label, in percent, and their order."""
    found = {}
    for record in results["records"]:
        for row in record["metrics"].get("rows", ()):
            if row["label"] == label and row["kind"] == "trained":
                found.setdefault(record["method"], {}).setdefault(row["layer"], []).append(row["acc1"])
    return {method: {layer: statistics.mean(values) for layer, values in found[method].items()}
            for method in ORDER if method in found}


def labels_of(results):
    """The names of the labels that were probed, the main one first."""
    return list(dict.fromkeys(row["label"] for record in results["records"]
                              for row in record["metrics"].get("rows", ())))


# ---------------------------------------------------------------- tables and sentences


def table_of(metric):
    """Lines of Markdown: each method's mean, deviation and n, and its difference to MAE with the interval."""
    yield f"| {metric.name} | n | mean, % | sd | minus {BASE} | 95 % interval |"
    yield "|---|---|---|---|---|---|"
    for method, values in metric.values.items():
        spread = f"{statistics.stdev(values.values()):.2f}" if len(values) > 1 else ""
        found = difference(values, metric.values.get(BASE, {})) if method != BASE else None
        points = f"{found.mean:+.2f}" if found else ""
        interval = interval_of(found) if found else ""
        yield f"| {method} | {len(values)} | {statistics.mean(values.values()):.2f} | {spread} | {points} | " \
              f"{interval} |"


def interval_of(found):
    """A Difference's interval as text."""
    if found.half is None:
        return "one pair: none"
    return f"{found.mean - found.half:+.2f} to {found.mean + found.half:+.2f}"


def verdict(metric, method):
    """A sentence on what a method's difference to MAE says, or "" where there is none."""
    found = difference(metric.values.get(method, {}), metric.values.get(BASE, {}))
    if not found:
        return ""
    text = f"{metric.name}: {method} minus {BASE} is {found.mean:+.2f} points"
    if found.half is None:
        return f"{text} of one seed, so no difference can be told."
    text += f", interval {interval_of(found)}, over {found.pairs} seeds: "
    if not found.told:
        return text + "it contains 0, so no difference can be told."
    return text + f"{method} is {'better' if found.mean > 0 else 'worse'}."


def report(results, planned=None):
    """All tables and sentences of a study as Markdown; planned is the number of units, if more than these."""
    metrics, records = metrics_of(results), results["records"]
    seeds = sorted({record["seed"] for record in records})
    where = "; ".join(dict.fromkeys(f"{found['device']}, {found['cpus']} cores, PyTorch {found['torch']}"
                                    for found in results["environments"]))
    state = f", {len(records)} of {planned} units so far" if planned and planned > len(records) else ""
    parts = [f"Preset {results['preset']} on {results['data']}, seeds {', '.join(map(str, seeds))}{state}; "
             f"measured on {where}."]
    for metric in metrics:
        parts.append("\n".join(table_of(metric)))
    errors = [f"{metric.name}: {binomial_error(metric):.2f} points of {metric.val_images} images, chance "
              f"{metric.chance:.1f} %" for metric in metrics]
    parts.append("The spread above is over seeds. The validation images are a sample too, the same one for "
                 "every method: one standard error of an accuracy from it alone is, for " + "; ".join(errors)
                 + ".")
    said = [f"- {text}" for metric in metrics for method in metric.values
            if method not in (BASE, "pixels", "random") and (text := verdict(metric, method))]
    if said:
        parts.append("\n".join(said))
        parts.append(f"Of {len(said)} such intervals, {len(said) / 20:.1f} would exclude 0 by chance alone if "
                     f"no method differed from {BASE}.")
    for label in labels_of(results):
        parts.append("\n".join(layer_table(results, label)))
    return "\n\n".join(parts)


def binomial_error(metric):
    """One standard error, in points, of the mean accuracy of the metric's methods on its validation images."""
    p = statistics.mean(statistics.mean(values.values()) for values in metric.values.values()) / 100
    return 100 * math.sqrt(p * (1 - p) / metric.val_images)


def layer_table(results, label):
    """Lines of Markdown: what the linear probe of each layer finds of a label, mean over the seeds."""
    found = layers_of(results, label)
    layers = list(dict.fromkeys(layer for row in found.values() for layer in row))
    yield f"| {label}, linear, % | " + " | ".join(layers) + " |"
    yield "|---" * (len(layers) + 1) + "|"
    for method, row in found.items():
        yield f"| {method} | " + " | ".join(f"{row[layer]:.1f}" if layer in row else "" for layer in layers) + " |"
