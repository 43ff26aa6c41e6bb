"""Figures from runs: what MFF's weights did, how training went, and what the layers of an encoder are like.

    python -m tools.analyze runs/mff                                all that this run has material for
    python -m tools.analyze runs/mff runs/mae --figures spectrum,cka these two, of two runs
    python -m tools.analyze runs/mff --record results/mff.json      what its log tells, in one small file
    python -m tools.analyze runs/mff runs/mae --figures spectrum,cka,attention --record results/features.json
    python -m tools.analyze results/features.json                   the same three, without the encoders

A RUN is the folder of a run, or a file that --record wrote, or metrics.json of a probe. The figures:

    weights          the weight of every fused level over training (MFF, arXiv 2308.00261, figure 1)
    curves           loss, learning rate, gradient norm and throughput over the images seen
    layers           what a linear probe found in each block: of folders of tools.probe_layers
    spectrum         relative log amplitude of each block's features, and of the last before and after fusion
    cka              similarity of the layers of a run, and of those of any two runs
    attention        how far each head attends, in pixels

Each is written as .png, as .svg, which has a dark palette too, and as .json, the numbers in it. The last
three look at unmasked images: the evaluation crop of the first run's validation images, or of what --data
names. A block's features are its own output, before any norm. Where --figures names some of these three,
--record keeps what they show instead of the log: spectrum and attention in any case, cka where it is named
and the encoders are of one size. Such a record is drawn alone, under the names that its runs had.
"""

import os
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path

from mff_data.decode import DataFlags, reading_of
from mff_data.sources import describe_files, open_data
from mff_min.config import REQUIRED, check_ranges, knob, opt, parse
from mff_min.errors import UserError
from mff_run.files import make_folder
from mff_run.jsonfile import is_number
from mff_run.process import run
from mff_run.world import describe_environment, pick_ops, start_world
from mff_weights.pretrained import white_of
from tools.comparison import COLOURS as OF_METHODS
from tools.comparison import WEIGHTS_NOTE
from tools.examine import Findings, difference_of_sizes, examine, open_subject, similarities
from tools.figures import LINES, Figure, HeatMap, Panel, Series, check_matplotlib, save
from tools.measures import frequencies, patch_distances
from tools.records import open_run, record_of_encoders, record_of_run, write_record


@dataclass(frozen=True)
class Config(DataFlags):
    # these change the figures
    runs: tuple[str, ...] = opt(REQUIRED, "folders of runs, or records of them")
    figures: str = opt("all", "of the list above, separated by commas; all: those that the runs tell enough "
                              "for")
    names: str = opt("", "of the runs, separated by commas; not given: what tells their paths apart")
    key: str | None = opt(None, "of checkpoints with several encoders: which, for example teacher")
    data: str = opt("", "images to look at, as --data of the stages; not given: the first run's")
    images: int = opt(256, "how many of them at most, spread over the validation images", least=4)
    batch_size: int = opt(64, "images of a minibatch; cka sums over minibatches", least=4)

    # these change only how they are made
    output_dir: str = knob("", "folder of the figures; not given: RUN/figures, or runs/figures of several")
    prefix: str = knob("", "what the names of the files begin with")
    record: str = knob("", "instead of figures, write what they are drawn from to this .json: one run's log "
                           "and metrics, or with --figures of encoders what these show, of any runs")
    workers: int = knob(0, "loader processes", least=0, most=1024)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    ops: str = knob("auto", "implementation of the kernels", choices=["auto", "torch", "triton"])
    cache_dir: str = knob("runs/cache", "where the embedded images are kept")


# ---------------------------------------------------------------- figures from what runs wrote


