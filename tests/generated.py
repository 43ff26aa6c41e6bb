"""The parts of README.md and docs/ that state measured figures, written from results/; a test compares them.

    python tests/generated.py                                           # rewrite them

So are the figures of docs/figures that documents show, but demo.png, which is a picture of the demo's run;
demo_dark.png is made of it.
"""

import contextlib
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mff_min.config import parse  # noqa: E402
from mff_min.mim import parse_out_indices  # noqa: E402
from mff_min.probe import shown  # noqa: E402
from mff_min.vit import MODELS  # noqa: E402
from mff_run.picture import GAP, INK, PAPER, TOP, scale_of  # noqa: E402
from mff_tasks.detection import shown as shown_detect  # noqa: E402
from mff_tasks.segmentation import shown as shown_segment  # noqa: E402
from tools import analyze, comparison, study  # noqa: E402
from tools.figures import COLOURS, save  # noqa: E402


def demo(result):
    """What `make demo` reached, from its run's metrics.json."""
    environment = result["environment"]
    on_cpu, version = environment["device"] == "cpu", environment["torch"].split("+")[0]
    weights = result["log"][-1]["fusion_weights"]
    blocks = parse_out_indices(result["config"]["out_indices"], MODELS[result["config"]["model"]]["depth"])
    heaviest, lightest = (weights.index(extreme(weights)) for extreme in (max, min))
    threads = f"{environment['threads']} CPU thread{'s' * (environment['threads'] > 1)}"
    where = threads if on_cpu else environment["device"]
    return (f"On {where}, with PyTorch {version}, `make demo` trained for {result['seconds'] / 60:.1f} "
            f"minutes. It ended with `{last_line(result)}`. Each of the "
            f"{len(weights)} fused levels begins with the weight {1 / len(weights):.3f}. Block "
            f"{blocks[heaviest]} ended with the largest weight, {weights[heaviest]:.3f}, and block "
            f"{blocks[lightest]} with the smallest, {weights[lightest]:.3f}.")


def last_line(result):
    """What train_pretrain.py ends with, from its metrics.json."""
    return (f"done: loss {result['val_loss']:.4f} on {result['val_images']} held-out images, where "
            f"predicting the mean of each masked patch gives {result['val_loss_of_means']:.4f}")


def probe_shapes_cpu(result):
    """What `make probe` found, from its metrics.json."""
    lines = []
    for label, margin in result["margins"].items():
        best = {kind: max((row for row in result["rows"] if (row["label"], row["kind"]) == (label, kind)),
                          key=lambda row: row["acc1"]) for kind in ("trained", "random", "pixels", "chance")}
        value = {kind: f"{row['acc1']:.1f} +- {row['acc1_error']:.1f} %" for kind, row in best.items()}
        lines.append(f"- {label}: {margin['layer']} {value['trained']}; the best layer with random weights "
                     f"{value['random']}, pixels {value['pixels']}, chance {best['chance']['acc1']:.1f} %: "
                     f"{margin['random']['standard_errors']:.1f} and "
                     f"{margin['pixels']['standard_errors']:.1f} standard errors ahead of random weights "
                     f"and of pixels")
    images = best["trained"]["val_images"]
    return (f"Accuracy of the best layer on {images} validation images, which also chose it, for the "
            f"baselines as well; mean of the patch tokens, logistic regression on {result['train_images']} "
            f"images, every number in results/probe_shapes_cpu.json:\n\n" + "\n".join(lines))


def finetuned(*paths):
    """What `make finetune` reached, from the metrics.json of its two runs, pre-trained and random."""
    result, random = (json.loads(Path(path).read_text()) for path in paths)
    difference = result["acc1"] - random["acc1"]
    error = math.hypot(result["acc1_error"], random["acc1_error"])
    here, there = (f"{metrics['acc1']:.1f} +- {metrics['acc1_error']:.1f} %" for metrics in (result, random))
    return (f"After {result['step']} steps of {result['config']['global_batch']} images, acc1 on "
            f"{result['val_images']} validation images is {here} from the pre-trained encoder and {there} "
            f"from random weights, {difference / error:.1f} standard errors apart; chance is 10 %. It is one "
            f"run of each.")


