"""HTML of a page: escaped text, tables, and the charts that the script of report.html draws.

Arguments are text of anybody, and are escaped, unless a docstring calls them HTML.
"""

import html
import json

from mff_min.config import typed
from mff_run.jsonfile import is_number
from tools.figures import ON_CELLS, HeatMap, colour_of, luminance

MOST_ROWS, MOST_TEXT = 500, 600                                         # of a table; letters of a text
HEAT = (0.95, 0.96, 0.98), (0.05, 0.28, 0.55)                            # RGB of the least, the largest


def text(value):
    """A value as text of the page: escaped, cut where it is long, without control characters."""
    value = value if isinstance(value, str) else json.dumps(value, default=str)
    shown = value if len(value) <= MOST_TEXT else f"{value[:MOST_TEXT]} ... ({len(value)} characters)"
    return html.escape("".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1]
                               for letter in shown))


def setting(value):
    """A setting as it would be typed."""
    if isinstance(value, list) and value and not any(isinstance(each, list | dict) for each in value):
        value = typed(tuple(value))
    return "not given" if value is None else text(value)


def table(head, rows, caption=""):
    """A table whose first column names its rows; the cells and the caption are HTML."""
    more = f"<p class=quiet>and {len(rows) - MOST_ROWS} more</p>" if len(rows) > MOST_ROWS else ""
    lines = ["".join(f"<th scope=col>{cell}</th>" for cell in head)]
    for first, *cells in rows[:MOST_ROWS]:
        lines.append(f"<th scope=row>{first}</th>" + "".join(f"<td>{cell}</td>" for cell in cells))
    return (f"<div class=scroll tabindex=0><table>{caption and f'<caption>{caption}</caption>'}"
            + "".join(f"<tr>{line}</tr>" for line in lines) + f"</table></div>{more}")


def section(title, *parts):
    """A section of the page with this title and these parts, all HTML, or "" where it has no parts."""
    inside = "\n".join(filter(None, parts))
    return f"<section><h2>{title}</h2>\n{inside}</section>" if inside else ""


def css(colour):
    """A colour of figures.py in both palettes, as CSS."""
    return f"light-dark({colour_of(colour)},{colour_of(colour, True)})"


def short(value):
    """A number in a few digits."""
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"


# ---------------------------------------------------------------- charts


class Charts:
    """The charts of a page: what the script draws, and the columns of logs that it draws from."""

    def __init__(self):
        self.charts, self.logs = [], []

    def columns(self, lines, batch, keys):
        """The number of a new log with its lines' columns: steps, epochs, images seen, and the keys.

        batch is how many images a step sees, or None.
        """
        x = {"step": [line["step"] for line in lines], "epoch": [line.get("epoch") for line in lines],
             "images": [line["step"] * batch if batch else None for line in lines]}
        y = {key: [line.get(key) for line in lines] for key in keys}
        weights = [line.get("fusion_weights", []) for line in lines]
        for i in range(max(map(len, weights), default=0)):
            y[f"weight {i}"] = [found[i] if i < len(found) else None for found in weights]
        self.logs.append({axis: {name: plain(values) for name, values in columns.items()}
                          for axis, columns in (("x", x), ("y", y))})
        return len(self.logs) - 1

    def add(self, title, series, note="", **more):
        """The HTML of a chart, which the script fills in.

        A series is a dict of name, colour, and either points and errors or the number of a log and its key.
        """
        self.charts.append(dict(title=title, series=series) | more)
        return (f"<figure class=chart data-chart={len(self.charts) - 1}>"
                f"<figcaption><h3>{text(title)}</h3></figcaption><div class=tip role=status hidden></div>"
                f"{note and f'<p class=quiet>{text(note)}</p>'}<details><summary>Numbers</summary>"
                f'<div class="scroll tall" tabindex=0></div></details></figure>')

    def panel(self, panel, title):
        """The HTML of a panel of figures.py: a chart, or a table of coloured cells."""
        if isinstance(panel, HeatMap):
            return heat_table(panel)
        names = [line.name for line in panel.series]
        series = [dict(name=line.name, points=[list(point) for point in line.points], colour=css(line.colour),
                       dash=line.dash, dots=line.dots and not line.dash, line=line.line,
                       tag=line.tag or line.name * (line.name not in names[:i]))
                  | ({"errors": list(line.errors)} if len(line.errors) else {})
                  for i, line in enumerate(panel.series)]
        return self.add(": ".join(filter(None, (panel.title or title, panel.y_label))), series,
                        x=panel.x_label, ticks=panel.ticks, zero=panel.zero, height=260)


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
            rgb = [a + (b - a) * place for a, b in zip(*HEAT, strict=True)]
            ink, back = ON_CELLS[luminance(rgb) < 0.179], bytes(round(255 * c) for c in rgb).hex()
            cells.append(f'<td style="background:#{back};color:{ink}">{value:.2f}</td>')
        rows.append(f"<tr><th scope=row>{text(name)}</th>{''.join(cells)}</tr>")
    foot = "".join(f"<th scope=col>{text(name)}</th>" for name in panel.x_ticks)
    return (f"<div><table class=heat><caption>Down: {text(panel.y_label)}. Across: {text(panel.x_label)}."
            f"</caption>{''.join(rows)}<tr><td></td>{foot}</tr></table></div>")
