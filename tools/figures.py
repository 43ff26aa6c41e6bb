"""Figures of runs: a description as plain values, and matplotlib's drawing of it.

    figure = Figure("Loss of two runs", [Panel("", "step", "loss", None, [Series("a", points, (), "blue")])])
    save(figure, "runs/figures/loss", "python -m tools.analyze runs/a")       # loss.png, loss.svg, loss.json

The description holds every number and text of a figure, and loss.json holds the description. The SVG has a
dark palette as well, which browsers choose by the reader's preference; the PNG is light. All three files hold
the command. matplotlib is an extra: tools that draw call check_matplotlib() before they begin.
"""

import importlib.util
import io
import json
import math
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mff_min.errors import UserError
from mff_run.files import write_atomically

COLOURS = {                                                             # (in the light, in the dark)
    "paper": ("#ffffff", "#16181d"), "ink": ("#282828", "#e2e2e2"), "grid": ("#e4e4e4", "#3a3e46"),
    "grey": ("#747474", "#9ea0a6"), "blue": ("#1f61a8", "#6aa8f0"), "orange": ("#d66e12", "#f4a054"),
    "green": ("#1e8449", "#62c888"), "purple": ("#803e9e", "#c48ee6"), "red": ("#be2834", "#f67c7c"),
    "teal": ("#00828c", "#54c8ce")}
LINES = ("blue", "orange", "green", "purple", "red", "teal")            # for series, in this order
RAMP = (("#bc580a", "#c02c54", "#703aa0", "#1f61a8", "#00826c"),        # for levels: text has these too
        ("#faac5c", "#f67892", "#be92ee", "#6aa8f0", "#5ad4b6"))
ON_CELLS = ("#000000", "#fefefe")                                       # the same in the dark: not in COLOURS
LETTER = 0.6                                                            # mean width of a letter, in its size


@dataclass(frozen=True)
class Series:
    """A line through (x, y) points, with an error bar at each where there are errors.

    errors are half lengths of the bars, or () for none. dash is the length of strokes and gaps, 0 for a solid
    line. Points have dots, unless the line is dashed: a dashed line marks a constant. Without line, there
    are dots alone. tag is a short name at the line's end, which then needs none in the legend.
    """
    name: str
    points: list
    errors: list
    colour: str | float                                                 # of COLOURS, or a place on RAMP
    dash: int = 0
    dots: bool = True
    line: bool = True
    tag: str = ""


@dataclass(frozen=True)
class Panel:
    """One pair of axes. The ticks are names at x = 0, 1, 2 ..., or None where x is a number with an axis.

    With zero, y begins at 0 where nothing is negative; else where the data do.
    """
    title: str
    x_label: str
    y_label: str
    ticks: list | None
    series: list
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
class Figure:
    """Panels in so many columns (0: all side by side), a legend and a note below them.

    A panel has the width and height given, in pixels. With share_y, y runs over all panels alike.
    """
    title: str
    panels: list
    columns: int = 0
    width: int = 480
    height: int = 296
    share_y: bool = False
    note: str = ""                                                      # what a reader has to know, below


# ---------------------------------------------------------------- files