def finetune_shapes_cpu(result):
    """What `finetuned` says of the recorded runs."""
    paths = [f"results/finetune_{name}_cpu.json" for name in ("shapes", "random")]
    return (f"{finetuned(*(ROOT / path for path in paths))} The flags stand in the Makefile, the figures in "
            f"{' and '.join(paths)}.")


def segmented(*paths):
    """What `make segment` reached, from the metrics.json of its two runs, pre-trained and random."""
    result, random = (json.loads(Path(path).read_text()) for path in paths)
    difference = result["mIoU"] - random["mIoU"]
    error = math.hypot(result["mIoU_error"], random["mIoU_error"])
    here, there = (f"{metrics['mIoU']:.1f} +- {metrics['mIoU_error']:.1f} %" for metrics in (result, random))
    threads = result["environment"]["threads"]
    return (f"`make segment` trains the encoder of `make demo` for {result['step']} steps of "
            f"{result['config']['global_batch']} images, on {threads} CPU thread{'s' * (threads > 1)} "
            f"in {result['seconds'] / 60:.1f} minutes. Its mIoU on {result['val_images']} validation images "
            f"is {here}; from random weights the same network reaches {there}, {difference / error:.1f} "
            f"standard errors less. It is one run of each.")


def segmentation_shapes_cpu(result):
    """What `segmented` says of the recorded runs."""
    paths = [f"results/segmentation_{name}_cpu.json" for name in ("shapes", "random")]
    return f"{segmented(*(ROOT / path for path in paths))} The figures stand in {' and '.join(paths)}."


def detection_shapes_cpu(result):
    """What `make detect` reached, from its metrics.json."""
    threads = result["environment"]["threads"]
    return (f"`make detect` trains the encoder of `make demo` for {result['step']} steps of "
            f"{result['config']['global_batch']} images, on {threads} CPU thread{'s' * (threads > 1)} in "
            f"{result['seconds'] / 60:.1f} minutes. On {result['val_images']} validation images it reaches "
            f"{result['box_AP']:.1f} % box AP and {result['mask_AP']:.1f} % mask AP "
            f"({result['box_AP50']:.1f} % and {result['mask_AP50']:.1f} % at an overlap of a half). The "
            f"figures stand in results/detection_shapes_cpu.json.")


PROMISES = 12                                                           # of docs/reliability.md


def faults_cpu(result):
    """What `make faults` counted: a table of its faults and one of its controls, from their two records."""
    controls = json.loads((ROOT / "results" / "controls_cpu.json").read_text())
    tried, survived = (sum(row[key] for row in result["faults"]) for key in ("tried", "survived"))
    caught = sum(row["caught"] for row in controls["controls"])
    environment = result["environment"]
    lines = [f"{survived} of {tried} trials survived, in {result['seconds'] / 60:.1f} minutes on "
             f"{environment['cpus']} CPUs with PyTorch {environment['torch'].split('+')[0]}; "
             f"{caught} of {len(controls['controls'])} removed guards were caught.", "",
             "| promise | fault | tried | survived | most steps lost | also |", "|---|---|---|---|---|---|"]
    for promise in range(1, PROMISES + 1):
        rows = [row for row in result["faults"] if row["promise"] == promise]
        lines += [f"| {promise} | {row['name']} | {row['tried']} | {row['survived']} | {row['lost']} | "
                  f"{in_words(row['figures'])} |" for row in rows] or [f"| {promise} | not run | | | | |"]
    lines += ["", "| guard that was removed | fault | trials that survived without it |", "|---|---|---|"]
    lines += [f"| {row['name']} | {row['fault']} | "
              f"{row['found'].partition(' survived')[0] if row['caught'] else 'not caught'} |"
              for row in controls["controls"]]
    return "\n".join(lines)


