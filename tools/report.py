"""One page about runs: report.html, which needs no server, no network and nothing but a browser.

    python -m tools.report runs/mff                                 runs/mff/report.html
    python -m tools.report runs/mae runs/mff                        both side by side: runs/report.html
    python -m tools.report runs/mff runs/probed-layers results/features.json     with what was measured of it

A RUN is the folder of a stage, of tools.evaluate or of tools.probe_layers, or a file of tools.analyze
--record. The page has settings, curves with their numbers, the weight of every fused level (MFF, arXiv
2308.00261, figure 1), pictures of the training under a slider, evaluations with their errors, files that
could not be read, and the environment. It shows probes, spectrum, CKA and attention distance where
tools.analyze has left them in RUN/figures, or a record of them is named.

The template is report.html, beside this file. Everything that comes from a run is escaped, and the page's own
policy forbids it to fetch anything.
"""

import base64
import hashlib
import io
import json
import math
import re
import shlex
import time
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

from mff_data.decode import DECODE_ERRORS, MAX_PIXELS, open_pillow
from mff_min.config import REQUIRED, check_ranges, knob, opt, parse
from mff_min.errors import UserError
from mff_run.files import check_regular, is_held, make_folder, write_atomically
from mff_run.jsonfile import is_number, read_json
from mff_run.log import each_line
from mff_run.picture import OWED
from mff_run.process import run
from mff_run.progress import duration
from mff_run.run import RunFlags
from tools import analyze
from tools.figures import COLOURS, HeatMap, Panel, Series
from tools.page import MOST_ROWS, Charts, css, section, setting, short, table, text
from tools.records import Run

# Of a page, together for all its runs:
MOST_LINES, MOST_PICTURES, MOST_BAD = 2400, 18, 10_000                  # of logs; files that cannot be read
MOST_PICTURE_BYTES, MOST_BYTES = 2_600_000, 5_000_000
PICTURE = re.compile(r"(?:reconstruction|features|segmentation|detection)(?:-(\d+))?\.png")
CURVES = (("loss", "Loss", False, True), ("lr", "Learning rate", True, False),
          ("grad_norm", "Gradient norm", False, True),
          ("img_per_s", "Throughput, images per second", True, False))  # key, title, from 0, log
TESTS = {"val_loss": "Loss of held-out images", "acc1": "Top-1 accuracy, %", "mIoU": "mIoU, %",
         "box_AP": "AP of boxes, %", "mask_AP": "AP of masks, %"}
PART = re.compile(r"loss_\w{1,40}")                                     # of a loss that is a sum
MEASURED = ("layers", "spectrum", "cka", "attention")                   # figures of tools.analyze
NUMBERS = [[float]]
FIGURE = {"title": str, "note": str, "panels": [
    ({"x_label": str, "y_label": str, "x_ticks": [str], "y_ticks": [str], "values": NUMBERS},
     {"title": str, "x_label": str, "y_label": str, "ticks": (type(None), [str]),
      "series": [{"name": str, "points": NUMBERS, "errors?": [float]}]})]}
# Colour, dash, dots and line of series that tools.analyze draws alike in every figure.
LOOKS = {"to all patches alike": ("ink", 4), "pixels": ("ink", 6), "chance": ("teal", 2),
         "equal": ("grey", 4), "random weights": ("grey",), "a head": ("grey", 0, True, False)}
KNOBS = {field.name for field in fields(RunFlags)} | {"output_dir", "batch_size", "picture_every",
                                                      "picture_images"}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline';"
SWITCH = """<fieldset><legend>Curves over</legend>
<label><input type=radio name=x value=step checked> steps</label>
<label><input type=radio name=x value=epoch> epochs</label>
<label><input type=radio name=x value=images> images seen</label>
<label><input type=checkbox id=log> logarithmic loss and gradient norm</label></fieldset>"""


@dataclass(frozen=True)
class Config:
    # these change the page
    runs: tuple[str, ...] = opt(REQUIRED, "folders of runs, or records of them")
    names: str = opt("", "of the runs, separated by commas; not given: what tells their paths apart")

    # these change only where it is
    output: str = knob("", "the .html file; not given: RUN/report.html, or runs/report.html of several")


