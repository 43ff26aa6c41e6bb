"""Charts: what is drawn stands where its axes say, in both formats alike, and the SVG is well-formed XML."""

import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tools.chart import (
    Axis,
    Figure,
    HeatMap,
    Panel,
    Series,
    Tiles,
    apart,
    draw,
    linear_axis,
    log_axis,
    save,
    tick_text,
)
from tools.pens import COLOURS, SCALE, PngPen, SvgPen, colour_of, drawn_by

COMMAND = "python x.py --names 'a & b' <c>"
LINE = Series("measured", [(0.0, 1.0), (250.0, 4.0), (1000.0, 2.5)], [0.5, 0.25, 0.0], "blue",
              band=[(0.5, 1.5), (3.0, 5.0), (2.0, 3.0)])
FIGURE = Figure("A & B", [Panel("left", "images", "loss", None, [LINE]),
                          Panel("right", "block", "acc1, %", ["0", "1", "fused"],
                                [Series("probe", [(0, 10.0), (1, 30.0), (2, 20.0)], (), 0.5),
                                 Series("level", [(-0.5, 15.0), (2.5, 15.0)], (), "grey", dash=4)])])


def svg_of(figure):
    """The root of a figure's SVG, read back; tags without their namespace."""
    root = ET.fromstring(draw(figure, SvgPen, COMMAND).svg(figure.title, COMMAND))
    for element in root.iter():
        element.tag = element.tag.removeprefix("{http://www.w3.org/2000/svg}")
    return root


def points_of(element):
    return [tuple(map(float, pair.split(","))) for pair in element.get("points").split()]


def of_class(root, tag, name):
    return [element for element in root.iter(tag) if element.get("class") == name]


def scale_of(root, labels, axis):
    """A function from values to pixels along an axis, from where two of its tick labels stand."""
    texts = {element.text: float(element.get(axis)) for element in root.iter("text")
             if element.get("text-anchor") == ("middle" if axis == "x" else "end")}
    (a, at_a), (b, at_b) = [(float(label), texts[label]) for label in labels]
    return lambda value: at_a + (value - a) * (at_b - at_a) / (b - a)


def test_points_of_the_svg_are_where_its_ticks_say():
    root = svg_of(replace(FIGURE, panels=FIGURE.panels[:1]))
    across, up = scale_of(root, ["0", "1000"], "x"), scale_of(root, ["0", "5"], "y")
    rise = up(0) - next(y for points in map(points_of, of_class(root, "polyline", "s-ink"))
                        for _, y in points)                             # from the axis to its label
    line, *bars = of_class(root, "polyline", "s-blue")
    want = [(across(x), up(y) - rise) for x, y in LINE.points]
    np.testing.assert_allclose(points_of(line), want, atol=0.02)        # written to a hundredth
    for (x, y), error, bar in zip(LINE.points[:2], LINE.errors[:2], bars[:2], strict=True):
        np.testing.assert_allclose(points_of(bar), [(across(x), up(y + sign * error) - rise)
                                                    for sign in (-1, 1)], atol=0.02)
    band, = of_class(root, "polygon", "f-blue")
    low, high = ([(across(x), up(pair[i]) - rise) for (x, _), pair in
                  zip(LINE.points, LINE.band, strict=True)] for i in (0, 1))
    np.testing.assert_allclose(points_of(band), low + high[::-1], atol=0.02)


