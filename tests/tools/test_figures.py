"""Figures: the drawing shows the numbers of the description, and can be read, in the dark too."""

import itertools
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import generated
import numpy as np
import pytest
from PIL import Image

from mff_min.errors import UserError
from mff_run.picture import GAP, TOP, scale_of
from tools import comparison
from tools.figures import (
    COLOURS,
    ON_CELLS,
    STYLE,
    Figure,
    HeatMap,
    Panel,
    Series,
    apart,
    check_matplotlib,
    colour_of,
    draw,
    luminance,
    save,
)

COMMAND = "python x.py --names 'a & b' <c>"
LINE = Series("measured", [(0.0, 1.0), (250.0, 4.0), (1000.0, 2.5)], [0.5, 0.25, 0.0], "blue")
FIGURE = Figure("A & B", [Panel("left", "images", "loss", None, [LINE]),
                          Panel("$right$", "block", "acc1, %", ["0", "1", "fused"],
                                [Series("probe", [(0, 10.0), (1, 30.0), (2, 20.0)], (), 0.5),
                                 Series("level", [(-0.5, 15.0), (2.5, 15.0)], (), "grey", dash=4)])],
                note="A note.")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder that holds FIGURE as a.png, a.svg, a.json, and once more as b."""
    folder = tmp_path_factory.mktemp("saved") / "new"
    for name in "ab":
        save(FIGURE, folder / name, COMMAND)
    return folder


# ---------------------------------------------------------------- numbers


def test_the_drawing_has_the_points_and_bars_of_the_description():
    left, right = draw(FIGURE).axes
    line, = left.lines
    assert line.get_xydata().tolist() == [list(point) for point in LINE.points]
    bars, = left.collections
    assert [segment.tolist() for segment in bars.get_segments()] == [
        [[x, y - error], [x, y + error]] for (x, y), error in zip(LINE.points, LINE.errors, strict=True)]
    assert [(line.get_marker(), line.get_linestyle()) for line in right.lines] == [("o", "-"), ("", "--")]
    assert [label.get_text() for label in right.get_xticklabels()] == ["0", "1", "fused"]
    assert [left.get_xlabel(), left.get_ylabel(), right.get_title()] == ["images", "loss", "$right$"]


def test_y_begins_at_0_where_the_panel_says_so_and_nothing_is_negative():
    for zero, points, bottom in ((True, [(0, 20.0), (1, 24.0)], 0), (False, [(0, 20.0), (1, 24.0)], 19.8),
                                 (True, [(0, -3.0), (1, 4.0)], -3.35), (True, [(0, 0.0), (1, 0.0)], 0)):
        panel = Panel("", "x", "y", None, [Series("a", points, (), "blue")], zero=zero)
        axes, = draw(Figure("", [panel])).axes
        low, high = axes.get_ylim()
        assert low == pytest.approx(bottom) and high > max(y for _, y in points)


def test_panels_share_their_y_axis_where_the_figure_says_so():
    low, high = (Panel("", "x", "y", ["0", "1"], [Series("a", [(0, first), (1, top)], (), "blue")])
                 for first, top in ((-1.0, 1.0), (3.0, 30.0)))
    for share in (False, True):
        a, b = (axes.get_ylim() for axes in draw(Figure("", [low, high], share_y=share)).axes)
        assert (a == b) == share and a[0] < -1 and b[1] > 30


def test_a_heat_map_has_a_cell_for_each_value_and_row_0_at_the_bottom():
    values = [[0.0, 0.25, 0.5], [1.0, 0.75, -0.1]]
    axes, = draw(Figure("", [HeatMap("", "a", "b", ["0", "1", "2"], ["p", "q"], values)])).axes
    image, = axes.images
    assert image.get_array().tolist() == values and image.get_clim() == (0, 1)
    assert axes.get_ylim() == (-0.5, 1.5)                               # upwards
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (j, i): f"{values[i][j]:.2f}" for i in range(2) for j in range(3)}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_cannot_be_drawn_is_named(bad):
    line = Series("a", [(0, 1.0), (1, 2.0)], (), "blue")
    panel = Panel("", "x", "y", None, [line])
    for series in ([replace(line, points=[(0, 1.0), (1, bad)])], [replace(line, errors=[0.0, bad])]):
        with pytest.raises(ValueError, match=f"{bad} cannot be drawn: expected a finite number"):
            draw(Figure("", [panel, replace(panel, series=series)]))
    with pytest.raises(ValueError, match=f"{bad} cannot be drawn"):
        draw(Figure("", [HeatMap("", "", "", ["0"], ["0"], [[bad]])]))
    with pytest.raises(ValueError, match="panel 'p' holds no point"):
        draw(Figure("", [replace(panel, title="p", series=[])]))


# ---------------------------------------------------------------- files


def test_all_three_files_hold_the_command_and_the_json_the_numbers(saved):
    assert {path.name for path in saved.iterdir()} == {f"{name}.{kind}" for name in "ab"
                                                       for kind in ("json", "png", "svg")}
    with Image.open(saved / "a.png") as picture:
        assert picture.text["Command"] == COMMAND and picture.size[0] == 2 * 2 * 480
    root = ET.parse(saved / "a.svg").getroot()
    assert (root.findtext("{*}title"), root.findtext(".//{*}description")) == ("A & B", COMMAND)
    found = json.loads((saved / "a.json").read_text())
    assert (found["title"], found["command"], found["note"]) == ("A & B", COMMAND, "A note.")
    assert found["panels"][0]["series"] == [
        dict(name="measured", points=[list(point) for point in LINE.points], errors=LINE.errors)]
    assert found["panels"][1]["ticks"] == ["0", "1", "fused"]


def test_the_same_figure_is_the_same_bytes(saved):
    for suffix in ("png", "svg", "json"):
        assert (saved / f"a.{suffix}").read_bytes() == (saved / f"b.{suffix}").read_bytes()


def test_drawing_leaves_the_settings_of_matplotlib_alone_and_loads_no_pyplot():
    code = """