@dataclass(frozen=True)
class Shown:
    """A run and what else its folder tells."""
    run: Run
    colour: str                                                         # of its lines, as CSS
    environment: dict
    bad: list
    pictures: list                                                      # (step, WebP bytes, width, height)
    total: int | None                                                   # steps, where it is known
    alive: bool                                                         # a process holds its folder

    @property
    def step(self):
        """The last step that is known of."""
        return last_step(self.run)

    @property
    def ended(self):
        """Whether it was measured after its last step, or is the record of a measurement."""
        return bool(self.run.metrics or self.run.findings) and self.step >= (self.total or 0)


# ---------------------------------------------------------------- what the folder tells


def last_step(each):
    """The last step that a run's log or its metrics tell of."""
    last = each.log[-1]["step"] if each.log else 0
    return max(last, found) if type(found := each.metrics.get("step")) is int else last


def total_of(each):
    """The steps that a run is to take, or None where neither its flags nor its log tell."""
    if type(steps := each.config.get("steps")) is int:
        return steps
    epochs, line = each.config.get("epochs"), each.log[-1] if each.log else {}
    if is_number(epochs) and is_number(line.get("epoch")) and line["epoch"] > 0:
        return round(line["step"] * epochs / line["epoch"])
    return None


def gather(cfg, say):
    """A Shown for each run. Raises UserError where there is nothing to show of one."""
    runs = analyze.open_runs(cfg.runs, cfg.names, MOST_LINES // len(cfg.runs))
    found = []
    for each, colour in zip(runs, analyze.colours([each.name for each in runs]), strict=True):
        in_folder = each.path.is_dir()
        environment, bad, alive, pictures = each.metrics.get("environment", {}), [], False, []
        if in_folder:
            alive = is_held(each.path)
            bad = list(islice(each_line(each.path / "bad_samples.jsonl", say), MOST_BAD))
            pictures = read_pictures(each.path, last_step(each), max(MOST_PICTURES // len(runs), 3),
                                     MOST_PICTURE_BYTES // len(runs), say)
            if (each.path / "env.json").exists():
                environment = read_json(each.path / "env.json", hint="move it away, and it is not shown")
        environment = environment if isinstance(environment, dict) else {}
        if not (each.log or each.metrics or each.findings or pictures or alive):
            raise UserError(f"{each.path} has nothing to show: expected log.jsonl with a line of training, "
                            f"metrics.json or a picture; train it first, or name another run")
        found.append(Shown(each, css(colour), environment, bad, pictures, total_of(each), alive))
    return found


def read_pictures(folder, step, most, room, say):
    """[(step, WebP, width, height)] of a run's pictures: `most`, spread over the training, in `room` bytes.

    step is that of a picture alone, whose name has no number.
    """
    paths = {}
    for path in sorted(folder.glob("*.png")):
        if match := PICTURE.fullmatch(path.name):
            paths[int(match[1][:15]) if match[1] else None] = path
    last = paths.pop(None, None)                                        # the same as the one of the last step
    paths = sorted(paths.items()) or [(step, last)] * (last is not None)
    if len(paths) > most:
        paths = [paths[round(i * (len(paths) - 1) / (most - 1))] for i in range(most)]
    return list(filter(None, (small_picture(*each, room // len(paths), say) for each in paths)))


def small_picture(step, path, most, say):
    """(step, WebP, width, height) of a picture, in at most so many bytes, or None where it cannot be read."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            image = open_pillow(file, MAX_PIXELS).convert("RGB")
        width, height = image.size
        for side in (1520, 1000, 600, 300, 100):
            image.thumbnail((side, 2 * side))
            for quality in (85, 60):
                image.save(data := io.BytesIO(), "WEBP", quality=quality)
                if data.tell() <= most:
                    return step, data.getvalue(), width, height
    except (UserError, *DECODE_ERRORS) as error:
        say(f"warning: {path} cannot be shown and is left out: {error}")
    return None


# ---------------------------------------------------------------- HTML


def compared(shown, values, render, differ=None, most=MOST_ROWS, what="settings"):
    """A table of dicts, one per run, a row for each name; with differ, of the rows that differ, or do not.

    A run without any of the names has no column. A table of more than `most` rows is folded, under a line
    that says how many rows of what there are.
    """
    some = [(each, found) for each, found in zip(shown, values, strict=True) if found]
    rows = []
    for name in dict.fromkeys(name for _, found in some for name in found):
        cells = [render(found[name]) if name in found else None for _, found in some]
        if differ is None or (len(set(cells) - {None}) > 1) == differ:
            rows.append((text(name), *(cell or "" for cell in cells)))
    found = table(["", *(text(each.run.name) for each, _ in some)], rows) if rows else ""
    return f"<details><summary>{len(rows)} {what}</summary>{found}</details>" if len(rows) > most else found


def card(each):
    """What a run is, how far it is, and what it ended with."""
    name, parts = text(each.run.name), []
    config = each.run.config
    if each.run.findings:
        parts.append(f"<p>{text(each.run.findings.about)}</p>")
    about = [config.get("model"), f"on {config['data']}" if config.get("data") else None,
             f"global batch {config['global_batch']}" if "global_batch" in config else None]
    parts.append(f'<p class=quiet>{text(", ".join(str(part) for part in about if part))}</p>')
    if not each.run.findings:
        parts.append(f"<p>{state_of(each)}</p>")
    if each.total and each.run.log:
        parts.append(f'<progress max="{each.total}" value="{each.step}" aria-label="steps of {name}">'
                     f"</progress>")
    losses = [line["loss"] for line in each.run.log if is_number(line.get("loss"))]
    found = results_of(each.run.metrics)
    for key, label in (("acc1", "top-1"), ("mIoU", "mIoU"), ("box_AP", "AP of boxes"),
                       ("val_loss", "loss of held-out images")):
        if key in found:
            value = f"{found[key]} %" if key != "val_loss" else found[key]
            parts.append(f"<p><b>{value}</b> {label}</p>")
            break
    else:
        if losses:
            parts.append(f"<p><b>{short(losses[-1])}</b> loss at the last logged step</p>")
    if "mask_AP" in found:
        parts.append(f"<p class=quiet>{found['mask_AP']} % AP of masks</p>")
    if "val_loss_of_means" in found:
        parts.append(f"<p class=quiet>{found['val_loss_of_means']} is the loss of predicting patch means</p>")
    if argv := each.environment.get("argv"):
        words = argv if isinstance(argv, list) else [argv]
        words = "".join(f" <span>{text(shlex.quote(str(word)))}</span>" for word in words[:200])
        parts.append(f"<p><code>python{words}</code></p>")
    return f'<div class=run style="--own: {each.colour}"><h3>{name}</h3>{"".join(parts)}</div>'


def state_of(each):
    """How far a run is, as a sentence."""
    at = f"step {each.step:,}" + (f" of {each.total:,}" if each.total else "")
    if each.ended:
        seconds = each.run.metrics.get("seconds")
        took = f", {duration(seconds)} of training" if is_number(seconds) and 0 <= seconds < 1e9 else ""
        return f"Finished: {at}{took}." if each.run.log else "Measured."
    if not each.alive:
        return f"Stopped at {at}."
    line, batch = each.run.log[-1] if each.run.log else {}, each.run.config.get("global_batch")
    rate = line.get("img_per_s")
    if each.total and is_number(rate) and rate > 0 and batch:
        left = min((each.total - each.step) * batch / rate, 1e9)
        return f"Running: {at}, about {duration(max(left, 0))} left at {short(rate)} images per second."
    return f"Running: {at}."


def results_of(metrics):
    """{name: text} of the numbers in metrics.json, each with its error to two digits."""
    numbers = {name: value for name, value in metrics.items() if is_number(value) and name != "step"}
    found = {}
    for name, value in numbers.items():
        error = numbers.get(f"{name}_error", 0)
        if 0 < error < 1e6:
            digits = max(1 - math.floor(math.log10(error)), 0)
            found[name] = f"{value:.{min(digits, 12)}f} ± {error:.{min(digits, 12)}f}"
        elif not (name.endswith("_error") and name.removesuffix("_error") in found):
            found[name] = short(value)
    return found


def details_of(metrics):
    """{name: text} of the numbers inside metrics.json's objects, such as the IoU of each class."""
    return {f"{name}/{inner}": value for name, values in metrics.items()
            if isinstance(values, dict) and name not in ("config", "environment")
            for inner, value in results_of(values).items()}


def picture_figures(shown):
    """The pictures of every run, of which script shows one, under a slider; "" where there are none."""
    figures = []
    for each in shown:
        images = []
        for i, (step, data, width, height) in enumerate(each.pictures):
            hidden = " hidden" if i < len(each.pictures) - 1 else ""
            source = base64.b64encode(data).decode()
            alt = f"What {text(each.run.name)} predicts at step {step}"
            images.append(f'<img src="data:image/webp;base64,{source}" width={width} height={height} '
                          f'data-step={step} alt="{alt}"{hidden}>')
        if images:
            figures.append(f'<figure>{"".join(images)}<figcaption>{text(each.run.name)}, <span class=at>'
                           f"step {each.pictures[-1][0]}</span></figcaption></figure>")
    if not figures:
        return ""
    count = len(steps_of(shown))
    slider = ('<label for=slider>Pictures of training: <output id=at for=slider></output></label>'
              f'<input type=range id=slider min=0 max={count - 1} value={count - 1}>') if count > 1 else ""
    return f'<div>{slider}<div class=pictures>{"".join(figures)}</div>{owed(shown)}</div>'


def owed(shown):
    """What the reconstructions owe to their targets, once for all runs of which the same is true."""
    found = {}
    for each in shown:
        norm_pix, target = each.run.config.get("norm_pix_loss"), each.run.config.get("target", "pixels")
        if each.pictures and type(norm_pix) is bool and target == "pixels":
            found.setdefault(OWED[norm_pix], []).append(each.run.name)
    return "".join(f"<p class=quiet>{text(', '.join(names) + ': ') * (len(found) > 1)}{text(sentence)}</p>"
                   for sentence, names in found.items())


def steps_of(shown):
    """The steps at which some run has a picture."""
    return sorted({picture[0] for each in shown for picture in each.pictures})


# ---------------------------------------------------------------- charts


def training_charts(charts, shown):
    """{name: HTML} of the curves that the logs hold, and of what was measured during the training."""
    found = {}
    training = [each.run.log for each in shown]
    tests = [each.run.evaluations[-MOST_ROWS:] for each in shown]
    losses = list(map(losses_of, training))
    curves = [[key for key, *_ in CURVES] + parts for parts in losses]
    logs, log_of_tests = ([charts.columns(lines, each.run.config.get("global_batch"), keys)
                           for each, lines, keys in zip(shown, of_runs, names, strict=True)]
                          for of_runs, names in ((training, curves), (tests, [TESTS] * len(shown))))

    def series_of(key, of_runs, numbers, **more):
        return [dict(log=number, key=key, name=each.run.name, tag=each.run.name * (len(shown) > 1),
                     colour=each.colour, line=True, **more)
                for each, lines, number in zip(shown, of_runs, numbers, strict=True)
                if any(is_number(line.get(key)) for line in lines)]
    for key, title, zero, log in CURVES:
        if series := series_of(key, training, logs):
            found[key] = charts.add(title, series, zero=zero, log=log, height=300 if key == "loss" else 220)
    for key, title in TESTS.items():
        if series := series_of(key, tests, log_of_tests, dots=True):
            found[key] = charts.add(title, series)
    for i, (each, parts) in enumerate(zip(shown, losses, strict=True)):
        if len(parts) > 1:
            series = [dict(log=logs[i], key=key, name=key, tag=key.removeprefix("loss_"), line=True,
                           colour=css(analyze.LINES[j])) for j, key in enumerate(parts)]
            found[f"parts {i}"] = charts.add(f"Parts of the loss, {each.run.name}", series, zero=True,
                                             log=True, height=220)
        if not analyze.missing("weights", each.run) and len(each.run.fusion_weights()[1]) > 1:
            found[f"weights {i}"] = weights_chart(charts, each, logs[i])
    return found


def losses_of(lines):
    """The names of the parts that the lines' loss is the sum of, as many as there are colours."""
    names = dict.fromkeys(name for line in lines for name, value in line.items()
                          if PART.fullmatch(name) and is_number(value))
    return list(names)[:len(analyze.LINES)]


def weights_chart(charts, each, log):
    """The chart of a run's fusion weights: a line for each level, coloured by depth."""
    depth, blocks, _ = each.run.fusion_weights()
    series = [dict(log=log, key=f"weight {i}", name=f"block {block}", tag=f"block {block}",
                   colour=css(block / (depth - 1)), line=True) for i, block in enumerate(blocks)]
    note = f"Each of the {len(blocks)} levels begins with {1 / len(blocks):.3f}."
    return charts.add(f"Weight of every fused level, {each.run.name}", series, note, height=300)


def measured(charts, shown):
    """Sections of probes, spectrum, CKA and attention distance: of records, of probes, of RUN/figures."""
    figures = []
    for each in shown:
        if each.run.findings:
            figures += [analyze.FROM_ENCODERS[name](each.run.findings) for name in MEASURED[1:]
                        if name != "cka" or each.run.findings.cka]
        for name in MEASURED:
            path = each.run.path / "figures" / f"{name}.json"
            if each.run.path.is_dir() and path.exists():
                figures.append(read_figure(path))
    probes = [each.run for each in shown if not analyze.missing("layers", each.run)]
    if probes:
        figures.insert(0, analyze.draw_layers(None, probes))
    parts = []
    for figure in figures:
        panels = "".join(charts.panel(panel, figure.title) for panel in figure.panels)
        note = figure.note and f"<p class=quiet>{text(figure.note)}</p>"
        parts.append(section(text(figure.title), note, f"<div class=panels>{panels}</div>"))
    return "\n".join(parts)


def read_figure(path):
    """The Figure whose numbers tools.analyze wrote to a file. Raises UserError where it is another file."""
    hint = "move it away, or draw it anew with tools.analyze"
    found, panels = read_json(path, FIGURE, hint, 2 ** 19), []
    for panel in found["panels"]:
        if "values" in panel:
            if [len(row) for row in panel["values"]] != [len(panel["x_ticks"])] * len(panel["y_ticks"]):
                raise UserError(f"{path} holds a heat map with other cells than names: {hint}")
            names = "x_label", "y_label", "x_ticks", "y_ticks", "values"
            panels.append(HeatMap("", *(panel[name] for name in names)))
            continue
        lines = panel["series"]
        if any(len(point) != 2 for line in lines for point in line["points"]) or any(
                len(line.get("errors") or line["points"]) != len(line["points"]) for line in lines):
            raise UserError(f"{path} holds points that are no pairs, or other errors than points: {hint}")
        series = [Series(line["name"], line["points"], line.get("errors", ()),
                         *looks_of(line["name"], i, len(lines))) for i, line in enumerate(lines)]
        names = "title", "x_label", "y_label", "ticks"
        panels.append(Panel(*(panel[name] for name in names), series, zero=False))
    return analyze.Figure(found["title"], panels, note=found["note"])


def looks_of(name, i, count):
    """Colour, and more, of a series of a figure that is known by its numbers alone."""
    own = i / max(count - 1, 1) if count > len(analyze.LINES) else analyze.LINES[i]
    return LOOKS.get(name, (own,))


# ---------------------------------------------------------------- the page


def page_of(shown, refresh=0):
    """The page as text; while a run goes on it is loaded again after refresh seconds, where that is not 0."""
    charts, goes_on = Charts(), any(each.alive for each in shown)
    names = " and ".join(", ".join(each.run.name for each in shown).rsplit(", ", 1))
    body = "\n".join(filter(None, parts_of(shown, charts, names)))
    template = Path(__file__).with_suffix(".html").read_text()
    script = re.search(r"<script>(.*?)</script>", template, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(dict(charts=charts.charts, logs=charts.logs, steps=steps_of(shown)), allow_nan=False,
                      separators=(",", ":"))
    parts = dict(title=text(names) + " - report of mff_min", body=body, data=data.replace("<", "\\u003c"),
                 policy=f"{POLICY} script-src 'sha256-{digest}'",
                 refresh=f'<meta http-equiv="refresh" content="{refresh:g}">' if refresh and goes_on else "",
                 colours=" ".join(f"--{name}: {css(name)};" for name in COLOURS))
    return re.sub(r"<!--([a-z]+)-->", lambda match: parts[match[1]], template)


def parts_of(shown, charts, names):
    """The parts of the page from its top to its bottom, as HTML; "" for what there is not."""
    curves, several = training_charts(charts, shown), len(shown) > 1
    weights = [name for name in curves if name.startswith("weights")]
    first = ["loss", *[*weights, *filter(curves.get, TESTS)][:1]]
    left = (SWITCH if curves else "") + "".join(curves.pop(name, "") for name in first)
    settings = [{name: value for name, value in each.run.config.items() if name not in KNOBS}
                for each in shown]
    differing = compared(shown, settings, setting, differ=True, most=12) if several else ""
    environments = [{name: value for name, value in each.environment.items() if name != "argv"}
                    for each in shown]
    thin = [f"<p class=quiet>{text(each.run.name)}: {len(each.run.log):,} of {each.run.logged:,} lines of "
            f"the log are drawn, among them the extremes of loss and gradient norm.</p>" for each in shown
            if len(each.run.log) < each.run.logged]
    yield (f"<header><h1>{text(names)}</h1><p class=quiet>Written {time.strftime('%Y-%m-%d %H:%M:%S')} by "
           f"mff_min's tools.report.</p></header><main>")
    yield f"<div class=runs>{''.join(map(card, shown))}</div>"
    yield differing and f"<h3>Settings that differ</h3>{differing}"
    yield f'<div class="first{" several" * several}"><div>{left}</div>{picture_figures(shown)}</div>'
    yield section("Results", compared(shown, [results_of(each.run.metrics) for each in shown], text),
                  compared(shown, [details_of(each.run.metrics) for each in shown], text, most=0,
                           what="results in detail"))
    yield section("Training", *thin, curves and f"<div class=panels>{''.join(curves.values())}</div>")
    yield measured(charts, shown)
    yield section("Files that could not be read", *(bad_samples(each) for each in shown if each.bad))
    yield section("All settings", compared(shown, [each.run.config for each in shown], setting, most=0))
    yield section("Environment", compared(shown, environments, text))
    yield "</main><noscript><p>Charts and the slider need JavaScript; it is in this page.</p></noscript>"


def bad_samples(each):
    """The files that a run could not read, with the reasons."""
    rows = [(text(line.get("name", "")), text(line.get("reason", ""))) for line in each.bad]
    return table(["file", "reason"], rows, f"{text(each.run.name)}: {len(rows)} files")


def write_report(cfg, refresh=0, say=print):
    """Write the page that cfg asks for; returns (its path, what is shown of each run)."""
    alone = Path(cfg.runs[0])
    default = alone / "report.html" if len(cfg.runs) == 1 and alone.is_dir() else Path("runs/report.html")
    path = Path(cfg.output or default)
    if path.suffix != ".html":
        raise UserError(f"--output {path}: expected a name that ends in .html")
    shown = gather(cfg, say)
    page = page_of(shown, refresh).encode("utf-8", "backslashreplace")
    if len(page) > MOST_BYTES:
        raise UserError(f"the page would have {len(page)} bytes: expected {MOST_BYTES} at most; name fewer "
                        f"runs")
    make_folder("--output", path.parent)
    write_atomically(path, lambda file: file.write(page))
    return path, shown


def main(cfg):
    """Write the page; returns its path."""
    check_ranges(cfg)
    path, _ = write_report(cfg)
    print(f"{path}: open it in a browser")
    return path


if __name__ == "__main__":
    run(main, parse(Config))
