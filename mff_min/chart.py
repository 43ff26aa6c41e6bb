"""Line charts for runs, drawn with Pillow alone."""

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

INK, PAPER, GRID = (40, 40, 40), (255, 255, 255), (226, 226, 226)
COLOURS = {"blue": (31, 97, 168), "orange": (214, 110, 18), "grey": (120, 120, 120)}
SCALE = 2                                                               # drawn at twice the size, to be sharp


@dataclass(frozen=True)
class Series:
    """A line through (x, y) points, with an error bar at each where there are errors.

    dash is the length in pixels of strokes and gaps, 0 for a solid line.
    """
    name: str
    points: list
    errors: list
    colour: str
    dash: int = 0


@dataclass(frozen=True)
class Panel:
    """One pair of axes. The ticks are at x = 0, 1, 2 ...; the series of all panels bear the same names."""
    title: str
    x_label: str
    y_label: str
    ticks: list                                                         # their names
    series: list


def chart(panels, title, width=480, height=330):
    """A picture of the panels side by side, with one legend below them; y runs over all panels alike."""
    image = Image.new("RGB", (width * len(panels) * SCALE, (height + 62) * SCALE), PAPER)
    pen = Pen(image)
    pen.text(14, 10, title, size=15)
    top = max(y + error for panel in panels for line in panel.series
              for (_, y), error in zip(line.points, line.errors, strict=True))
    step, highest = nice_axis(top)
    for i, panel in enumerate(panels):
        draw_panel(pen, panel, i * width, 34, width, height - 34, step, highest)
    draw_legend(pen, panels[0].series, 14, height + 12, width * len(panels) - 28)
    return image


def nice_axis(highest):
    """(step, end) of an axis from 0 that reaches `highest` in at most six round steps."""
    power = 10.0 ** math.floor(math.log10(highest / 6))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 6 >= highest)
    return step, step * math.ceil(highest / step - 1e-9)


def draw_panel(pen, panel, left, top, width, height, step, highest):
    """Axes, ticks, labels and lines of one panel inside the box given in pixels."""
    x0, x1, y0, y1 = left + 58, left + width - 16, top + height - 44, top + 26

    def place(x, y):
        return x0 + (x + 0.5) * (x1 - x0) / len(panel.ticks), y0 - y * (y0 - y1) / highest

    pen.text((x0 + x1) / 2, top + 4, panel.title, size=13, anchor="ma")
    for i in range(round(highest / step) + 1):
        y = place(0, i * step)[1]
        pen.line([(x0, y), (x1, y)], INK if i == 0 else GRID)
        pen.text(x0 - 7, y, f"{i * step:g}", anchor="rm")
    for x, name in enumerate(panel.ticks):
        pen.line([(place(x, 0)[0], y0), (place(x, 0)[0], y0 + 4)], INK)
        pen.text(place(x, 0)[0], y0 + 8, name, anchor="ma")
    pen.line([(x0, y0), (x0, y1)], INK)
    pen.text((x0 + x1) / 2, y0 + 26, panel.x_label, anchor="ma")
    pen.upright(left + 12, (y0 + y1) / 2, panel.y_label)

    for line in panel.series:
        colour, points = COLOURS[line.colour], [place(x, y) for x, y in line.points]
        if len(points) > 1:
            pen.line(points, colour, 2, line.dash)
        for (x, y), (px, py), error in zip(line.points, points, line.errors, strict=True):
            pen.line([place(x, y - error), place(x, y + error)], colour)
            if not line.dash:                                           # a dashed line is a level: no dots
                pen.dot(px, py, colour)


def draw_legend(pen, series, left, y, width):
    """Names of the series beside a piece of each line, in one row; several of one name are one entry."""
    named = {line.name: line for line in series}
    for i, line in enumerate(named.values()):
        x = left + i * width / len(named)
        pen.line([(x, y + 8), (x + 34, y + 8)], COLOURS[line.colour], 2, line.dash)
        pen.text(x + 42, y, line.name)


class Pen:
    """Draws on an image in units of 1 / SCALE pixels."""

    def __init__(self, image):
        self.image, self.draw = image, ImageDraw.Draw(image)

    def text(self, x, y, text, size=12, anchor="la"):
        font = ImageFont.load_default(size * SCALE)
        self.draw.text((x * SCALE, y * SCALE), text, INK, font=font, anchor=anchor)

    def upright(self, x, y, text, size=12):
        """Text that reads upwards, its middle at (x, y)."""
        font = ImageFont.load_default(size * SCALE)
        length, height = int(font.getlength(text)) + 4, int(size * SCALE * 1.5)
        label = Image.new("RGB", (length, height), PAPER)
        ImageDraw.Draw(label).text((length / 2, height / 2), text, INK, font=font, anchor="mm")
        label = label.rotate(90, expand=True)
        self.image.paste(label, (round(x * SCALE - height / 2), round(y * SCALE - length / 2)))

    def dot(self, x, y, colour, radius=3.0):
        box = [(x - radius) * SCALE, (y - radius) * SCALE, (x + radius) * SCALE, (y + radius) * SCALE]
        self.draw.ellipse(box, colour)

    def line(self, points, colour, width=1, dash=0):
        points = [(x * SCALE, y * SCALE) for x, y in points]
        if not dash:
            self.draw.line(points, colour, width * SCALE, joint="curve")
            return
        for (xa, ya), (xb, yb) in zip(points, points[1:], strict=False):
            length = math.hypot(xb - xa, yb - ya)
            for start in range(0, int(length), 2 * dash * SCALE):
                a, b = start / length, min((start + dash * SCALE) / length, 1)
                ends = [(xa + (xb - xa) * a, ya + (yb - ya) * a), (xa + (xb - xa) * b, ya + (yb - ya) * b)]
                self.draw.line(ends, colour, width * SCALE)