def draw_weights(cfg, runs):
    """A panel for each run: the softmaxed weight of its levels, coloured by depth."""
    panels = []
    for each in runs:
        depth, blocks, points = each.fusion_weights()
        series = [Series(f"block {block}", [(x, weights[i]) for x, weights in points], (),
                         block / (depth - 1), dots=len(points) == 1, tag=f"block {block}")
                  for i, block in enumerate(blocks)]
        levels = "1 level"
        if len(blocks) > 1:
            equal = [(x, 1 / len(blocks)) for x in (points[0][0], points[-1][0])]
            series.append(Series("equal", equal, (), "grey", dash=4))
            levels = f"{len(blocks)} levels"
        panels.append(Panel(f"{each.name}: {levels}", "images seen", "weight", None, series, zero=False))
    panels.sort(key=lambda panel: len(panel.series))
    return Figure("Fusion weight of every level over training", panels, columns=min(3, len(panels)),
                  width=800 if len(panels) == 1 else 400, note=WEIGHTS_NOTE)


def draw_curves(cfg, runs):
    """A panel for each quantity that a log holds, the runs in it by the images that they have seen."""
    panels = []
    for key, label in (("loss", "loss"), ("lr", "learning rate"), ("grad_norm", "gradient norm"),
                       ("img_per_s", "images a second")):
        series = []
        for each, colour in zip(runs, colours([each.name for each in runs]), strict=True):
            points = each.curve(key)
            finite = [point for point in points if is_number(point[1])]
            if len(finite) < len(points):
                print(f"curves: {len(points) - len(finite)} values of {key} in {each.path} are not finite "
                      f"and are left out")
            if finite:
                series.append(Series(each.name, finite, (), colour, dots=len(finite) == 1))
        if series:
            panels.append(Panel("", "images seen", label, None, series, zero=key == "img_per_s"))
    return Figure("Training", panels, columns=min(2, len(panels)))


def draw_layers(cfg, runs):
    """A panel for each label, with the runs' accuracies over the layers."""
    return figure_of_layers({each.name: each.metrics["rows"] for each in runs})


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
        lines = [(name, "trained", name, own) for name, own in zip(runs, colours(list(runs)), strict=True)]
        lines.append((owner, "random", "random weights", "grey"))
        for source, kind, name, colour in lines:
            found = [row for row in runs[source] if (row["label"], row["kind"]) == (label, kind)
                     and row["layer"] in layers]
            blocks = [row for row in found if row["layer"] != "fused"]
            for part in filter(None, (blocks, found[len(blocks):])):    # no line leads to the fused feature
                points = [(layers.index(row["layer"]), row["acc1"]) for row in part]
                series.append(Series(name, points, [row["acc1_error"] for row in part], colour))
        for kind, dash, own in (("pixels", 6, "ink"), ("chance", 2, "teal")):
            for level in (row for row in runs[owner] if (row["label"], row["kind"]) == (label, kind)):
                ends = [(-0.5, level["acc1"]), (len(layers) - 0.5, level["acc1"])]
                series.append(Series(kind, ends, [0.0, level["acc1_error"]], own, dash))
        panels.append(Panel(f"label: {label}", "block", "accuracy, %", ticks, series))
    images = sorted({row["val_images"] for row in rows if row["kind"] == "trained" and "val_images" in row})
    return Figure(f"Linear probes of frozen features: accuracy on {' or '.join(map(str, images))} validation "
                  f"images, bars of one standard error", panels, share_y=True,
                  note=whose_baselines(owners) if len(runs) > 1 else "")


def whose_baselines(owners):
    """The note that says which run the baselines are of: {label: run}."""
    runs = dict.fromkeys(owners.values())
    if len(runs) == 1:
        return f"The baselines are of {next(iter(runs))}."
    return "The baselines are of " + ", ".join(f"{run} for {label}" for label, run in owners.items()) + "."


# ---------------------------------------------------------------- figures from encoders


