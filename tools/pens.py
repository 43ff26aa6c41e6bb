"""Two pens with the same strokes: one draws pixels with Pillow, the other writes an SVG.

Units are pixels of the SVG; the PNG has SCALE of its own for each. A colour is a name of COLOURS, or a number
from 0 to 1, a place on the way from orange over purple to green. Text is in ink, in grey or in a colour of
that way, which have the contrast for it. An SVG has a dark palette too, for browsers that prefer it; a PNG is
light. Places of an SVG's text are computed without measuring it, so that the same drawing is the same file on
every machine.
"""

import base64
import io
import math
from xml.sax.saxutils import escape

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFont, features
from PIL.PngImagePlugin import PngInfo

SCALE = 2                                                               # sharp on dense screens
FINER = 2                                                               # drawn larger, then averaged
ASCENT, DESCENT = 0.97, 0.23                                            # of Pillow's font, in its size
ADVANCE = 0.5                                                           # of a letter on average, rounded up

COLOURS = {                                                             # in the light, in the dark
    "white": ((255, 255, 255), (255, 255, 255)),
    "black": ((0, 0, 0), (0, 0, 0)),
    "paper": ((255, 255, 255), (22, 24, 29)),
    "ink": ((40, 40, 40), (226, 226, 226)),
    "grid": ((226, 226, 226), (58, 62, 70)),
    "grey": ((116, 116, 116), (158, 160, 166)),
    "blue": ((31, 97, 168), (106, 168, 240)),
    "orange": ((214, 110, 18), (244, 160, 84)),
    "green": ((30, 132, 73), (98, 200, 136)),
    "purple": ((128, 62, 158), (196, 142, 230)),
    "red": ((190, 40, 52), (246, 124, 124)),
    "teal": ((0, 130, 140), (84, 200, 206)),
}
LINES = ("blue", "orange", "green", "purple", "red", "teal")            # for series, in this order
RAMP = (((188, 88, 10), (192, 44, 84), (112, 58, 160), (31, 97, 168), (0, 130, 108)),      # of text too
        ((250, 172, 92), (246, 120, 146), (190, 146, 238), (106, 168, 240), (90, 212, 182)))


def colour_of(colour, dark=False):
    """(red, green, blue) of a colour's name or of a place on the ramp."""
    if isinstance(colour, str):
        return COLOURS[colour][dark]
    return between(RAMP[dark], colour)


def between(stops, share):
    """The colour at a share from 0 to 1 of the way along evenly spaced (red, green, blue) stops."""
    places = np.linspace(0, 1, len(stops))
    return tuple(round(float(np.interp(share, places, channel))) for channel in zip(*stops, strict=True))


def text_width(text, size):
    """About how wide a text is; the same on every machine."""
    return len(text) * size * ADVANCE


class PngPen:
    """Draws on a Pillow image, `image` when it is finished."""

    def __init__(self, width, height):
        self.scale = SCALE * FINER
        self.canvas = Image.new("RGB", (round(width * self.scale), round(height * self.scale)),
                                colour_of("paper"))
        self.draw = ImageDraw.Draw(self.canvas)

    @property
    def image(self):
        return self.canvas.reduce(FINER)

    def text(self, x, y, text, size=12, anchor="la", colour="ink", upright=False):
        """Text at a place. anchor is Pillow's: l, m or r, then a (the top) or m (the middle).

        upright text reads upwards, and has its middle at (x, y).
        """
        font, rgb = ImageFont.load_default(size * self.scale), colour_of(colour)
        if not upright:
            self.draw.text((x * self.scale, y * self.scale), text, rgb, font=font, anchor=anchor)
            return
        length, height = int(font.getlength(text)) + 4, int(size * self.scale * 1.5)
        mask = Image.new("L", (length, height))
        ImageDraw.Draw(mask).text((length / 2, height / 2), text, 255, font=font, anchor="mm")
        mask = mask.rotate(90, expand=True)
        corner = round(x * self.scale - height / 2), round(y * self.scale - length / 2)
        self.canvas.paste(rgb, corner, mask)

    def line(self, points, colour, width=1, dash=0):
        points = [(x * self.scale, y * self.scale) for x, y in points]
        strokes = dashes(points, dash * self.scale) if dash else [points]
        for stroke in strokes:
            self.draw.line(stroke, colour_of(colour), round(width * self.scale), joint="curve")

    def area(self, points, colour):
        """A translucent polygon."""
        mask = Image.new("L", self.canvas.size)
        ImageDraw.Draw(mask).polygon([(x * self.scale, y * self.scale) for x, y in points], 46)
        self.canvas.paste(colour_of(colour), (0, 0), mask)

    def dot(self, x, y, colour, radius=3.0):
        self.draw.ellipse([v * self.scale for v in (x - radius, y - radius, x + radius, y + radius)],
                          colour_of(colour))

    def box(self, left, top, width, height, rgb):
        """A filled rectangle; its colour is the same in the dark."""
        sides = [round(v * self.scale) for v in (left, top, left + width, top + height)]
        self.draw.rectangle([sides[0], sides[1], sides[2] - 1, sides[3] - 1], rgb)

    def picture(self, left, top, width, height, image):
        """A Pillow image, its pixels as squares."""
        size = round(width * self.scale), round(height * self.scale)
        self.canvas.paste(image.convert("RGB").resize(size, Image.Resampling.NEAREST),
                          (round(left * self.scale), round(top * self.scale)))

    def save(self, file, command):
        """Write the PNG, with the command that made it and what drew its letters."""
        about = PngInfo()
        about.add_text("Command", command)
        about.add_text("Software", drawn_by())
        self.image.save(file, format="PNG", pnginfo=about)