def check_matplotlib():
    """Raise UserError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("matplotlib is not installed: figures are drawn with it, so run "
                        "pip install -e '.[figures]'")


def save(figure, stem, command):
    """Write stem.png, stem.svg and stem.json: the figure twice, and the numbers in it."""
    png, svg = io.BytesIO(), io.BytesIO()
    draw(figure, command, png=png, svg=svg)
    files = {".png": png.getvalue(), ".svg": with_dark_colours(svg.getvalue().decode(), figure).encode(),
             ".json": numbers_of(figure, command).encode()}
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    for suffix, data in files.items():
        write_atomically(f"{stem}{suffix}", lambda file, data=data: file.write(data))


def numbers_of(figure, command):
    """What a figure shows, without its looks, as JSON: the texts and numbers of its panels."""
    shown = ("title", "x_label", "y_label", "ticks", "x_ticks", "y_ticks", "values")
    panels = []
    for panel in figure.panels:
        panels.append({name: getattr(panel, name) for name in shown if hasattr(panel, name)})
        if isinstance(panel, Panel):
            panels[-1]["series"] = [{name: value for name in ("name", "points", "errors")
                                     if (value := getattr(line, name))} for line in panel.series]
    text = json.dumps(dict(title=figure.title, command=command, note=figure.note, panels=panels), indent=1)
    # A list of numbers stands in one line.
    return re.sub(r"\[\s+([^][{}\"]*?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


def with_dark_colours(svg, figure):
    """The text of an SVG with a rule for each of its colours, followed where the reader prefers the dark."""
    used = [*COLOURS, *(line.colour for panel in figure.panels for line in getattr(panel, "series", ()))]
    rules = "\n".join(f'[style*="{kind}: {colour_of(colour)}"]{{{kind}:{colour_of(colour, True)}!important}}'
                      for colour in dict.fromkeys(used) for kind in ("fill", "stroke"))
    return svg.replace("<defs>", f"<style>@media (prefers-color-scheme: dark){{\n{rules}\n}}</style>\n"
                                 f"<defs>", 1)


def colour_of(colour, dark=False):
    """"#rrggbb" of a colour's name, or of a place from 0 to 1 on RAMP."""
    if isinstance(colour, str):
        return COLOURS[colour][dark]
    stops = np.array([list(bytes.fromhex(stop[1:])) for stop in RAMP[dark]])            # (stop, channel)
    places = np.linspace(0, 1, len(stops))
    return "#" + bytes(round(float(np.interp(colour, places, channel))) for channel in stops.T).hex()


# ---------------------------------------------------------------- drawing

STYLE = {"svg.hashsalt": "mff_min", "text.parse_math": False, "font.family": "DejaVu Sans",
         "font.size": 9, "axes.titlesize": 10, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
         "axes.formatter.useoffset": False, "axes.spines.top": False, "axes.spines.right": False,
         "grid.color": colour_of("grid"), "legend.frameon": False}
STYLE |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"),
                       colour_of("ink"))


def draw(figure, command="", **files):
    """The drawing, as a figure of matplotlib, written to files: png=FILE, svg=FILE. Its colours are light.

    Raises ValueError where a panel holds no number, or one that is not finite.
    """
    check_numbers(figure)
    check_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    metadata = {"png": {"Command": command},
                "svg": {"Date": None, "Title": figure.title, "Description": command}}
    with rc_context(STYLE):
        canvas = Canvas(dpi=100, layout="constrained")                  # so that a pixel is 0.01 of an inch
        lay_out(figure, canvas)
        for _ in range(2):                                              # the first may change the ticks
            canvas.draw_without_rendering()
        canvas.set_layout_engine("none")
        for axes in canvas.axes:                                        # the solver's last digits vary
            axes.set_position(np.round(axes.get_position(original=True).bounds, 6))
        for kind, file in files.items():
            canvas.savefig(file, format=kind, dpi=200, metadata=metadata[kind])
    return canvas


def check_numbers(figure):
    """Raise ValueError unless every panel has numbers, all of them finite: matplotlib would leave gaps."""
    for panel in figure.panels:
        if isinstance(panel, HeatMap):
            values = [value for row in panel.values for value in row]
        else:
            values = [value for line in panel.series for row in (*line.points, line.errors) for value in row]
        if not values:
            raise ValueError(f"panel {panel.title!r} holds no point: expected one or more")
        for value in values:
            if not math.isfinite(value):
                raise ValueError(f"{value} cannot be drawn: expected a finite number")


