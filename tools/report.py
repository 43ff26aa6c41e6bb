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
import fcntl
import hashlib
import html
import io
import json
import re
import shlex
import time
from dataclasses import dataclass, fields
from pathlib import Path

from PIL import Image

from mff_data.decode import DECODE_ERRORS, MAX_PIXELS, open_pillow
from mff_min.config import REQUIRED, check_ranges, knob, opt, parse, typed
from mff_min.errors import UserError, printable
from mff_run.files import LOCK, check_regular, make_folder, write_atomically
from mff_run.jsonfile import is_number, misfit, read_json
from mff_run.log import read_log
from mff_run.process import run
from mff_run.progress import duration
from mff_run.run import RunFlags
from tools import analyze
from tools.figures import COLOURS, HeatMap, Panel, Series, colour_of, luminance
from tools.records import Run

MOST_LINES, MOST_PICTURES, MOST_ROWS, MOST_TEXT = 2400, 2_600_000, 500, 600      # of a page, of all runs
MOST_BYTES = 5_000_000                                                  # of a page
PICTURE = re.compile(r"(?:reconstruction|features|segmentation)(?:-(\d+))?\.png")
CURVES = (("loss", "Loss", False, True), ("lr", "Learning rate", True, False),
          ("grad_norm", "Gradient norm", False, True), ("img_per_s", "Throughput, images per second", True, False))
AFTER_TRAINING = {"val_loss": "Loss of held-out images", "acc1": "Top-1 accuracy, %", "mIoU": "mIoU, %"}
MEASURED = ("layers", "spectrum", "cka", "attention")                   # figures of tools.analyze
NUMBERS = [[float]]
FIGURE = {"title": str, "note": str, "panels": [
    ({"x_label": str, "y_label": str, "x_ticks": [str], "y_ticks": [str], "values": NUMBERS},
     {"title": str, "x_label": str, "y_label": str, "ticks": (type(None), [str]),
      "series": [{"name": str, "points": NUMBERS, "errors?": [float]}]})]}
CONSTANT = ("equal", "chance", "pixels", "to all patches alike", "no difference")
HONEST = ("The target of these models is each patch with its own mean and contrast removed. The pasted prediction "
          "takes both from the true patch, so even an untrained model shows the coarse image: compare it with the "
          "column of patch means, where there is one.")


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
        last = self.run.log[-1]["step"] if self.run.log else 0
        return max(last, found) if type(found := self.run.metrics.get("step")) is int else last

    @property
    def ended(self):
        """Whether it was measured after its last step, or is the record of a measurement."""
        return bool(self.run.metrics or self.run.findings) and self.step >= (self.total or 0)


# ---------------------------------------------------------------- what the folder tells


def css(colour):
    """A colour of figures.py in both palettes, as CSS."""
    return f"light-dark({colour_of(colour)},{colour_of(colour, True)})"


