"""Charts of runs, as PNG and SVG from one description.

    figure = Figure("Loss of two runs", [Panel("", "step", "loss", None, [Series("a", points, (), "blue")])])
    save(figure, "runs/figures/loss", "python -m tools.analyze runs/a")       # loss.png, loss.svg, loss.json

A description is plain values: what is in a chart can be read off it, and loss.json holds it.
"""

import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mff_run.files import write_atomically
from tools.pens import PngPen, SvgPen, between, text_width

HEAT = ((247, 244, 238), (240, 178, 110), (190, 76, 96), (74, 34, 88))  # low to high
WHITE_FROM = 0.65                                                       # up to here text on HEAT is black


@dataclass(frozen=True)
class Series:
    """A line through (x, y) points, with an error bar at each where there are errors.

    errors are half lengths of the bars, or () for none; band is (low, high) at each point, a translucent
    area, or (). dash is the length in pixels of strokes and gaps, 0 for a solid line. Points have dots unless
    the line is dashed, which is a level; without line, dots alone. tag is a short name at the line's end, for
    lines in a colour of the ramp, which can be read.
    """
    name: str
    points: list
    errors: list
    colour: str | float                                                 # pens.COLOURS, or a place on its ramp
    dash: int = 0
    band: list = ()
    dots: bool = True
    line: bool = True
    tag: str = ""


@dataclass(frozen=True)
class Panel:
    """One pair of axes. The ticks are names at x = 0, 1, 2 ..., or None where x is a number with an axis.

    With zero, y begins at 0 where nothing is negative; else, and on a logarithmic axis, where the data do.
    """
    title: str
    x_label: str
    y_label: str
    ticks: list | None
    series: list
    x_log: bool = False
    y_log: bool = False
    zero: bool = True


@dataclass(frozen=True)
class HeatMap:
    """Numbers as colours, values[row][column]; the first row is at the bottom, as y runs upwards."""
    title: str
    x_label: str
    y_label: str
    x_ticks: list
    y_ticks: list
    values: list
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True)
class Tiles:
    """Images in rows, images[row][column], Pillow's, under the names of the columns."""
    title: str
    columns: list
    rows: list
    images: list


@dataclass(frozen=True)
class Figure:
    """Panels in so many columns (0: all side by side), a legend and a caption below them.

    A panel has the width and height given. With share_y, for panels of Panel alone, y runs over all alike.
    """
    title: str
    panels: list
    columns: int = 0
    width: int = 480
    height: int = 296
    share_y: bool = False
    note: str = ""                                                      # what a reader has to know, below


def chart(panels, title, width=480, height=330):
    """A picture of the panels side by side, with one legend below them; y runs over all panels alike."""
    figure = Figure(title, panels, width=width, height=height - 34, share_y=True)
    return draw(figure, PngPen, "").image


def save(figure, stem, command):
    """Write stem.png, stem.svg and stem.json: the chart twice, and the numbers behind it."""
    stem = Path(stem)
    png, svg = io.BytesIO(), draw(figure, SvgPen, command).svg(figure.title, command)
    draw(figure, PngPen, command).save(png, command)
    files = {".png": png.getvalue(), ".svg": svg.encode(), ".json": numbers_of(figure, command).encode()}
    stem.parent.mkdir(parents=True, exist_ok=True)
    for suffix, data in files.items():
        write_atomically(f"{stem}{suffix}", lambda file, data=data: file.write(data))