def lay_out(figure, canvas):
    """Draw the title, the panels, the legend and the note, from the top to the bottom of a canvas."""
    columns = figure.columns or len(figure.panels)
    rows, width = math.ceil(len(figure.panels) / columns), columns * figure.width
    title = textwrap.wrap(figure.title, int((width - 28) / (15 * LETTER)))
    note = textwrap.wrap(figure.note, int((width - 28) / (11 * LETTER)))
    names = names_of(figure.panels)
    in_row = max(int((width - 28) / (max(map(len, names), default=0) * 12.5 * LETTER + 50)), 1)
    above, below = 14 + 20 * len(title), 14 + 16 * len(note)            # pixels; the legend comes on top
    panels_end = below + 20 * math.ceil(len(names) / in_row) + 8
    height = above + rows * figure.height + panels_end
    canvas.set_size_inches(width / 100, height / 100)
    canvas.get_layout_engine().set(rect=(0, panels_end / height, 1, rows * figure.height / height),
                                   w_pad=0.1, h_pad=0.08)

    canvas.text(14 / width, 1 - 10 / height, "\n".join(title), size=11, va="top")
    axes = []
    for i, panel in enumerate(figure.panels):
        shared = axes[0] if axes and figure.share_y else None
        axes.append(canvas.add_subplot(rows, columns, i + 1, sharey=shared))
        axes[i].set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        (draw_heat_map if isinstance(panel, HeatMap) else draw_lines)(axes[i], panel)
    lowest = [each.dataLim.y0 for each in axes]                         # of points and error bars
    for i, panel in enumerate(figure.panels):
        if isinstance(panel, Panel):
            if panel.zero and min(lowest if figure.share_y else lowest[i:i + 1]) >= 0:
                axes[i].update_datalim([(axes[i].dataLim.x0, 0)])
                axes[i].autoscale_view(scalex=False)                    # the margin is a part of all this
                axes[i].set_ylim(bottom=0)
            put_tags(axes[i], panel, figure.height)
    if names:
        # matplotlib goes down the columns of a legend; these names are read along its rows.
        names = [name for i in range(in_row) for name in names[i::in_row]]
        drawn = {line.get_label(): line for each in axes for line in each.lines}
        place = 8 / width, (below - 4) / height
        canvas.legend([drawn[name] for name in names], names, loc="lower left", bbox_to_anchor=place,
                      ncols=in_row, columnspacing=1.2, handlelength=2.4, borderaxespad=0)
    canvas.text(14 / width, 8 / height, "\n".join(note), size=8, color=colour_of("grey"), va="bottom")


def names_of(panels):
    """The names of the series without a tag, once each: those on the ramp first, in its order."""
    lines = [line for panel in panels for line in getattr(panel, "series", ()) if line.name and not line.tag]
    lines.sort(key=lambda line: 2 if isinstance(line.colour, str) else line.colour)
    return list(dict.fromkeys(line.name for line in lines))


def draw_lines(axes, panel):
    """The series of a panel, and its ticks."""
    for line in panel.series:
        x, y = np.array(line.points, dtype=float).T                     # both (points,)
        style = "none" if not line.line else (0, (line.dash / 2, line.dash / 2)) if line.dash else "-"
        axes.plot(x, y, label=line.name, color=colour_of(line.colour), linestyle=style, linewidth=1.6,
                  marker="o" if line.dots and not line.dash else "", markersize=4)
        if len(line.errors):
            axes.vlines(x, y - line.errors, y + line.errors, color=colour_of(line.colour), linewidth=1.2,
                        clip_on=False)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    if panel.ticks is not None:
        axes.set_xticks(range(len(panel.ticks)), [tick.replace(", ", ",\n") for tick in panel.ticks])
        axes.set_xlim(-0.5, len(panel.ticks) - 0.5)


def put_tags(axes, panel, height):
    """Write the names at the ends of lines, the highest line's at the top."""
    lines = sorted((line for line in panel.series if line.tag), key=lambda line: line.points[-1][1])
    low, high = axes.get_ylim()
    places = apart([(line.points[-1][1] - low) / (high - low) for line in lines], 14 / (height - 90))
    for line, place in zip(lines, places, strict=True):
        axes.text(line.points[-1][0], place, f"  {line.tag}", color=colour_of(line.colour), size=8,
                  va="center", transform=axes.get_xaxis_transform())


def apart(places, gap):
    """Ascending places, moved as little as it takes to be a gap apart and none below 0."""
    groups = []                                                         # of neighbours that touch
    for i, place in enumerate(places):
        groups.append([place - i * gap])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = [float(np.mean(group)) for group in groups for _ in group]
    return [max(base, 0.0) + i * gap for i, base in enumerate(moved)]


def draw_heat_map(axes, panel):
    """Cells with their numbers, which tell what the colours mean."""
    image = axes.imshow(panel.values, cmap="viridis", vmin=panel.low, vmax=panel.high, origin="lower")
    axes.set_xticks(range(len(panel.x_ticks)), panel.x_ticks)
    axes.set_yticks(range(len(panel.y_ticks)), panel.y_ticks)
    for (i, j), value in np.ndenumerate(panel.values):
        axes.text(j, i, f"{value:.2f}", size=7.5, ha="center", va="center",
                  color=ON_CELLS[luminance(image.to_rgba(value)[:3]) < 0.179])


def luminance(rgb):
    """The relative luminance of a colour, as WCAG 2 defines it; 0.179 has the same contrast to both ends."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))