def test_both_formats_draw_the_same_points():
    """Each dot of the SVG is a dot of its colour in the PNG, the middle of each line too."""
    root, pixels = svg_of(FIGURE), np.asarray(draw(FIGURE, PngPen, COMMAND).image).astype(int)
    assert pixels.shape == (SCALE * float(root.get("height")), SCALE * float(root.get("width")), 3)
    dots = list(root.iter("circle"))
    assert len(dots) == 6
    for dot in dots:
        x, y, radius = (float(dot.get(name)) for name in ("cx", "cy", "r"))
        name = dot.get("class").removeprefix("f-")
        want = colour_of(int(name) / 1000 if name.isdecimal() else name)
        assert tuple(pixels[round(SCALE * y), round(SCALE * x)]) == want
        assert tuple(pixels[round(SCALE * (y - radius - 4)), round(SCALE * (x - radius - 2))]) != want
    for line in of_class(root, "polyline", "s-blue") + of_class(root, "polyline", "s-500"):
        (xa, ya), (xb, yb), *_ = points_of(line)
        middle = pixels[round(SCALE * (ya + yb) / 2), round(SCALE * (xa + xb) / 2)]
        assert tuple(middle) == colour_of("blue" if line.get("class") == "s-blue" else 0.5)


def test_the_svg_has_a_dark_rule_for_every_class_that_it_uses():
    text = draw(FIGURE, SvgPen, COMMAND).svg(FIGURE.title, COMMAND)
    style = re.search(r"<style>(.*?)@media \(prefers-color-scheme: dark\) \{(.*?)\n\}", text, re.S)
    used = set(re.findall(r'class="([\w-]+)"', text))
    for rules in style.groups():
        assert set(re.findall(r"^\.([\w-]+)\{(?:fill|stroke):#[0-9a-f]{6}\}$", rules, re.M)) == used
    background = of_class(svg_of(FIGURE), "rect", "f-paper")
    assert len(background) == 1                                         # opaque: legible on any page


def contrast(a, b):
    """The contrast ratio of two colours, as WCAG 2 defines it."""
    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(rgb) / 255]
        return np.dot([0.2126, 0.7152, 0.0722], linear)
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


RAMP = np.linspace(0, 1, 129).tolist()
TEXT = {"ink", "grey", *RAMP}


@pytest.mark.parametrize("dark", [False, True])
def test_every_colour_can_be_told_from_the_paper(dark):
    """3 : 1 is what WCAG asks of graphs, 4.5 : 1 of text."""
    paper = colour_of("paper", dark)
    for name in (*(set(COLOURS) - {"paper", "grid", "white", "black"}), *RAMP):
        assert contrast(colour_of(name, dark), paper) >= (4.5 if name in TEXT else 3), name


def test_every_text_has_a_colour_that_text_may_have():
    """Titles, ticks, legend, note and command, and names at the ends of lines."""
    series = [Series(f"block {i}", [(0, 1.0), (1, 2.0 + i)], (), i / 2, tag=str(i)) for i in range(3)]
    root = svg_of(Figure("title", [Panel("left", "x", "y", None, [*series, LINE])], note="A note."))
    used = {element.get("class").removeprefix("f-") for element in root.iter("text")}
    assert used == {"ink", "grey", "0", "500", "1000"}                  # the ramp, in thousandths


def test_numbers_in_a_heat_map_can_be_read():
    values = [np.linspace(-0.1, 1.1, 481).tolist()]
    ticks = [""] * 481
    root = svg_of(Figure("", [HeatMap("", "", "", ticks, [""], values)], width=26 * 500))
    cells = [element.get("fill") for element in root.iter("rect") if element.get("fill")][:481]
    texts = [element.get("class").removeprefix("f-") for element in root.iter("text")
             if re.fullmatch(r"-?\d\.\d\d", element.text)]
    assert set(texts) == {"black", "white"}
    for cell, text in zip(cells, texts, strict=True):
        rgb = [int(cell[i:i + 2], 16) for i in (1, 3, 5)]
        assert contrast(rgb, colour_of(text)) >= 4.5, (cell, text)