def dashes(points, length):
    """Pieces of a line through points: strokes of this length, with gaps as long."""
    for (xa, ya), (xb, yb) in zip(points, points[1:], strict=False):
        whole = math.hypot(xb - xa, yb - ya)
        for start in range(0, int(whole), int(2 * length)):
            a, b = start / whole, min((start + length) / whole, 1)
            yield [(xa + (xb - xa) * a, ya + (yb - ya) * a), (xa + (xb - xa) * b, ya + (yb - ya) * b)]


def drawn_by():
    """What the pixels of a PNG's letters depend on."""
    return f"Pillow {PIL.__version__}, FreeType {features.version('freetype2')}"


class SvgPen:
    """Writes an SVG, `svg(...)` when it is finished; the same strokes as PngPen's."""

    def __init__(self, width, height):
        self.size, self.marks, self.colours = (width, height), [], {}

    def mark(self, tag, text=None, **attributes):
        words = [f' {name.rstrip("_").replace("_", "-")}="{number(value)}"' for name, value
                 in attributes.items()]
        end = "/>" if text is None else f">{escape(text)}</{tag}>"
        self.marks.append(f"<{tag}{''.join(words)}{end}")

    def colour(self, kind, colour):
        """The class that strokes ("s") or fills ("f") in a colour, light or dark."""
        name = f"{kind}-{colour if isinstance(colour, str) else round(1000 * colour)}"
        self.colours[name] = kind, colour
        return name

    def text(self, x, y, text, size=12, anchor="la", colour="ink", upright=False):
        rise = size * (ASCENT - DESCENT) / 2 if upright or anchor[1] == "m" else size * ASCENT
        place = dict(x=x, y=y + rise)
        if upright:
            place = dict(x=0, y=rise, transform=f"translate({number(x)} {number(y)}) rotate(-90)")
        where = {"l": "start", "m": "middle", "r": "end"}["m" if upright else anchor[0]]
        if not text:
            return
        self.mark("text", text, **place, font_size=size, text_anchor=where, class_=self.colour("f", colour))

    def line(self, points, colour, width=1, dash=0):
        dashed = {"stroke_dasharray": f"{number(dash)} {number(dash)}"} if dash else {}
        self.mark("polyline", points=places(points), stroke_width=width, **dashed,
                  class_=self.colour("s", colour))

    def area(self, points, colour):
        self.mark("polygon", points=places(points), fill_opacity=0.18, class_=self.colour("f", colour))

    def dot(self, x, y, colour, radius=3.0):
        self.mark("circle", cx=x, cy=y, r=radius, class_=self.colour("f", colour))

    def box(self, left, top, width, height, rgb):
        self.mark("rect", x=left, y=top, width=width, height=height, fill=css(rgb),
                  shape_rendering="crispEdges")                         # no seams between neighbours

    def picture(self, left, top, width, height, image):
        file = io.BytesIO()
        image.save(file, format="PNG")
        data = base64.b64encode(file.getvalue()).decode()
        self.mark("image", x=left, y=top, width=width, height=height, style="image-rendering:pixelated",
                  href=f"data:image/png;base64,{data}")

    def svg(self, title, command):
        """The file's text; both palettes, the title and the command that made it are inside."""
        width, height = (number(side) for side in self.size)
        self.colour("f", "paper")
        light, dark = ("\n".join(self.rule(name, is_dark) for name in sorted(self.colours))
                       for is_dark in (False, True))
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" font-family="system-ui, sans-serif">',
            f"<title>{escape(title)}</title>", f"<desc>{escape(command)}</desc>",
            f"<style>\npolyline{{fill:none;stroke-linejoin:round}}\n{light}",
            f"@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n</style>",
            f'<rect width="{width}" height="{height}" class="f-paper"/>', *self.marks, "</svg>\n"])

    def rule(self, name, dark):
        kind, colour = self.colours[name]
        return f".{name}{{{'stroke' if kind == 's' else 'fill'}:{css(colour_of(colour, dark))}}}"


def css(rgb):
    """(red, green, blue) as "#rrggbb"."""
    return "#" + "".join(f"{value:02x}" for value in rgb)


def number(value):
    """A number as short text, to a hundredth; other values as they are."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, int | float) else value


def places(points):
    """(x, y) points as an SVG lists them."""
    return " ".join(f"{number(x)},{number(y)}" for x, y in points)