def in_words(figures):
    """A dict of figures as text, their names in words; floats to three digits."""
    def text(value):
        if isinstance(value, dict):
            return ", ".join(f"{name} {text(of_name)}" for name, of_name in value.items())
        return f"{value:.3g}" if isinstance(value, float) else str(value)
    return "; ".join(f"{name.replace('_', ' ')}: {text(value)}" for name, value in figures.items())


def spread(found):
    """A ratio as text: the median and both quartiles."""
    low, high = found["quartiles"]
    return f"{found['median']:.2f} [{low:.2f}, {high:.2f}]"


def digits(value):
    """A number as text, with three digits that count and no exponent."""
    return f"{float(f'{value:.3g}'):.12g}"


def bench(results):
    """What tools.bench measured on each machine, a table for each group of its step, data and imports."""
    return "\n\n".join(text for result in results for text in machine(result)) or "Not run."


def machine(result):
    """The title and the tables of one record of tools.bench."""
    environment = result["environment"]
    threads = f", threads: {environment['threads']}" if result["device"] == "cpu" else ""
    versions = ", ".join(f"{name} {version}" for name, version in result["packages"].items() if version)
    yield f"`{result['command']}` on {result['device']}{threads} ({versions}):"
    for group in result["groups"]:
        yield "\n".join(table(group))


def table(group):
    """The lines of a group's table; what was not run says so."""
    yield f"| {group['name']} | img/s | x | MFU, % | MiB | waiting, % |"
    yield "|---|---|---|---|---|---|"
    for row in group["rows"]:
        name = " ".join(row[key] for key in ("name", "dtype", "mode") if key in row)
        if "not_run" in row:
            yield f"| {name} | not run: {row['not_run']} | | | | |"
            continue
        rate = digits(row["img_per_s"]) if "img_per_s" in row else f"{row['median']:.2f} s"
        ratio = spread(row["speed_over_baseline"]) if "speed_over_baseline" in row else ""
        shares = [f"{100 * row[key]:.1f}" if key in row else "" for key in ("mfu", "data_wait")]
        if "mfu_datasheet" in row:
            shares[0] += f" ({100 * row['mfu_datasheet']:.1f} of the data sheet)"
        peak = f"{row['peak_bytes'] / 2 ** 20:.0f}" if row.get("peak_bytes") else ""
        yield f"| {name} | {rate} | {ratio} | {shares[0]} | {peak} | {shares[1]} |"


def stages():
    """The last line of each stage, as the runs in results/ ended."""
    names = ("demo", "probe_protocol_cpu", "finetune_shapes_cpu", "segmentation_shapes_cpu",
             "detection_shapes_cpu")
    demo, probe, finetune, segment, detect = (json.loads((ROOT / "results" / f"{name}.json").read_text())
                                      for name in names)
    return (f"```\ntrain_pretrain.py  {last_line(demo)}\ntrain_probe.py     done: {shown(probe)}\n"
            f"train_finetune.py  done: {shown(finetune)}\n"
            f"train_segment.py   done: {shown_segment(segment)}\n"
            f"train_detect.py    done: {shown_detect(detect)}\n```")


ROOMS = {"train_*.py": "the stages: each is a whole recipe, from its flags to its evaluation",
         "mff_min": "the method: ViT, masking, fusion, targets, augmentation, optimizers",
         "kernels": "every op in plain PyTorch, and the Triton kernels beside it "
                    "(imported as `mff_min.kernels`)",
         "mff_data": "where images come from: folders, packs, CIFAR, embedded images",
         "mff_run": "what keeps a run alive: checkpoints, logs, processes, signals",
         "mff_weights": "weights of five families of names",
         "mff_tasks": "what the paper's appendix adds: UPerNet for ADE20K, Mask R-CNN, feature targets",
         "tools": "everything that is no stage: figures, conversion, studies, benchmarks",
         "tests": "each test's name is the claim that it checks"}