def draw_spectrum(found):
    """Two panels a run, of blocks and of the last layer, and one of the highest frequency over the depth."""
    labels = "frequency, units of pi a patch", "relative log amplitude"
    panels, highest = [], []
    for each, colour in zip(found.encoders, colours([each.name for each in found.encoders]), strict=True):
        along = frequencies(each.grid)
        curves = {tap: [(x, y - values[0]) for x, y in zip(along, values, strict=True)]
                  for tap, values in each.amplitudes.items()}
        blocks = [tap for tap in curves if tap.startswith("block")]
        depth = len(blocks)
        series = [Series(tap, curves[tap], (), i / (depth - 1), tag=tap) for i, tap in enumerate(blocks)]
        panels.append(Panel(f"{each.name}: every block", *labels, None, series, zero=False))
        last = ((blocks[-1], "last block", "grey"), ("normed", "last block, normed", "green"),
                ("fused", "fused blocks, normed", "purple"))
        series = [Series(name, curves[tap], (), own) for tap, name, own in last if tap in curves]
        title = "before and after fusion" if "fused" in curves else "no fusion"
        panels.append(Panel(f"{each.name}: {title}", *labels, None, series, zero=False))
        points = [(i, curves[tap][-1][1]) for i, tap in enumerate(blocks)]
        highest.append(Series(each.name if len(found.encoders) > 1 else "", points, (), colour))
    ends = sorted({f"{frequencies(each.grid)[-1]:.3f}" for each in found.encoders})
    ticks = [str(i) for i in range(max(len(line.points) for line in highest))]
    panels.append(Panel(f"every block at the highest frequency, {' or '.join(ends)} pi", "block", labels[1],
                        ticks, highest, zero=False))
    return Figure("Fourier-transformed patch tokens: log amplitude, less that at frequency 0", panels,
                  columns=3 if len(found.encoders) == 1 else 2, width=420, share_y=True,
                  note=f"{found.about} Frequencies (k, k) on the diagonal, below Nyquist, which is 1; mean "
                       f"over images and channels after the log. White noise does not lie at 0 in this "
                       f"measure, so only differences between curves tell something. Blocks are before any "
                       f"norm. The last one, normed, is what transfers; the fused ones, normed, are what the "
                       f"decoder gets.")


def draw_cka(found):
    """A heat map for each run and for each pair of them."""
    panels = []
    for pair in found.cka:
        ticks = [str(i) for i in range(len(pair["values"]))]
        panels.append(HeatMap("", f"block of {pair['across']}", f"block of {pair['up']}", ticks, ticks,
                              pair["values"]))
    return Figure("Linear CKA of the patch tokens of two blocks", panels, columns=min(2, len(panels)),
                  width=440, height=420, note=f"{found.about} Unbiased HSIC, summed over minibatches. 1: "
                                              f"equal but for rotation and scale; about 0: independent.")


def draw_attention(found):
    """A panel for each run: a dot a head, their mean, and the distance of attention to all patches alike."""
    panels, several = [], len(found.encoders) > 1
    for each, colour in zip(found.encoders, colours([each.name for each in found.encoders]), strict=True):
        dots = [(block, pixels) for block, heads in enumerate(each.distances) for pixels in heads]
        means = [(block, sum(heads) / len(heads)) for block, heads in enumerate(each.distances)]
        uniform = float(patch_distances(each.grid, each.patch_size).mean())
        ends = [(-0.5, uniform), (len(means) - 0.5, uniform)]
        panels.append(Panel(each.name, "block", "attention distance, pixels", [str(i) for i, _ in means],
                            [Series("to all patches alike", ends, (), "ink", dash=4),
                             Series("mean of the heads" + f", {each.name}" * several, means, (), colour,
                                    dots=False),
                             Series("a head", dots, (), "grey", line=False)]))
    return Figure("How far each head attends", panels, columns=min(2, len(panels)), share_y=True,
                  note=f"{found.about} Mean over patches; the class token is left out.")


# ---------------------------------------------------------------- the way through


FROM_FILES = {"weights": draw_weights, "curves": draw_curves, "layers": draw_layers}
FROM_ENCODERS = {"spectrum": draw_spectrum, "cka": draw_cka, "attention": draw_attention}


def missing(figure, each):
    """What a run lacks for a figure, or "" where it has all that is needed."""
    if figure == "weights" and not any("fusion_weights" in line for line in each.log):
        return "fusion_weights in log.jsonl, which train_pretrain.py writes"
    if figure == "curves" and not each.log:
        return "log.jsonl with a line of training"
    for key in {"weights": ("global_batch", "model"), "curves": ("global_batch",)}.get(figure, ()):
        if key not in each.config:
            return f"{key} in its config"
    if figure == "layers" and not ("margins" in each.metrics and any(
            row["kind"] == "trained" for row in each.metrics["rows"])):
        return "metrics.json of tools.probe_layers"
    if figure == "cka" and each.findings and not each.findings.cka:
        return "cka: it was recorded without"
    if figure in FROM_ENCODERS and not each.findings and not each.has_encoder():
        return "last.pt or encoder.pt of train_pretrain.py"
    return ""