def numbers_of(figure, command):
    """What a figure shows, without its looks, as JSON: the texts and numbers of its panels."""
    shown = ("title", "x_label", "y_label", "ticks", "x_ticks", "y_ticks", "values", "columns", "rows")
    panels = []
    for panel in figure.panels:
        panels.append({name: getattr(panel, name) for name in shown if hasattr(panel, name)})
        if isinstance(panel, Panel):
            panels[-1]["series"] = [{name: value for name in ("name", "points", "errors", "band")
                                     if (value := getattr(line, name))} for line in panel.series]
    text = json.dumps(dict(title=figure.title, command=command, note=figure.note, panels=panels), indent=1)
    # A list of numbers stands in one line.
    return re.sub(r"\[\s+([^][{}\"]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


# ---------------------------------------------------------------- layout


def draw(figure, pen_class, command):
    """The pen after it has drawn the figure: a title, the panels, the legend, the note and the command."""
    columns = figure.columns or len(figure.panels)
    rows = math.ceil(len(figure.panels) / columns)
    width = columns * figure.width
    titles = wrapped(figure.title, width - 28, 15)
    panels_at = 14 + 20 * len(titles)
    panels_end, legend = panels_at + rows * figure.height, legend_places(figure.panels, width)
    texts = [part for text in (figure.note, command) if text for part in wrapped(text, width - 28, 10)]
    below = panels_end + 12 + 20 * (legend[-1][1] + 1 if legend else 0)
    pen = pen_class(width, below + 16 * len(texts) + 10)
    for i, text in enumerate(titles):
        pen.text(14, 10 + 20 * i, text, size=15)

    shared = y_axis(figure.panels) if figure.share_y else None
    for i, panel in enumerate(figure.panels):
        left, top = i % columns * figure.width, panels_at + i // columns * figure.height
        box = left, top, figure.width, figure.height
        if isinstance(panel, Panel):
            draw_panel(pen, panel, *box, shared or y_axis([panel]))
        elif isinstance(panel, HeatMap):
            draw_heat_map(pen, panel, *box)
        else:
            draw_tiles(pen, panel, *box)
    for x, row, line in legend:
        y = panels_end + 12 + 20 * row
        if line.line:
            pen.line([(x, y + 8), (x + 34, y + 8)], line.colour, 2, line.dash)
        else:
            pen.dot(x + 17, y + 8, line.colour)
        pen.text(x + 42, y, line.name)
    for i, text in enumerate(texts):
        pen.text(14, below + 16 * i, text, size=10, colour="grey")
    return pen


def legend_places(panels, width):
    """(x, row, series) of each name in the legend, once each, as many in a row as fit: the ramp first."""
    named = {}
    lines = [line for panel in panels for line in getattr(panel, "series", ()) if line.name]
    for line in sorted(lines, key=lambda line: 2 if isinstance(line.colour, str) else line.colour):
        named.setdefault(line.name, line)
    entry = max((text_width(name, 12) for name in named), default=0) + 62
    in_row = max(int((width - 28) // entry), 1)
    if len(named) <= in_row:
        entry = min((width - 28) / max(len(named), 1), 2 * entry)
    return [(14 + i % in_row * entry, i // in_row, line) for i, line in enumerate(named.values())]


def wrapped(text, width, size):
    """The text in lines of at most about this width."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer, size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


# ---------------------------------------------------------------- axes


@dataclass(frozen=True)
class Axis:
    """A range of numbers and the ticks on it; log where it is one of their logarithms."""
    low: float
    high: float
    ticks: list
    log: bool = False

    def share(self, value):
        """Where a value lies, 0 at the low end and 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def nice_axis(highest):
    """(step, end) of an axis from 0 that reaches `highest` in at most six round steps."""
    power = 10.0 ** math.floor(math.log10(highest / 6))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 6 >= highest)
    return step, step * math.ceil(highest / step - 1e-9)


def linear_axis(low, high, zero, tight=False):
    """An Axis around low and high; with zero from 0 where they are positive, if tight no wider than they."""
    if zero and low >= 0:
        low = 0.0
    if not high > low:                                                  # all the same: some room around it
        room = (abs(low) or 1) / 10
        low, high = (0.0, 1.0) if zero and low == 0 else (low - room, high + room)
    step, _ = nice_axis(high - low)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    if tight:
        return Axis(low, high, [tick for tick in ticks if low - 1e-9 * step <= tick <= high + 1e-9 * step])
    return Axis(first * step, last * step, ticks)


def log_axis(low, high):
    """An Axis of logarithms between round numbers: 1, 2, 5, 10 ..., or powers of ten alone."""
    if not low > 0:
        raise ValueError(f"{low} is on a logarithmic axis: expected more than 0")
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    ticks = [factor * 10.0 ** power for power in decades for factor in factors]
    first = max(i for i, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    last = min(i for i, tick in enumerate(ticks) if tick >= high * (1 - 1e-9) and i > first)
    return Axis(ticks[first], ticks[last], ticks[first:last + 1], log=True)


def y_axis(panels):
    """One Axis for these panels: over points, error bars and bands."""
    values = [value for panel in panels for line in panel.series for value in reach(line)]
    check_finite(values)
    if panels[0].y_log:
        return log_axis(min(values), max(values))
    return linear_axis(min(values), max(values), panels[0].zero)


def x_axis(panel):
    """The Axis of numbers along a panel, or of its named ticks, each with half a place around it."""
    if panel.ticks is not None:
        return Axis(-0.5, len(panel.ticks) - 0.5, list(range(len(panel.ticks))))
    values = [x for line in panel.series for x, _ in line.points]
    check_finite(values)
    if panel.x_log:
        return log_axis(min(values), max(values))
    return linear_axis(min(values), max(values), zero=False, tight=True)


def reach(line):
    """Every y that a series draws to."""
    bars = zip(line.points, line.errors, strict=True) if line.errors else ()
    return [*(y for _, y in line.points), *(y + sign * bar for (_, y), bar in bars for sign in (-1, 1)),
            *(y for pair in line.band for y in pair)]


def check_finite(values):
    """Raise ValueError unless there are values and all of them are finite."""
    if not values:
        raise ValueError("a panel without a point: expected one or more")
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"{value} cannot be drawn: expected a finite number")


def tick_text(value):
    """A tick's number as short text."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or letter == "M" and abs(value) >= size:
            return f"{value / size:.6g}{letter}"
    if 0 < abs(value) < 9.99e-4:
        digits, power = f"{value:.5e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.6g}"


# ---------------------------------------------------------------- panels


def frame(left, top, width, height):
    """(x0, x1, y0, y1) of the axes in a panel's box, y0 below y1."""
    return left + 68, left + width - 18, top + height - 44, top + 26


def place_in(panel, box, y_range):
    """The function that puts a panel's (x, y) into its box, in pixels."""
    x0, x1, y0, y1 = frame(*box)
    x_range = x_axis(panel)
    return lambda x, y: (x0 + x_range.share(x) * (x1 - x0), y0 + y_range.share(y) * (y1 - y0))


def draw_panel(pen, panel, left, top, width, height, y_range):
    """Axes, ticks, labels and lines of one panel inside the box given in pixels."""
    box = left, top, width, height
    (x0, x1, y0, y1), x_range, place = frame(*box), x_axis(panel), place_in(panel, box, y_range)
    pen.text((x0 + x1) / 2, top + 4, panel.title, size=13, anchor="ma")
    for tick in y_range.ticks:
        y = y0 + y_range.share(tick) * (y1 - y0)
        pen.line([(x0, y), (x1, y)], "ink" if tick == y_range.low else "grid")
        pen.text(x0 - 7, y, tick_text(tick), anchor="rm")
    for i, tick in enumerate(x_range.ticks):
        x = x0 + x_range.share(tick) * (x1 - x0)
        pen.line([(x, y0), (x, y0 + 4)], "ink")
        pen.text(x, y0 + 8, panel.ticks[i] if panel.ticks else tick_text(tick), anchor="ma")
    pen.line([(x0, y0), (x0, y1)], "ink")
    pen.text((x0 + x1) / 2, y0 + 26, panel.x_label, anchor="ma")
    pen.text(left + 11, (y0 + y1) / 2, panel.y_label, upright=True)

    for line in panel.series:
        if line.band:                                                   # all bands lie below all lines
            sides = [[place(x, pair[i]) for (x, _), pair in zip(line.points, line.band, strict=True)]
                     for i in (0, 1)]
            pen.area(sides[0] + sides[1][::-1], line.colour)
    for line in panel.series:
        points = [place(x, y) for x, y in line.points]
        if line.line and len(points) > 1:
            pen.line(points, line.colour, 2, line.dash)
        for (x, y), bar in zip(line.points, line.errors, strict=False):
            if bar:
                pen.line([place(x, y - bar), place(x, y + bar)], line.colour, 1.5)
        if line.dots and not line.dash:
            for x, y in points:
                pen.dot(x, y, line.colour)

    tagged = sorted((line for line in panel.series if line.tag), key=lambda line: -line.points[-1][1])
    heights = apart([place(*line.points[-1])[1] for line in tagged], 11, y0)
    for line, y in zip(tagged, heights, strict=True):
        pen.text(place(*line.points[-1])[0] + 4, y, line.tag, size=10, anchor="lm", colour=line.colour)


def apart(heights, gap, bottom):
    """Ascending heights, moved as little as it takes to be a gap apart and none below the bottom."""
    groups = []                                                         # of neighbours that touch
    for i, height in enumerate(heights):
        groups.append([height - i * gap])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = [float(np.mean(group)) for group in groups for _ in group]
    return [min(base, bottom - gap * (len(moved) - 1)) + i * gap for i, base in enumerate(moved)]


def draw_heat_map(pen, panel, left, top, width, height):
    """Cells, their ticks, and a strip that tells what the colours mean."""
    x0, x1, y0, y1 = frame(left, top, width - 52, height)
    pen.text((x0 + x1) / 2, top + 4, panel.title, size=13, anchor="ma")
    across, up = (x1 - x0) / len(panel.x_ticks), (y0 - y1) / len(panel.y_ticks)
    for i, row in enumerate(panel.values):
        for j, value in enumerate(row):
            share = (value - panel.low) / (panel.high - panel.low)
            pen.box(x0 + j * across, y0 - (i + 1) * up, across, up, between(HEAT, share))
            if min(across, up) >= 26:                                   # room for the number
                pen.text(x0 + (j + 0.5) * across, y0 - (i + 0.5) * up, f"{value:.2f}", size=10, anchor="mm",
                         colour="white" if share > WHITE_FROM else "black")
    for j, name in enumerate(panel.x_ticks):
        pen.text(x0 + (j + 0.5) * across, y0 + 6, name, size=11, anchor="ma")
    for i, name in enumerate(panel.y_ticks):
        pen.text(x0 - 7, y0 - (i + 0.5) * up, name, size=11, anchor="rm")
    pen.text((x0 + x1) / 2, y0 + 26, panel.x_label, anchor="ma")
    pen.text(left + 11, (y0 + y1) / 2, panel.y_label, upright=True)
    steps = 24
    for i in range(steps):
        pen.box(x1 + 14, y0 - (i + 1) * (y0 - y1) / steps, 12, (y0 - y1) / steps,
                between(HEAT, (i + 0.5) / steps))
    for share in np.linspace(0, 1, 6).tolist():
        value = panel.low + share * (panel.high - panel.low)
        pen.text(x1 + 32, y0 + share * (y1 - y0), tick_text(value), size=11, anchor="lm")


def draw_tiles(pen, panel, left, top, width, height):
    """Images in a grid as large as fits the box."""
    side = min((width - 28) / len(panel.columns), (height - 44) / len(panel.images)) - 6
    pen.text(left + 14, top + 2, panel.title, size=13)
    for j, name in enumerate(panel.columns):
        pen.text(left + 14 + j * (side + 6), top + 22, name, size=11)
    for i, row in enumerate(panel.images):
        for j, image in enumerate(row):
            across, down = (side * n / max(image.size) for n in image.size)
            pen.picture(left + 14 + j * (side + 6), top + 40 + i * (side + 6), across, down, image)