def rooms():
    """A table of what lies where, with the lines of its Python files, in hundreds."""
    rows = ["| room | lines | what is in it |", "|---|---|---|"]
    for room, text in ROOMS.items():
        paths = ROOT.glob(room) if room.endswith(".py") else (ROOT / room).rglob("*.py")
        lines = sum(len(path.read_text().splitlines()) for path in paths)
        rows.append(f"| `{room}` | {max(round(lines, -2), 100):,} | {text} |")
    return "\n".join(rows)


SUMMARIES = {"stages": stages, "rooms": rooms}                          # of several files
BLOCKS = {"demo": demo, "probe_shapes_cpu": probe_shapes_cpu,           # each from results/<name>.json
          "finetune_shapes_cpu": finetune_shapes_cpu, "segmentation_shapes_cpu": segmentation_shapes_cpu,
          "detection_shapes_cpu": detection_shapes_cpu,
          "faults_cpu": faults_cpu}
STUDIES = ("study_shapes_cpu", "study_imagenette_cpu", "study_imagenette_gpu", "study_shapes_cpu_minutes",
           "study_imagenette_cpu_minutes")
SUBJECTS = "step", "segment", "detect", "data", "imports"
MACHINES = {"bench": (bench, SUBJECTS)}                                 # each from <subject>_<device>.json


def of_encoders(results):
    """For each record of encoders of seed 0 in a folder results/, the flags that draw it."""
    return [f"results/{path.name} --figures spectrum,cka,attention --prefix {path.stem.removesuffix('seed0')}"
            for path in sorted(results.glob("features_*_seed0.json"))]


FIGURES = ("results/demo.json --figures weights --prefix demo_",        # what tools.analyze draws of results/
           "results/probe_shapes_cpu.json --figures layers --names MFF_MAE --prefix probe_",
           *of_encoders(ROOT / "results"))


def figures():
    """{name: (Figure, the command that draws it)} of those that README.md and docs/*.md show."""
    found = {}
    for flags in FIGURES:
        cfg = parse(analyze.Config, flags.split())
        with contextlib.chdir(ROOT):                                    # the commands name results/
            chosen = analyze.choose_figures(cfg, analyze.open_runs(cfg.runs, cfg.names))
        for kind, figure in analyze.figures_of(cfg, chosen, None, None).items():
            found[cfg.prefix + kind] = figure, analyze.command(cfg, kind, chosen[kind])
    for name in STUDIES:
        path = ROOT / "results" / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            device = "cuda" if "_gpu" in name else "cpu"
            command = (f"python -m tools.study --preset {result['preset']} --data {result['data']} --device "
                       f"{device} --output-dir results --report --figures docs/figures")
            found |= {f"{name}_{kind}": (figure, command)
                      for kind, figure in comparison.figures_of(result).items()}
    texts = [path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))]
    shown = {name for text in texts for name in re.findall(r"figures/(\w+)\.svg", text)}
    return {name: each for name, each in found.items() if name in shown}


def draw(folder):
    """Write the figures into a folder: the SVG, which documents show, and the numbers."""
    for name, (figure, command) in figures().items():
        save(figure, folder / name, command)
        (folder / f"{name}.png").unlink()


def of_study(name):
    """What a study found, from its results file; with summary_ before its name, in short."""
    path = ROOT / "results" / f"{name.removeprefix('summary_')}.json"
    if not path.exists():
        return "Not run."
    result = json.loads(path.read_text())
    planned = study.plan(study.preset_of(result["preset"], result["data"]), list(study.METHODS), [0, 1, 2])
    if name.startswith("summary_"):
        return comparison.summary(result, planned)
    figures = [f"![{figure.title}](figures/{name}_{kind}.svg)"
               for kind, figure in comparison.figures_of(result).items()]
    return "\n\n".join([comparison.report(result, planned), *figures])