def short_names(paths):
    """As many last parts of each path as tell them apart, without .json and without an end that all share.

    The same path twice has the same name twice.
    """
    parts = [Path(path).resolve().parts for path in paths]
    while len(parts) > 1 and len({each[-1] for each in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [each[:-1] for each in parts]                           # a/pretrain, b/pretrain: a, b
    for count in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*each[-count:])).removesuffix(".json") for each in parts]
        if len(set(names)) == len(names):
            break
    return names


def colours(names):
    """One for each run of a figure: those of the methods, where all are named after methods."""
    own = [OF_METHODS[name] for name in names if name in OF_METHODS]
    if len(set(own)) == len(names):
        return own
    return LINES[:len(names)] if len(names) <= len(LINES) else [i / (len(names) - 1) for i in
                                                                range(len(names))]


def choose_figures(cfg, runs):
    """{figure: the runs in it}, saying what is left out. Raises UserError where a figure named cannot be."""
    known = [*FROM_FILES, *FROM_ENCODERS]
    asked = known if cfg.figures == "all" else cfg.figures.split(",")
    chosen = {}
    for figure in asked:
        if figure not in known:
            raise UserError(f"--figures {figure}: expected some of {', '.join(known)}, or all")
        lacking = [(each, need) for each in runs if (need := missing(figure, each))]
        for each, need in lacking:
            if cfg.figures != "all":
                raise UserError(f"--figures {figure}: {each.path} lacks {need}")
            print(f"{figure}: without {each.path}, which lacks {need}")
        chosen[figure] = [each for each in runs if not missing(figure, each)]
    chosen = {figure: able for figure, able in chosen.items() if able}
    if not chosen:
        raise UserError(f"{', '.join(cfg.runs)}: no figure can be drawn of what is there")
    return chosen


def open_runs(paths, names="", most=None):
    """The runs at these paths, with what open_run keeps; names is as --names. Raises UserError."""
    given, names = names, names.split(",") if names else short_names(paths)
    if not given and len(set(names)) < len(names):
        raise UserError(f"two of {' '.join(paths)} would have one name: expected different runs, or --names")
    if len(names) != len(paths) or len(set(names)) < len(names):
        raise UserError(f"--names {given}: expected {len(paths)} names that differ, one a run")
    return [open_run(path, name, print, most) for path, name in zip(paths, names, strict=True)]


def check_encoders(cfg, runs):
    """Raise UserError where a record of encoders is not drawn alone."""
    for each in runs:
        if each.findings and (len(runs) > 1 or cfg.names or cfg.record):
            raise UserError(f"{each.path} is a record of encoders: expected no other run, no --names and no "
                            f"--record")
    return runs


def main(cfg):
    """Draw the figures that cfg asks for, or write --record; returns {figure: path of its .png}."""
    check_ranges(cfg)
    if not cfg.record:
        check_matplotlib()
    runs = open_runs(cfg.runs, cfg.names)
    check_encoders(cfg, runs)
    of_encoders = set(cfg.figures.split(",")) & set(FROM_ENCODERS)
    if cfg.record:
        check_record(cfg, of_encoders)
        if not of_encoders:
            write_record(cfg.record, record_of_run(runs[0]))
            return {}
    chosen = choose_figures(cfg, runs)
    with start_world(cfg.device) as world:
        if world.size > 1:
            raise UserError("tools.analyze runs in one process: expected no --nproc-per-node")
        if cfg.record:
            found = measure(cfg, runs, chosen, "--record", Path(cfg.record).parent, world)
            write_record(cfg.record, record_of_encoders(found, describe_environment(world)))
            return {}
        return draw(cfg, chosen, world)