def is_held(folder):
    """Whether a process holds the lock of a run's folder."""
    try:
        with open(folder / LOCK, "rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:                                                     # no such file, or no such locks
        pass
    return False


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
    runs = analyze.open_runs(cfg, MOST_LINES // len(cfg.runs))
    found = []
    for each, colour in zip(runs, analyze.colours(runs), strict=True):
        in_folder = each.path.is_dir()
        environment, bad, alive = each.metrics.get("environment", {}), [], False
        if in_folder:
            alive = is_held(each.path)
            bad = read_log(each.path / "bad_samples.jsonl", say)
            if (each.path / "env.json").exists():
                environment = read_json(each.path / "env.json", hint="move it away, and the page is without it")
        environment = environment if isinstance(environment, dict) else {}
        pictures = read_pictures(each.path, MOST_PICTURES // len(runs), say) if in_folder else []
        if not (each.log or each.metrics or each.findings or pictures or alive):
            raise UserError(f"{each.path} has nothing to show: expected log.jsonl with a line of training, "
                            f"metrics.json or a picture; train it first (a stage with --output-dir {each.path})")
        found.append(Shown(each, css(colour), environment, bad, pictures, total_of(each), alive))
    return found


def read_pictures(folder, most, say):
    """[(step, WebP, width, height)] of a run's pictures: as many as have room, spread over the training."""
    paths = {}
    for path in sorted(folder.glob("*.png")):
        if match := PICTURE.fullmatch(path.name):
            paths[int(match[1][:15]) if match[1] else None] = path
    last = paths.pop(None, None)                                        # the same as the one of the last step
    paths = sorted(paths.items()) or [(0, last)] * (last is not None)
    while True:
        pictures = list(filter(None, (small_picture(*each, most // 4, say) for each in paths)))
        if sum(len(each[1]) for each in pictures) <= most or len(paths) < 3:
            return pictures
        kept = sorted({round(i * (len(paths) - 1) / (len(paths) // 2)) for i in range(len(paths) // 2 + 1)})
        paths = [paths[i] for i in kept]


def small_picture(step, path, most, say):
    """(step, WebP, width, height) of a picture, in at most so many bytes, or None where it cannot be read."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            image = open_pillow(file, MAX_PIXELS).convert("RGB")
        image.thumbnail((1520, 2400))
        for quality in (90, 75, 50, 25, 5):
            image.save(data := io.BytesIO(), "WEBP", quality=quality)
            if data.tell() <= most:
                break
        return step, data.getvalue(), *image.size
    except (UserError, *DECODE_ERRORS) as error:
        say(f"warning: {path} cannot be shown and is left out: {error}")


# ---------------------------------------------------------------- HTML


def text(value):
    """A value as text of the page: escaped, cut where it is long, without what steers a terminal or a line."""
    value = value if isinstance(value, str) else json.dumps(value, default=str)
    shown = value if len(value) <= MOST_TEXT else f"{value[:MOST_TEXT]} ... ({len(value)} characters)"
    return html.escape("".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1]
                               for letter in shown))


def setting(value):
    """A setting as it would be typed."""
    return "not given" if value is None else text(typed(tuple(value)) if isinstance(value, list) and value and not
                                                  any(isinstance(each, list | dict) for each in value) else value)


def table(head, rows, caption=""):
    """A table whose first column names its rows; the cells are HTML."""
    more = f"<p class=quiet>and {len(rows) - MOST_ROWS} more</p>" if len(rows) > MOST_ROWS else ""
    lines = ["".join(f"<th scope=col>{cell}</th>" for cell in head)]
    for first, *cells in rows[:MOST_ROWS]:
        lines.append(f"<th scope=row>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in cells))
    return (f"<div class=scroll tabindex=0><table>{caption and f'<caption>{caption}</caption>'}"
            + "".join(f"<tr>{line}</tr>" for line in lines) + f"</table></div>{more}")


def compared(shown, values, render, only=None):
    """A table of dicts, one per run, a row for each name; with only, of the rows that differ (or do not)."""
    names = list(dict.fromkeys(name for each in values for name in each))
    rows = []
    for name in names:
        cells = [render(each[name]) if name in each else "" for each in values]
        if only is None or (len(set(cells)) > 1) == only:
            rows.append((text(name), *cells))
    return table(["", *(text(each.run.name) for each in shown)], rows) if rows else ""


def section(title, *parts):
    """A section of the page, or "" where it has no parts."""
    inside = "\n".join(filter(None, parts))
    return f"<section><h2>{title}</h2>\n{inside}</section>" if inside else ""


def card(each):
    """What a run is, how far it is, and what it ended with."""
    name, parts = text(each.run.name), []
    config = each.run.config
    about = [config.get("model"), f"on {config['data']}" if config.get("data") else None,
             f"global batch {config['global_batch']}" if "global_batch" in config else None]
    parts.append(f'<p class=quiet>{text(", ".join(str(part) for part in about if part))}</p>')
    parts.append(f"<p>{state_of(each)}</p>")
    if each.total and each.run.log:
        parts.append(f'<progress max="{each.total}" value="{each.step}" aria-label="steps of {name}"></progress>')
    losses = [line["loss"] for line in each.run.log if is_number(line.get("loss"))]
    found = results_of(each.run.metrics)
    for key, label in (("acc1", "top-1"), ("mIoU", "mIoU"), ("val_loss", "loss of held-out images")):
        if key in found:
            value = f"{found[key]} %" if key != "val_loss" else found[key]
            parts.append(f"<p><b>{value}</b> {label}</p>")
            break
    else:
        if losses:
            parts.append(f"<p><b>{short(losses[-1])}</b> loss at the last logged step</p>")
    if "val_loss_of_means" in found:
        parts.append(f"<p class=quiet>{found['val_loss_of_means']} is the loss of predicting patch means</p>")
    if argv := each.environment.get("argv"):
        words = argv if isinstance(argv, list) else [argv]
        parts.append(f"<p><code>python {text(shlex.join(map(str, words)))}</code></p>")
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


def short(value):
    """A number in a few digits."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"


def results_of(metrics):
    """{name: text} of the numbers in metrics.json, each with its error."""
    numbers = {name: value for name, value in metrics.items() if is_number(value) and name != "step"}
    return {name: short(value) + (f" ± {short(numbers[f'{name}_error'])}" if f"{name}_error" in numbers else "")
            for name, value in numbers.items()
            if not (name.endswith("_error") and name.removesuffix("_error") in numbers)}


def picture_figures(shown):
    """The pictures of every run, of which script shows one, under a slider; "" where there are none."""
    figures = []
    for each in shown:
        images = []
        for i, (step, data, width, height) in enumerate(each.pictures):
            hidden = " hidden" if i < len(each.pictures) - 1 else ""
            source = base64.b64encode(data).decode()
            images.append(f'<img src="data:image/webp;base64,{source}" width={width} height={height} '
                          f'data-step={step} alt="What {text(each.run.name)} predicts at step {step}"{hidden}>')
        if images:
            figures.append(f'<figure>{"".join(images)}<figcaption>{text(each.run.name)}, <span class=at>'
                           f"step {each.pictures[-1][0]}</span></figcaption></figure>")
    if not figures:
        return ""
    count = len(steps_of(shown))
    slider = ('<label for=slider>Pictures of training: <output id=at for=slider></output></label>'
              f'<input type=range id=slider min=0 max={count - 1} value={count - 1}>') if count > 1 else ""
    honest = any(each.run.config.get("norm_pix_loss") for each in shown if each.pictures)
    return (f'<div>{slider}<div class=pictures>{"".join(figures)}</div>'
            + f"<p class=quiet>{HONEST}</p>" * honest + "</div>")


def steps_of(shown):
    """The steps at which some run has a picture."""
    return sorted({picture[0] for each in shown for picture in each.pictures})


# ---------------------------------------------------------------- charts


class Charts:
    """The charts of a page: what script draws, and the columns that they are drawn from."""

    def __init__(self):
        self.charts, self.logs = [], []

    def columns(self, each, lines, keys):
        """The number of a log with its lines' columns: steps, epochs, images seen and keys."""
        batch = each.run.config.get("global_batch")
        x = {"step": [line["step"] for line in lines], "epoch": [line.get("epoch") for line in lines],
             "images": [line["step"] * batch if batch else None for line in lines]}
        y = {key: [line.get(key) for line in lines] for key in keys}
        weights = [line.get("fusion_weights", []) for line in lines]
        for i in range(max(map(len, weights), default=0)):
            y[f"weight {i}"] = [found[i] if i < len(found) else None for found in weights]
        self.logs.append({"x": {name: plain(values) for name, values in x.items()},
                          "y": {name: plain(values) for name, values in y.items()}})
        return len(self.logs) - 1

    def add(self, title, series, note="", **more):
        """The HTML of a chart that script fills in."""
        self.charts.append(dict(title=title, series=series) | more)
        return (f"<figure class=chart data-chart={len(self.charts) - 1}><figcaption><h3>{text(title)}</h3></figcaption>"
                f'<div class=tip role=status hidden></div>{note and f"<p class=quiet>{text(note)}</p>"}'
                f"<details><summary>Numbers</summary><div class='scroll tall' tabindex=0></div></details></figure>")

    def panel(self, panel, title, runs):
        """The HTML of a panel of figures.py: a chart, or a table of coloured cells."""
        if isinstance(panel, HeatMap):
            return heat_table(panel)
        series = [dict(name=line.name, points=[list(point) for point in line.points], colour=css(line.colour),
                       dash=line.dash, dots=line.dots and not line.dash, line=line.line, tag=line.tag or line.name)
                  | ({"errors": list(line.errors)} if len(line.errors) else {}) for line in panel.series]
        return self.add(": ".join(filter(None, (panel.title or title, panel.y_label))), series, x=panel.x_label,
                        ticks=panel.ticks, zero=panel.zero, height=260)


def plain(values):
    """Values as JSON has them: what is no finite number becomes text, or null where there is nothing."""
    return [value if is_number(value) or value is None else str(value)[:40] for value in values]


def heat_table(panel):
    """A heat map as a table: the last row is the first of its values, as y runs upwards."""
    rows = []
    for name, values in reversed(list(zip(panel.y_ticks, panel.values, strict=True))):
        cells = []
        for value in values:
            place = min(max((value - panel.low) / (panel.high - panel.low), 0), 1)
            rgb = [a + (b - a) * place for a, b in zip((0.95, 0.96, 0.98), (0.05, 0.28, 0.55), strict=True)]
            ink = "#000" if luminance(rgb) > 0.179 else "#fff"
            back = "#" + bytes(round(255 * c) for c in rgb).hex()
            cells.append(f'<td style="background:{back};color:{ink}">{value:.2f}</td>')
        rows.append(f"<tr><th scope=row>{text(name)}</th>{''.join(cells)}</tr>")
    foot = "".join(f"<th scope=col>{text(name)}</th>" for name in panel.x_ticks)
    return (f"<div><table class=heat><caption>Down: {text(panel.y_label)}. Across: {text(panel.x_label)}."
            f"</caption>{''.join(rows)}<tr><td></td>{foot}</tr></table></div>")


def training_charts(charts, shown):
    """{name: HTML} of the curves that the logs hold, and of what was measured during the training."""
    found = {}
    logs = [charts.columns(each, each.run.log, [key for key, *_ in CURVES]) for each in shown]
    for key, title, zero, log in CURVES:
        series = [dict(log=logs[i], key=key, name=each.run.name, tag=each.run.name * (len(shown) > 1),
                       colour=each.colour, line=True) for i, each in enumerate(shown)
                  if any(is_number(line.get(key)) for line in each.run.log)]
        if series:
            found[key] = charts.add(title, series, zero=zero, log=log, height=300 if key == "loss" else 220)
    tests = [charts.columns(each, each.run.evaluations[-MOST_ROWS:], AFTER_TRAINING) for each in shown]
    for key, title in AFTER_TRAINING.items():
        series = [dict(log=tests[i], key=key, name=each.run.name, tag=each.run.name * (len(shown) > 1),
                       colour=each.colour, line=True, dots=True) for i, each in enumerate(shown)
                  if any(is_number(line.get(key)) for line in each.run.evaluations)]
        if series:
            found[key] = charts.add(title, series)
    for i, each in enumerate(shown):
        if not analyze.missing("weights", each.run):
            found[f"weights {i}"] = weights_chart(charts, each, logs[i])
    return found


def weights_chart(charts, each, log):
    """The chart of a run's fusion weights: a line for each level, coloured by depth."""
    depth, blocks, _ = each.run.fusion_weights()
    series = [dict(log=log, key=f"weight {i}", name=f"block {block}", tag=f"block {block}",
                   colour=css(block / (depth - 1)), line=True) for i, block in enumerate(blocks)]
    note = f"Each of the {len(blocks)} levels begins with {1 / len(blocks):.3f}." if len(blocks) > 1 else ""
    return charts.add(f"Weight of every fused level, {each.run.name}", series, note, height=300)


def measured(charts, shown, say):
    """Sections of probes, spectrum, CKA and attention distance: of records, of probes, of RUN/figures."""
    figures, cfg = [], None
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
        figures.insert(0, analyze.draw_layers(cfg, probes))
    return "\n".join(section(text(figure.title), f"<p class=quiet>{text(figure.note)}</p>" if figure.note else "",
                             "<div class=panels>" + "".join(charts.panel(panel, figure.title, shown)
                                                            for panel in figure.panels) + "</div>")
                     for figure in figures)


def read_figure(path):
    """The Figure whose numbers tools.analyze wrote to a file. Raises UserError where it is another file."""
    hint = "move it away, or draw it anew with tools.analyze"
    found, panels = read_json(path, FIGURE, hint, 2 ** 19), []
    for panel in found["panels"]:
        if "values" in panel:
            if [len(row) for row in panel["values"]] != [len(panel["x_ticks"])] * len(panel["y_ticks"]):
                raise UserError(f"{path} holds a heat map with other cells than names: {hint}")
            panels.append(HeatMap("", *(panel[key] for key in ("x_label", "y_label", "x_ticks", "y_ticks", "values"))))
            continue
        lines = panel["series"]
        if any(len(point) != 2 for line in lines for point in line["points"]) or any(
                len(line.get("errors") or line["points"]) != len(line["points"]) for line in lines):
            raise UserError(f"{path} holds points that are no pairs, or other errors than points: {hint}")
        panels.append(Panel(panel["title"], panel["x_label"], panel["y_label"], panel["ticks"],
                            [Series(line["name"], line["points"], line.get("errors", ()), *looks_of(line["name"], i,
                                    len(lines))) for i, line in enumerate(lines)], zero=False))
    return analyze.Figure(found["title"], panels, note=found["note"])


def looks_of(name, i, count):
    """Colour and dash of a series of a figure that is known by its numbers alone."""
    if name in CONSTANT:
        return "grey", 4
    return (i / max(count - 1, 1) if count > len(analyze.LINES) else analyze.LINES[i]), 0


# ---------------------------------------------------------------- the page


def page_of(shown, say, refresh=0):
    """The page as text; with refresh, it is loaded again after so many seconds."""
    charts = Charts()
    curves = training_charts(charts, shown)
    several = len(shown) > 1
    names = ", ".join(each.run.name for each in shown)
    knobs = {field.name for field in fields(RunFlags)} | {"output_dir", "batch_size", "picture_every", "picture_images"}
    settings = [{name: value for name, value in each.run.config.items() if name not in knobs} for each in shown]
    differing = compared(shown, settings, setting, only=True) if several else ""
    left = "".join(curves.pop(name) for name in ["loss", *[name for name in curves if name.startswith("weights")][:1]]
                   if name in curves)
    switch = ('<fieldset><legend>Curves over</legend>' + "".join(
        f'<label><input type=radio name=x value={value}{" checked" * (value == "step")}> {name}</label>'
        for value, name in (("step", "steps"), ("epoch", "epochs"), ("images", "images seen")))
        + '<label><input type=checkbox id=log> logarithmic loss and gradient norm</label></fieldset>') if curves else ""
    thin = [f"{text(each.run.name)}: {len(each.run.log):,} of {each.run.logged:,} lines of the log are drawn, those "
            f"with the extremes of loss and gradient norm among them." for each in shown
            if len(each.run.log) < each.run.logged]
    body = [f"<header><h1>{text(names)}</h1><p class=quiet>Written {time.strftime('%Y-%m-%d %H:%M:%S')} by "
            f"mff_min's tools.report.</p></header><main>",
            f"<div class=runs>{''.join(map(card, shown))}</div>",
            differing and f"<h3>Settings that differ</h3>{differing}",
            f'<div class="first{" several" * several}"><div>{switch}{left}</div>{picture_figures(shown)}</div>',
            section("Training", "".join(f"<p class=quiet>{line}</p>" for line in thin),
                    f"<div class=panels>{''.join(curves.values())}</div>" if curves else ""),
            measured(charts, shown, say),
            section("Results", compared(shown, [results_of(each.run.metrics) for each in shown], text)),
            section("Files that could not be read", *(bad_samples(each) for each in shown if each.bad)),
            section("All settings", f"<details><summary>Every flag</summary>"
                    f"{compared(shown, [each.run.config for each in shown], setting)}</details>"),
            section("Environment", compared(shown, [{name: value for name, value in each.environment.items()
                                                     if name != "argv"} for each in shown], text)),
            "</main><noscript><p>Charts and the slider need JavaScript, which is in this page.</p></noscript>"]
    template = Path(__file__).with_suffix(".html").read_text()
    script = re.search(r"<script>(.*?)</script>", template, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = json.dumps(dict(charts=charts.charts, logs=charts.logs, steps=steps_of(shown)), allow_nan=False,
                      separators=(",", ":")).replace("<", "\\u003c")
    parts = dict(title=text(names) + " - report of mff_min", body="\n".join(filter(None, body)), data=data,
                 refresh=f'<meta http-equiv="refresh" content="{refresh}">' if refresh else "",
                 policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
                 colours=" ".join(f"--{name}: {css(name)};" for name in COLOURS))
    return re.sub(r"<!--([a-z]+)-->", lambda match: parts[match[1]], template)


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
    page = page_of(shown, say, refresh).encode("utf-8", "backslashreplace")
    if len(page) > MOST_BYTES:
        raise UserError(f"the page would have {len(page)} bytes: expected {MOST_BYTES} at most; name fewer runs")
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