def features(name):
    """First and last blocks of two encoders, a row for each results/<name>_seed*.json, and the figures."""
    paths = sorted((ROOT / "results").glob(f"{name}_seed*.json"))
    records = [json.loads(path.read_text()) for path in paths]
    if not records:
        return "Not run."
    one, other = (encoder["name"] for encoder in records[0]["encoders"])
    last = len(records[0]["encoders"][0]["distances"]) - 1
    lines = [f"| seed | {one}: CKA of blocks 0 and {last} | {other}: the same | {one}: log amplitude of "
             f"block {last} | {other}: the same |", "|---|---|---|---|---|"]
    for path, record in zip(paths, records, strict=True):
        curves = [encoder["amplitudes"][f"block {last}"] for encoder in record["encoders"]]
        cells = [pair["values"][last][0] for pair in record["cka"] if pair["up"] == pair["across"]]
        cells += [curve[-1] - curve[0] for curve in curves]
        lines.append(f"| {path.stem.partition('_seed')[2]} | " + " | ".join(f"{x:.2f}" for x in cells) + " |")
    figures = [f"![{title} of the first of these seeds](figures/{name}_{figure}.svg)" for figure, title in
               (("spectrum", "Spectra"), ("cka", "CKA"), ("attention", "Attention distances"))]
    return "\n\n".join(["\n".join(lines), *figures])


def written(name):
    """The block called name, as a document has to hold it."""
    results = ROOT / "results"
    if name in SUMMARIES:
        text = SUMMARIES[name]()
    elif name.startswith("features_"):
        text = features(name)
    elif name.startswith(("study_", "summary_")):
        text = of_study(name)
    elif name in BLOCKS:
        path = results / f"{name}.json"
        text = BLOCKS[name](json.loads(path.read_text())) if path.exists() else "Not run."
    else:
        block, subjects = MACHINES[name]
        paths = [path for subject in subjects for path in sorted(results.glob(f"{subject}_*.json"))]
        text = block([json.loads(path.read_text()) for path in paths])
    return f"<!-- {name}: written by tests/generated.py -->\n{text}\n<!-- end -->"


NAMES = (*SUMMARIES, *BLOCKS, *MACHINES, *STUDIES, "features_shapes_cpu", "features_imagenette_cpu",
         "summary_study_imagenette_cpu")


def document(name):
    """The one of README.md and docs/*.md that has a place for the block called name."""
    found = [path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
             for _ in re.findall(rf"<!-- {name}: .*?<!-- end -->", path.read_text(), re.S)]
    assert len(found) == 1, f"{len(found)} places for {name}: {found}"
    return found[0]


def rewrite():
    """Put every block into its document, in the place of the one before."""
    for name in NAMES:
        path = document(name)
        path.write_text(re.sub(rf"<!-- {name}: .*?<!-- end -->", lambda _, name=name: written(name),
                               path.read_text(), flags=re.S))


def in_the_dark(picture, side):
    """A picture of mff_run.picture.grid on dark paper: its tiles, images of side pixels, stay the same."""
    pixels, size = np.asarray(picture.convert("RGB"), dtype=float), side * scale_of(side)       # (H, W, 3)
    light = np.array([INK, PAPER], dtype=float)                         # (2, 3)
    dark = np.array([list(bytes.fromhex(COLOURS[name][1][1:])) for name in ("ink", "paper")])
    found = dark[0] + (pixels - light[0]) / (light[1] - light[0]) * (dark[1] - dark[0])
    for top in range(TOP, len(pixels) - size + 1, size + GAP):
        for left in range(GAP, pixels.shape[1] - size + 1, size + GAP):
            tile = np.s_[top:top + size, left:left + size]
            found[tile] = pixels[tile]
    return Image.fromarray(found.clip(0, 255).round().astype(np.uint8))


def draw_demo(folder):
    """Write demo_dark.png beside demo.png, for readers who prefer the dark."""
    side = json.loads((ROOT / "results" / "demo.json").read_text())["config"]["img_size"][0]
    with Image.open(folder / "demo.png") as picture:
        in_the_dark(picture, side).save(folder / "demo_dark.png")


if __name__ == "__main__":
    rewrite()
    draw(ROOT / "docs" / "figures")
    draw_demo(ROOT / "docs" / "figures")