import sys
from tools.figures import Figure, Panel, Series, draw
assert "matplotlib" not in sys.modules
import matplotlib
before = matplotlib.rcParams.copy()
draw(Figure("", [Panel("", "", "", None, [Series("a", [(0, 1), (1, 2)], (), "blue")])]))
changed = [key for key in before if key != "backend" and before[key] != matplotlib.rcParams[key]]
assert not changed and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=generated.ROOT, check=True)


def test_without_matplotlib_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = r"^matplotlib is not installed: .* pip install -e '\.\[figures\]'$"
    for call in (check_matplotlib, lambda: draw(FIGURE)):
        with pytest.raises(UserError, match=line):
            call()


# ---------------------------------------------------------------- looks


def test_every_colour_of_the_svg_has_one_for_the_dark(saved):
    """But those of numbers on the cells of a heat map, which are the same."""
    text = (saved / "a.svg").read_text()
    rules = re.search(r"@media \(prefers-color-scheme: dark\)\{\n(.*?)\}</style>", text, re.S)[1]
    rules = dict(re.findall(r'^\[style\*="(\w+: #\w{6})"\]\{(\w+:#\w{6})!important\}$', rules, re.M))
    used = set(re.findall(r"(?:fill|stroke): #\w{6}", "".join(re.findall(r'style="(.*?)"', text))))
    colours = [*(set(COLOURS) & {"paper", "ink", "grid", "grey", "blue"}), 0.5]
    assert {use.split()[1] for use in used} == set(map(colour_of, colours)) and used <= set(rules)
    for colour in colours:
        for kind in ("fill", "stroke"):
            assert rules[f"{kind}: {colour_of(colour)}"] == f"{kind}:{colour_of(colour, True)}"
    assert not set(ON_CELLS) & {light for light, _ in COLOURS.values()}


def contrast(a, b):
    """The contrast ratio of two colours, as WCAG 2 defines it; "#rrggbb" or channels from 0 to 1."""
    a, b = (luminance([c / 255 for c in bytes.fromhex(x[1:])] if isinstance(x, str) else x) for x in (a, b))
    return (max(a, b) + 0.05) / (min(a, b) + 0.05)


RAMP = np.linspace(0, 1, 129).tolist()
TEXT = {"ink", "grey", *RAMP}