def check_record(cfg, of_encoders):
    """Raise UserError where --record cannot be written, or cannot hold what it is asked for."""
    if not cfg.record.endswith(".json") or len(cfg.runs) > 1 and not of_encoders:
        raise UserError(f"--record {cfg.record}: expected one run, and a name that ends in .json; of several "
                        f"runs, --figures of {', '.join(FROM_ENCODERS)}")
    if of_encoders and set(cfg.figures.split(",")) & set(FROM_FILES):
        raise UserError(f"--record {cfg.record}: expected --figures of {', '.join(FROM_ENCODERS)} alone")
    folder = Path(cfg.record).parent
    if not os.path.isdir(folder):
        raise UserError(f"--record {cfg.record} cannot be written: {folder} is no folder")


def measure(cfg, runs, figures, flag, folder, world):
    """The Findings that these figures show; the folder that flag names is made before the long part."""
    subjects = [open_subject(each.name, each.path, world.device, cfg.key) for each in runs]
    difference = difference_of_sizes(subjects) if "cka" in figures else ""
    if difference and cfg.figures != "all" and not (cfg.record and len(figures) > 1):
        raise UserError(f"--figures cka needs {difference}")
    if difference:
        print(f"cka: left out, it needs {difference}")
    data = cfg.data or runs[0].config.get("data", "")
    if not data:
        raise UserError(f"{runs[0].path} does not tell its data: expected --data")
    reading = reading_of(replace(cfg, white=cfg.white or white_of(runs[0].config)))
    source = open_data(data, "val", cfg.cache_dir, print, reading)
    describe_files(print, source, output=folder)
    make_folder(flag, folder)
    ops = pick_ops(cfg.ops, world.device)
    encoders, grams, seen = examine(subjects, source, cfg.images, cfg.batch_size, cfg.workers, ops, world)
    pairs = similarities(encoders, grams) if "cka" in figures and not difference else []
    return Findings(name_of(data), seen, cfg.batch_size, encoders, pairs)


def name_of(data):
    """What --data names, without the folders above it."""
    kind, colon, path = data.rpartition(":")
    return f"{kind}{colon}{os.path.basename(os.path.abspath(path))}"


def draw(cfg, chosen, world):
    """Draw and write the chosen figures; returns {figure: path of its .png}."""
    alone = len(cfg.runs) == 1 and Path(cfg.runs[0]).is_dir()
    folder = Path(cfg.output_dir or (Path(cfg.runs[0]) / "figures" if alone else "runs/figures"))
    figures = figures_of(cfg, chosen, folder, world)
    make_folder("--output-dir", folder)
    written = {name: folder / f"{cfg.prefix}{name}.png" for name in figures}
    for name, figure in figures.items():
        save(figure, written[name].with_suffix(""), command(cfg, name, chosen[name]))
        print(f"{written[name]}, .svg, .json")
    return written


def figures_of(cfg, chosen, folder, world):
    """{name: Figure} of the chosen ones; the folder is made before encoders are measured for them."""
    figures = {name: FROM_FILES[name](cfg, able) for name, able in chosen.items() if name in FROM_FILES}
    measured = [name for name in chosen if name in FROM_ENCODERS]
    if measured:
        runs = chosen[measured[0]]                                      # all three need the same
        found = runs[0].findings or measure(cfg, runs, measured, "--output-dir", folder, world)
        figures |= {name: FROM_ENCODERS[name](found) for name in measured if name != "cka" or found.cka}
    return figures


def command(cfg, figure, runs):
    """The command line that draws one figure of these runs alike."""
    paths, names = [str(each.path) for each in runs], [each.name for each in runs]
    words = ["python", "-m", "tools.analyze", *paths, "--figures", figure]
    if names != short_names(paths):
        words += ["--names", ",".join(names)]
    if figure in FROM_ENCODERS and not runs[0].findings:
        words += [word for field in fields(cfg) if field.name in ("data", "images", "batch_size")
                  and (value := getattr(cfg, field.name)) != field.default
                  for word in (f"--{field.name.replace('_', '-')}", str(value))]
    return shlex.join(words)


if __name__ == "__main__":
    run(main, parse(Config))