def test_titles_and_commands_are_in_the_files(tmp_path):
    save(FIGURE, tmp_path / "new" / "chart", COMMAND)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"chart.json", "chart.png", "chart.svg"}
    picture = Image.open(tmp_path / "new" / "chart.png")
    assert picture.mode == "RGB" and picture.text == {"Command": COMMAND, "Software": drawn_by()}
    root = svg_of(FIGURE)
    assert (root.find("title").text, root.find("desc").text) == ("A & B", COMMAND)
    assert COMMAND in [element.text for element in root.iter("text")]   # the caption
    found = json.loads((tmp_path / "new" / "chart.json").read_text())
    assert found["command"] == COMMAND and found["panels"][0]["series"] == [
        dict(name="measured", points=[list(point) for point in LINE.points], errors=LINE.errors,
             band=[list(pair) for pair in LINE.band])]
    assert found["panels"][1]["ticks"] == ["0", "1", "fused"]


def test_the_same_figure_is_the_same_bytes(tmp_path):
    for name in "ab":
        save(FIGURE, tmp_path / name, COMMAND)
    for suffix in ("png", "svg", "json"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_a_logarithmic_axis_has_equal_ways_for_equal_ratios():
    axis = log_axis(3e-4, 0.2)
    assert (axis.low, axis.high) == (2e-4, 0.2) and 0.001 in axis.ticks
    assert axis.share(2e-4) == 0 and axis.share(0.2) == 1
    assert axis.share(2e-3) - axis.share(2e-4) == pytest.approx(axis.share(0.2) - axis.share(0.02))
    assert all(b / a > 9 for a, b in zip(log_axis(1, 1e6).ticks, log_axis(1, 1e6).ticks[1:], strict=False))
    panel = Panel("", "epochs", "lr", None, [Series("a", [(1, 1e-3), (100, 1e-5)], (), "blue")], True, True)
    line, = [e for e in of_class(svg_of(Figure("", [panel])), "polyline", "s-blue") if len(points_of(e)) == 2
             and points_of(e)[0][1] != points_of(e)[1][1]]
    assert points_of(line)[0][0] < points_of(line)[1][0]
    with pytest.raises(ValueError, match="0.0 is on a logarithmic axis: expected more than 0"):
        log_axis(0.0, 1.0)


@pytest.mark.parametrize("low, high, zero, want", [
    (0.1, 23.4, True, (0, 25)), (20.0, 23.4, True, (0, 25)), (20.0, 23.4, False, (20, 24)),
    (-3.0, 4.0, True, (-4, 4)), (5.0, 5.0, False, (4.4, 5.6)), (0.0, 0.0, True, (0, 1)),
])
def test_a_linear_axis_is_round_numbers_around_the_data(low, high, zero, want):
    axis = linear_axis(low, high, zero)
    assert (axis.low, axis.high) == pytest.approx(want)
    assert 2 <= len(axis.ticks) <= 8 and axis.ticks[0] == axis.low and axis.ticks[-1] == axis.high


def test_ticks_are_short():
    texts = {"0": 0, "0.15": 0.15000000000000002, "1000": 1000, "10k": 10_000, "2.5M": 2.5e6, "5e-4": 5e-4,
             "0.001": 0.001, "1e-5": 1e-5, "-6": -6, "1.5e-4": 1.5e-4}
    assert {text: tick_text(value) for text, value in texts.items()} == {text: text for text in texts}


def test_panels_share_their_y_axis_where_the_figure_says_so():
    low, high = (Panel("", "x", "y", ["0", "1"], [Series("a", [(0, top / 2), (1, top)], (), "blue")])
                 for top in (1.0, 30.0))
    labels = [[element.text for element in svg_of(Figure("", [low, high], share_y=share)).iter("text")]
              for share in (False, True)]
    assert labels[0].count("30") == 1 and labels[1].count("30") == 2 and "0.2" not in labels[1]


def test_a_heat_map_has_a_cell_for_each_value_and_row_0_at_the_bottom():
    values = [[0.0, 0.25, 0.5], [1.0, 0.75, -0.1]]
    root = svg_of(Figure("", [HeatMap("", "a", "b", ["0", "1", "2"], ["0", "1"], values)], width=400))
    cells = [element for element in root.iter("rect") if element.get("fill")][:6]
    corners = [(float(cell.get("x")), float(cell.get("y"))) for cell in cells]
    assert corners[0][1] > corners[3][1] and corners[0][0] < corners[1][0] < corners[2][0]
    assert cells[0].get("fill") == cells[5].get("fill") != cells[3].get("fill")     # below the range: its end
    texts = [element.text for element in root.iter("text")]
    assert [text for text in texts if re.fullmatch(r"-?\d\.\d\d", text)] == ["0.00", "0.25", "0.50", "1.00",
                                                                             "0.75", "-0.10"]


def test_tiles_keep_their_pixels_in_both_formats(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), dtype=np.uint8)
    images = [[Image.fromarray(image) for image in pixels]]
    figure = Figure("", [Tiles("", ["a", "b"], [0], images)], width=260, height=160)
    elements = list(svg_of(figure).iter("image"))
    picture = draw(figure, PngPen, "").image
    assert len(elements) == 2
    for element, want in zip(elements, pixels, strict=True):
        left, top, width, height = (float(element.get(name)) for name in ("x", "y", "width", "height"))
        assert width / height == pytest.approx(12 / 8, rel=0.01)
        box = [round(SCALE * v) for v in (left, top, left + width, top + height)]
        small = picture.crop(box).resize((12, 8), Image.Resampling.NEAREST)
        assert np.array_equal(np.asarray(small), want)