@pytest.mark.parametrize("dark", [False, True])
def test_every_colour_can_be_told_from_the_paper(dark):
    """3 : 1 is what WCAG asks of graphs, 4.5 : 1 of text."""
    paper = colour_of("paper", dark)
    for name in (*(set(COLOURS) - {"paper", "grid"}), *RAMP):
        assert contrast(colour_of(name, dark), paper) >= (4.5 if name in TEXT else 3), name


def test_every_text_has_a_colour_that_text_may_have():
    """Titles, ticks, legend, note, and names at the ends of lines."""
    series = [Series(f"block {i}", [(0, 1.0), (1, 2.0 + i)], (), i / 2, tag=str(i)) for i in range(3)]
    canvas = draw(replace(FIGURE, panels=[Panel("left", "x", "y", None, [*series, LINE])]))
    from matplotlib.text import Text
    used = {text.get_color() for text in canvas.findobj(Text) if text.get_text()}
    assert used == {colour_of(colour) for colour in ("ink", "grey", 0.0, 0.5, 1.0)}


def test_numbers_in_a_heat_map_can_be_read():
    values = [np.linspace(-0.1, 1.1, 241).tolist()]
    axes, = draw(Figure("", [HeatMap("", "", "", [""] * 241, [""], values)])).axes
    cells = axes.images[0].to_rgba(np.array(values[0]))
    assert {text.get_color() for text in axes.texts} == set(ON_CELLS)
    for cell, text in zip(cells, axes.texts, strict=True):
        assert contrast(cell[:3], text.get_color()) >= 4.5, text.get_text()


def legend_names(figure):
    legend, = draw(figure).legends
    return [text.get_text() for text in legend.get_texts()]


def test_a_series_is_in_the_legend_once_and_levels_are_in_their_order():
    panels = [Panel("", "x", "y", None, [Series(f"block {i}", [(0, 1.0), (1, 2.0)], (), i / 11)
                                         for i in blocks]) for blocks in ((11,), (0, 11))]
    panels[0].series.extend([Series("", [(0, 1.0), (1, 1.0)], (), "grey"), LINE])
    assert legend_names(Figure("", panels)) == ["block 0", "block 11", "measured"]


def test_names_at_the_ends_of_lines_are_apart_and_in_order():
    assert np.allclose(apart([0.1, 0.5, 0.52, 0.57], 0.11), [0.1, 0.42, 0.53, 0.64])    # around a mean
    assert np.allclose(apart([0.01, 0.02, 0.2], 0.11), [0, 0.11, 0.22])
    series = [Series("a line", [(0, 1.0), (1, 2.0 + i / 1000)], (), i / 11, tag=str(i)) for i in range(12)]
    axes, = draw(Figure("", [Panel("", "x", "y", None, series)])).axes
    tags = {int(text.get_text()): text.get_window_extent() for text in axes.texts}
    assert sorted(tags) == list(range(12))
    assert all(tags[i].y1 <= tags[i + 1].y0 for i in range(11))         # the highest line's is above


def faults_of_layout(canvas):
    """What of a drawing is outside of it, and which of its parts lie over one another."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    with rc_context(STYLE):                                             # ticks are chosen when they are drawn
        FigureCanvasAgg(canvas).draw()
        parts = {f"panel {i}": axes.get_tightbbox() for i, axes in enumerate(canvas.axes)}
    width, height = canvas.canvas.get_width_height()
    parts |= {text.get_text()[:20]: text.get_window_extent() for text in canvas.texts if text.get_text()}
    parts |= dict(zip(["legend"], (legend.get_window_extent() for legend in canvas.legends), strict=False))
    for name, box in parts.items():
        if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height:
            yield f"{name} is cut off"
    boxes = list(parts.items())
    yield from (f"{a} and {b} overlap" for i, (a, one) in enumerate(boxes) for b, other in boxes[:i]
                if one.padded(-0.5).overlaps(other))
    for i, axes in enumerate(canvas.axes):
        labels = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
        yield from (f"ticks of panel {i} overlap" for a, b in zip(labels, labels[1:], strict=False)
                    if a.overlaps(b))


@pytest.mark.parametrize("name", sorted(generated.figures()))
def test_nothing_of_a_figure_in_the_documents_is_cut_off_or_overlaps(name):
    figure, _ = generated.figures()[name]
    assert list(faults_of_layout(draw(figure))) == []


DRAWN = {name: figure for name, (figure, _) in generated.figures().items()}
README_WIDTH = 880                                                      # pixels that a page of GitHub has


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_a_colour_of_the_legend_means_one_thing_in_a_figure(name):
    """Two colours are at least 60 steps of 255 apart, as red, green and blue."""
    named = {(line.name, colour_of(line.colour)) for panel in DRAWN[name].panels
             for line in getattr(panel, "series", ()) if line.name and not line.tag}
    assert len(named) == len({name for name, _ in named})
    for (_, a), (_, b) in itertools.combinations(named, 2):
        assert math.dist(bytes.fromhex(a[1:]), bytes.fromhex(b[1:])) > 60, named


def test_a_method_has_one_colour_in_all_figures():
    found = {}
    for figure in DRAWN.values():
        for line in (line for panel in figure.panels for line in getattr(panel, "series", ())):
            for method in comparison.COLOURS:
                if line.name == method or line.name.endswith(f", {method}"):
                    found.setdefault(method, set()).add(line.colour)
    assert {"MAE", "MFF_MAE", "pixels"} <= set(found)
    assert found == {method: {comparison.COLOURS[method]} for method in found}


@pytest.mark.parametrize("name", sorted(DRAWN))
def test_a_panel_has_more_than_a_point(name):
    for panel in DRAWN[name].panels:
        if isinstance(panel, Panel):
            assert max(len(line.points) for line in panel.series if not line.dash) > 1, panel.title


@pytest.mark.parametrize("name", sorted(name for name in DRAWN if name.endswith("_cka")))
def test_numbers_of_a_heat_map_can_be_read_at_the_width_of_the_readme(name):
    """None touches the next one, and a digit is 9 pixels high where the figure is as wide as a page."""
    canvas = draw(DRAWN[name])
    width, _ = canvas.canvas.get_width_height()
    for axes in canvas.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        cell = axes.get_window_extent().width / len(axes.get_xticks())
        assert max(box.width for box in boxes) < cell
        assert min(box.height for box in boxes) * min(1, README_WIDTH / width) >= 9


def test_long_texts_get_the_room_that_they_need():
    title, note = "a title of many words " * 8, "a note that goes on and on " * 20
    series = [replace(LINE, name=f"a run with a long name, the {i}th of them") for i in range(5)]
    long = Figure(title, [Panel("", "x", "y", None, series)], note=note)
    canvas = draw(long)
    assert list(faults_of_layout(canvas)) == []
    assert [" ".join(text.get_text().split()) for text in canvas.texts] == [title.strip(), note.strip()]


@pytest.mark.parametrize("change, fault", [
    (lambda canvas: canvas.text(0.95, 0.5, "a long text"), "a long text is cut off"),
    (lambda canvas: canvas.legends[0].set_bbox_to_anchor((0.1, 0.5)), "legend and panel 0 overlap"),
    (lambda canvas: canvas.axes[0].set_xticks([0, 1], ["a long name", "another one"]), "ticks of panel 0"),
])
def test_a_fault_of_the_layout_is_found(change, fault):
    canvas = draw(FIGURE)
    change(canvas)
    assert fault in " ".join(faults_of_layout(canvas))


# ---------------------------------------------------------------- the demo's picture


def test_the_demos_picture_has_a_dark_form_with_the_same_tiles():
    side = json.loads((generated.ROOT / "results/demo.json").read_text())["config"]["img_size"][0]
    paths = (generated.ROOT / f"docs/figures/{name}.png" for name in ("demo", "demo_dark"))
    light, dark = (np.asarray(Image.open(path).convert("RGB"), dtype=int) for path in paths)
    assert (np.asarray(generated.in_the_dark(Image.fromarray(light.astype(np.uint8)), side)) == dark).all()
    size, paper = side * scale_of(side), list(bytes.fromhex(COLOURS["paper"][1][1:]))
    assert (light[TOP:TOP + size, GAP:GAP + size] == dark[TOP:TOP + size, GAP:GAP + size]).all()
    assert dark[0, 0].tolist() == dark[-1, -1].tolist() == paper
    texts = dark[:TOP].reshape(-1, 3)
    assert contrast(texts.max(0) / 255, np.array(paper) / 255) > 7