def test_a_series_is_in_the_legend_once_and_levels_are_in_their_order():
    panels = [Panel("", "x", "y", None, [Series(f"block {i}", [(0, 1.0), (1, 2.0)], (), i / 11)
                                         for i in blocks]) for blocks in ((11,), (0, 11))]
    panels[0].series.append(Series("", [(0, 1.0), (1, 1.0)], (), "grey"))
    texts = [element.text for element in svg_of(Figure("", panels)).iter("text")]
    assert [text for text in texts if text.startswith("block")] == ["block 0", "block 11"]


def test_names_at_the_ends_of_lines_are_apart_and_in_order():
    assert apart([10, 50, 52, 57], 11, 100) == [10, 42, 53, 64]         # around their mean, 53
    assert apart([80, 98, 99], 11, 100) == [78, 89, 100]
    series = [Series("a line", [(0, 1.0), (1, 2.0 + i / 1000)], (), i / 11, tag=str(i)) for i in range(12)]
    root = svg_of(Figure("", [Panel("", "x", "y", None, series)]))
    tags = {int(e.text): float(e.get("y")) for e in root.iter("text") if e.get("font-size") == "10"
            and e.text.isdecimal()}
    assert sorted(tags) == list(range(12))
    assert all(tags[i] - tags[i + 1] > 10.9 for i in range(11))         # the highest line's is above


def test_a_long_title_goes_on_below():
    figure = replace(FIGURE, panels=FIGURE.panels[:1])
    short, long = (svg_of(replace(figure, title=title)) for title in ("short", "a title of many words " * 8))
    assert float(long.get("height")) == float(short.get("height")) + 40
    lines = [e.text for e in long.iter("text") if e.get("font-size") == "15"]
    assert len(lines) == 3 and " ".join(lines) == ("a title of many words " * 8).strip()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_cannot_be_drawn_is_named(bad):
    panel = Panel("", "x", "y", None, [Series("a", [(0, 1.0), (1, bad)], (), "blue")])
    with pytest.raises(ValueError, match=f"{bad} cannot be drawn: expected a finite number"):
        draw(Figure("", [panel]), SvgPen, "")
    with pytest.raises(ValueError, match="a panel without a point"):
        draw(Figure("", [replace(panel, series=[])]), SvgPen, "")


def test_an_axis_of_one_place_is_drawn():
    assert isinstance(linear_axis(32, 32, zero=False, tight=True), Axis)
    draw(Figure("", [Panel("", "x", "y", None, [Series("a", [(32, 1.0)], (), "blue")])]), PngPen, "")
