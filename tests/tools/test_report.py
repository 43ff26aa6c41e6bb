"""The report of runs: its numbers are the log's, a browser shows all of it, and no run can break the page."""

import json
import math
import os
import re
from html.parser import HTMLParser

import pytest
from browser import MISSING, PROGRAM, Browser
from faults.suite import fork
from PIL import Image

from mff_min.config import parse
from mff_min.errors import UserError
from mff_run.files import write_json
from mff_run.log import read_log
from mff_run.picture import OWED
from mff_run.process import run
from tools import report
from tools.records import extremes, open_run, thinned

CONFIG = dict(model="vit_test", data="shapes", global_batch=32, steps=100, norm_pix_loss=True, output_dir="x")
WEIGHTS = [0.1, 0.2, 0.3, 0.1, 0.2, 0.1]


def line_of(step, **more):
    """A line of a log, with numbers of all their digits."""
    values = dict(loss=1 / (step + 0.7), lr=1e-3 * math.cos(step / 70), grad_norm=step ** 0.5,
                  img_per_s=99.5, fusion_weights=[weight + step / 1e4 for weight in WEIGHTS])
    return dict(step=step, epoch=step / 50) | values | more


def make_run(folder, lines, config=(), metrics=None, pictures=(), **more):
    """The folder of a run as a stage leaves it."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", CONFIG | dict(config))
    write_json(folder / "env.json", dict(argv=["train_pretrain.py", "--steps", "100"], torch="2.0", cpus=2))
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / "log.jsonl").write_text(text, errors="surrogatepass")
    if metrics is not None:
        write_json(folder / "metrics.json", metrics)
    for i, step in enumerate(pictures):
        Image.new("RGB", (300, 200), (40 * i, 90, 200)).save(folder / f"reconstruction-{step:06d}.png")
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two runs: MAE, which has ended, and MFF, which has not."""
    folder = tmp_path_factory.mktemp("study")
    steps = [1, *range(10, 101, 10)]
    metrics = dict(step=100, val_loss=0.25, val_loss_of_means=0.97, acc1=71.234, acc1_error=0.456,
                   seconds=61.0)
    make_run(folder / "MAE", [*map(line_of, steps), dict(step=50, epoch=1.0, val_images=40, acc1=50.0)],
             dict(out_indices="last", seed=0), metrics, (0, 50, 100))
    (folder / "MAE/log.jsonl").write_text("".join(
        json.dumps(line_of(step, fusion_weights=[1.0])) + "\n" for step in steps))
    make_run(folder / "MFF", map(line_of, steps[:6]), dict(out_indices="spread", seed=0), None, (0, 40))
    return folder


def write(*runs, output, **flags):
    """The path of the page that tools.report writes."""
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return report.main(parse(report.Config, [*map(str, runs), "--output", str(output), *words]))


class Reader(HTMLParser):
    """The tags that are open at the end of a page, all its tags, its text and what script reads."""

    VOID = {"meta", "input", "img", "br"}

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(page.read_text(errors="surrogatepass"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open += [tag] * (tag not in self.VOID)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script" and self.tags[-1][1].get("id") == "data":
            self.data = json.loads(data)
        elif not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


def whole(page):
    """A Reader of a page that is whole: every tag is closed, and nothing of others runs or is fetched."""
    found = Reader(page)
    assert found.open == [] and page.stat().st_size < 5_000_000
    assert [tag for tag, _ in found.tags].count("script") == 2
    for tag, attributes in found.tags:
        assert tag not in ("a", "link", "iframe", "object", "embed", "base", "form"), tag
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:image/webp;base64,").startswith("data:image/webp;base64,")
    return found


# ---------------------------------------------------------------- numbers


def test_the_numbers_of_the_page_are_those_of_the_logs(study, tmp_path):
    found = whole(write(study / "MAE", study / "MFF", output=tmp_path / "a.html"))
    charts = {chart["title"]: chart for chart in found.data["charts"]}
    for key, title in (("loss", "Loss"), ("lr", "Learning rate"), ("grad_norm", "Gradient norm"),
                       ("img_per_s", "Throughput, images per second")):
        for name, series in zip(("MAE", "MFF"), charts[title]["series"], strict=True):
            lines, log = read_log(study / name / "log.jsonl"), found.data["logs"][series["log"]]
            assert series["name"] == name
            assert log["y"][series["key"]] == [line[key] for line in lines]
            assert log["x"] == {"step": [line["step"] for line in lines],
                                "epoch": [line["epoch"] for line in lines],
                                "images": [32 * line["step"] for line in lines]}
    levels = charts["Weight of every fused level, MFF"]["series"]
    assert [each["name"] for each in levels] == [f"block {i}" for i in (0, 2, 4, 6, 8, 11)]
    for i, level in enumerate(levels):
        assert found.data["logs"][level["log"]]["y"][level["key"]] == [
            line["fusion_weights"][i] for line in read_log(study / "MFF/log.jsonl")]
    assert "Weight of every fused level, MAE" not in charts            # one level has no weight to show


def test_the_page_says_what_was_run_and_how_far_it_is(study, tmp_path):
    text = whole(write(study / "MAE", study / "MFF", output=tmp_path / "a.html")).text
    assert "Finished: step 100 of 100, 0:01:01 of training." in text and "Stopped at step 50 of 100." in text
    assert "71.23 ± 0.46" in text and "python train_pretrain.py --steps 100" in " ".join(text.split())
    differ = text[text.index("Settings that differ"):text.index("Curves over")]
    assert "out_indices" in differ and "last" in differ and "spread" in differ and "seed" not in differ


def test_the_page_of_a_detector_has_its_pictures_its_ap_and_the_parts_of_its_loss(tmp_path):
    parts = dict(loss_rpn_cls=0.5, loss_mask=0.25)
    val = dict(val_images=8, box_AP=5.5, box_AP_error=0.61, mask_AP=None)
    done = val | dict(step=20, box_AP=35.36, box_AP_error=1.38, mask_AP=25.76, mask_AP_error=1.07)
    metrics = done | dict(box_classes={"cat": 36.18, "dog<b>": None})
    lines = [line_of(1, **parts), line_of(10, **parts), val | dict(step=10, epoch=0.2), line_of(20, **parts),
             metrics | dict(done=True)]
    for line in lines:
        line.pop("fusion_weights", None)                                # a detector has none
    folder = make_run(tmp_path / "a", lines, dict(steps=20), metrics)
    for name in ("detection-000000.png", "detection-000010.png", "detection.png"):
        Image.new("RGB", (300, 200)).save(folder / name)
    found = whole(write(folder, output=tmp_path / "a.html"))
    charts, logs = {chart["title"]: chart for chart in found.data["charts"]}, found.data["logs"]
    series = charts["Parts of the loss, a"]["series"]
    assert {each["key"]: logs[each["log"]]["y"][each["key"]] for each in series} == {
        name: [value] * 3 for name, value in parts.items()}
    for title, values in (("AP of boxes, %", [5.5, 35.36]), ("AP of masks, %", [None, 25.76])):
        (curve,) = charts[title]["series"]
        assert logs[curve["log"]]["y"][curve["key"]] == values
        assert logs[curve["log"]]["x"] == {"step": [10, 20], "epoch": [0.2, 0.4], "images": [320, 640]}
    assert found.data["steps"] == [0, 10]                               # the last is that of its last step
    text = " ".join(found.text.split())
    assert text.index("AP of boxes, %") < text.index("Results")            # beside the pictures
    assert "35.4 ± 1.4 % AP of boxes" in text and "25.8 ± 1.1 % AP of masks" in text
    assert "1 results in detail" in text and "box_classes/cat" in text and "36.18" in text


def test_the_page_says_what_the_pictures_owe_to_their_target_as_the_pictures_do(tmp_path):
    runs = [make_run(tmp_path / name, [line_of(1)], config, None, (0,)) for name, config in (
        ("a", {}), ("b", {}), ("c", dict(norm_pix_loss=False)), ("d", dict(target="features")))]
    page = whole(write(*runs[:2], output=tmp_path / "a.html")).text
    assert page.count(OWED[True]) == 1 and OWED[False] not in page
    page = whole(write(*runs, output=tmp_path / "b.html")).text
    assert page.count(f"a, b: {OWED[True]}") == 1 and page.count(f"c: {OWED[False]}") == 1
    assert OWED[True] not in whole(write(runs[3], output=tmp_path / "c.html")).text


def test_an_evaluation_at_the_end_alone_is_no_curve(tmp_path):
    metrics = dict(step=1, val_images=4, val_loss=0.5)
    run = make_run(tmp_path / "a", [line_of(1), metrics | dict(done=True)], dict(steps=1), metrics)
    titles = [chart["title"] for chart in whole(write(run, output=tmp_path / "a.html")).data["charts"]]
    assert "Loss" in titles and "Loss of held-out images" not in titles


def test_a_run_that_goes_on_says_what_is_left(tmp_path):
    folder = make_run(tmp_path / "a", [line_of(50, img_per_s=16.0)])
    with open(folder / "run.lock", "w") as file:
        page = tmp_path / "a.html"

        def work():
            import fcntl
            fcntl.lockf(file, fcntl.LOCK_EX)
            assert fork(lambda: write(folder, output=page)).code == 0
        assert fork(work).code == 0
    assert "Running: step 50 of 100, about 0:01:40 left at 16 images per second." in whole(page).text


def test_what_tools_analyze_has_measured_is_shown(study, tmp_path, monkeypatch):
    folder = make_run(tmp_path / "a", [line_of(1)])
    figure = dict(title="How far", note="A note.", panels=[
        dict(title="a", x_label="block", y_label="pixels", ticks=["0", "1"],
             series=[dict(name="mean", points=[[0, 3.5], [1, 4.25]], errors=[0.5, 0.25])])])
    cells = dict(title="", x_label="block of a", y_label="block of b", ticks=None, x_ticks=["0", "1"],
                 y_ticks=["0", "1"], values=[[1.0, 0.25], [0.5, 1.0]])
    heat = dict(title="CKA", note="", panels=[cells])
    (folder / "figures").mkdir()
    write_json(folder / "figures/attention.json", figure)
    write_json(folder / "figures/cka.json", heat)
    found = whole(write(folder, output=tmp_path / "a.html"))
    chart = next(chart for chart in found.data["charts"] if chart["title"] == "a: pixels")
    series, = chart["series"]
    assert series["points"] == [[0, 3.5], [1, 4.25]] and series["errors"] == [0.5, 0.25]
    assert "A note." in found.text and re.search("0.50\\s*1.00.*1.00\\s*0.25", found.text, re.S)

    write_json(folder / "figures/cka.json", heat | dict(panels=[cells | dict(y_ticks=["0"])]))
    with pytest.raises(UserError, match="other cells than names"):
        write(folder, output=tmp_path / "a.html")


def test_bad_samples_are_named(study, tmp_path):
    folder = make_run(tmp_path / "a", [line_of(1)])
    (folder / "bad_samples.jsonl").write_text(json.dumps(dict(name="<b>x.png", reason="it is torn")) + "\n")
    text = whole(write(folder, output=tmp_path / "a.html")).text
    assert "a: 1 files" in text and "<b>x.png" in text and "it is torn" in text


# ---------------------------------------------------------------- logs that nobody expects


def test_a_log_of_nan_gives_a_page_with_gaps(tmp_path):
    lines = [line_of(1), line_of(2, loss=math.nan), line_of(3, grad_norm=-math.inf), line_of(4),
             '{"step": 5, "lo', "\n", "[1]\n", "nonsense \x00\n", line_of(6)]
    found = whole(write(make_run(tmp_path / "a", lines), output=tmp_path / "a.html"))
    log = found.data["logs"][0]
    assert log["x"]["step"] == [1, 2, 3, 4, 6] and log["y"]["loss"][1] == "nan"
    assert log["y"]["grad_norm"][2] == "-inf" and log["y"]["loss"][3] == line_of(4)["loss"]


def test_a_long_log_keeps_its_ends_and_extremes(tmp_path):
    lines = [line_of(step) for step in range(100_000)]
    lines[31_234]["loss"], lines[77_777]["grad_norm"], lines[50_505]["loss"] = 1e6, 1e7, math.nan
    kept, count = thinned(iter(lines), 1000)
    assert count == 100_000 and 100 < len(kept) <= 1010
    steps = [line["step"] for line in kept]
    assert steps == sorted(set(steps)) and {0, 31_234, 77_777, 50_505, 99_999} <= set(steps)
    assert max(b - a for a, b in zip(steps, steps[1:], strict=False)) < 3000
    assert thinned(iter(lines[:1000]), 1000) == (lines[:1000], 1000) and thinned(iter(()), 5) == ([], 0)
    assert len(extremes(lines)) <= 7


def test_a_million_lines_give_a_page(tmp_path):
    folder = make_run(tmp_path / "a", [], dict(steps=10 ** 6))
    with open(folder / "log.jsonl", "w") as file:
        for step in range(1, 10 ** 6 + 1):
            file.write(f'{{"step": {step}, "loss": {1 / step}, "lr": 0.1}}\n')
    found = whole(write(folder, output=tmp_path / "a.html"))
    assert re.search("of 1,000,000 lines of the log are drawn", found.text)
    assert found.data["logs"][0]["x"]["step"][-1] == 10 ** 6


HOSTILE = ["</script><script>alert(1)</script>", "<!--body-->", "\" onload=\"alert(1)", "&lt;", "\ud800",
           "\u202eabc\x1b[31m", "x" * 100_000, "<img src=http://a.example/x>"]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_text_is_escaped_wherever_it_stands(tmp_path, text):
    name = re.sub("[/\0]", "_", text)[:60].encode("utf-8", "replace").decode()
    folder = make_run(tmp_path / name, [line_of(1), line_of(2, loss=text, epoch=text)],
                      {"masking": text, f"{text}": 1, "list": [text], "data": "a"},
                      {text: 1.0, "step": 2, "acc1": 5.0})
    write_json(folder / "env.json", {"argv": ["train_pretrain.py", text], "host": text, text: 1})
    (folder / "bad_samples.jsonl").write_text(json.dumps(dict(name=text, reason=[text])) + "\n")
    found = whole(write(folder, output=tmp_path / "page.html"))
    assert not any("alert" in str(attributes) for tag, attributes in found.tags if tag != "progress")
    assert not set("\u202e\x1b") & set(found.text)


# ---------------------------------------------------------------- what cannot be shown


def test_a_run_without_anything_is_refused_in_a_line(tmp_path):
    folder = make_run(tmp_path / "a", [])
    ended = fork(lambda: run(report.main, parse(report.Config, [str(folder)])))
    assert ended.code == 2 and ended.said.count("\n") == 1
    assert "has nothing to show: expected log.jsonl with a line of training" in ended.said
    for path, words in ((tmp_path / "none", "no folder of a run"), (tmp_path, "no config.json")):
        with pytest.raises(UserError, match=words):
            write(path, output=tmp_path / "a.html")
    with pytest.raises(UserError, match="--output a.txt: expected a name that ends in .html"):
        write(folder, output="a.txt")


def test_a_picture_that_cannot_be_read_is_left_out_and_named(tmp_path, capsys):
    folder = make_run(tmp_path / "a", [line_of(1)], pictures=(0, 10, 20))
    (folder / "reconstruction-000010.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (folder / "reconstruction-000020.png").unlink()
    os.mkfifo(folder / "reconstruction-000020.png")
    found = whole(write(folder, output=tmp_path / "a.html"))
    assert [attributes["data-step"] for tag, attributes in found.tags if tag == "img"] == ["0"]
    said = capsys.readouterr().out
    assert "reconstruction-000010.png cannot be shown" in said and "reconstruction-000020.png" in said


def test_large_pictures_are_made_smaller_until_they_have_room(tmp_path):
    folder, noise = make_run(tmp_path / "a", [line_of(1)]), Image.effect_noise((800, 500), 90).convert("RGB")
    for step in range(30):
        noise.save(folder / f"reconstruction-{step:06d}.png", compress_level=1)
    found = whole(write(folder, output=tmp_path / "a.html"))
    steps = [int(attributes["data-step"]) for tag, attributes in found.tags if tag == "img"]
    assert steps[0] == 0 and steps[-1] == 29 and steps == sorted(steps) and len(steps) == 18


def test_open_run_without_a_bound_keeps_every_line(study):
    found = open_run(study / "MFF", "MFF", print)
    assert found.log == read_log(study / "MFF/log.jsonl") and found.logged == 6


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip(MISSING)
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


# Texts that are cut off: in boxes that are too small for them, outside their drawing, outside the window.
CUT = """[...document.querySelectorAll("body *")].flatMap(each => {
  const box = each.getBoundingClientRect();
  if (!box.width || each.closest(".scroll") && !each.matches(".scroll")) return [];
  if (each.matches("svg text")) {
    const around = each.closest("svg").getBoundingClientRect();
    const out = box.left < around.left - 1 || box.right > around.right + 1;
    return out || box.bottom > around.bottom + 1 ? [`${each.textContent} in a chart`] : [];
  }
  const wide = !each.matches(".scroll") && each.clientWidth && each.scrollWidth > each.clientWidth + 1;
  const out = box.right > innerWidth + 1 || box.left < -1;
  return wide || out ? [`${each.tagName} ${each.textContent.slice(0, 40)}`] : [];
})"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_all_of_the_page(browser, study, tmp_path, width, dark):
    browser.open(write(study / "MAE", study / "MFF", output=tmp_path / "a.html"), width, dark)
    assert browser.ask(CUT) == []
    assert browser.ask("document.documentElement.scrollWidth <= innerWidth")
    paper = browser.ask("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(22, 24, 29)" if dark else "rgb(255, 255, 255)")
    drawn = "[...document.querySelectorAll('.chart svg')].map(each => each.childElementCount)"
    assert len(browser.ask(drawn)) == 5 and min(browser.ask(drawn)) > 5
    assert (browser.errors, browser.requests) == ([], [])


def test_the_slider_turns_the_pictures_of_both_runs(browser, study, tmp_path):
    browser.open(write(study / "MAE", study / "MFF", output=tmp_path / "a.html"))
    seen = "[...document.querySelectorAll('.pictures img:not([hidden])')].map(each => each.dataset.step)"
    assert browser.ask(seen) == ["100", "40"]
    browser.ask("document.getElementById('slider').focus()")
    for key, steps in (("Home", ["0", "0"]), ("ArrowRight", ["0", "40"]), ("ArrowRight", ["50", "40"]),
                       ("End", ["100", "40"]), ("ArrowLeft", ["50", "40"])):
        browser.press(key)
        assert browser.ask(seen) == steps, key
    assert browser.ask("document.getElementById('at').textContent") == "step 50"
    assert browser.ask("[...document.querySelectorAll('.pictures img:not([hidden])')].every(each => "
                       "each.complete && each.naturalWidth === 300)")
    assert browser.errors == []


def test_a_curve_tells_its_values_under_the_pointer_and_the_keys(browser, study, tmp_path):
    browser.open(write(study / "MAE", study / "MFF", output=tmp_path / "a.html"))
    tip = "document.querySelector('.chart .tip')"
    assert browser.ask(f"{tip}.hidden")
    box = browser.ask("(() => { const svg = document.querySelector('svg'); svg.scrollIntoView(); "
                      "const box = svg.getBoundingClientRect(); return [box.left, box.top, box.width]; })()")
    browser.hover(box[0] + box[2] - 1, box[1] + 60)
    assert browser.ask(f"{tip}.innerText").split() == ["steps:", "100", "MAE", "0.00993"]
    browser.ask("document.querySelector('.chart svg').focus()")
    browser.press("Home")
    assert browser.ask(f"{tip}.innerText").split() == ["steps:", "1", "MAE", "0.5882", "MFF", "0.5882"]
    browser.press("ArrowRight")
    assert browser.ask(f"{tip}.innerText").split()[:2] == ["steps:", "10"]
    browser.press("Escape")
    assert browser.ask(f"{tip}.hidden") and browser.errors == []


def test_the_tables_of_the_page_have_the_numbers_of_the_log(browser, study, tmp_path):
    browser.open(write(study / "MAE", study / "MFF", output=tmp_path / "a.html"))
    browser.ask("document.querySelectorAll('.chart details').forEach(each => { each.open = true; })")
    browser.ask("new Promise(resolve => setTimeout(resolve, 50))")
    cells = ("[...document.querySelector('.chart table').rows]"
             ".map(row => [...row.cells].map(cell => cell.textContent))")
    head, *rows = browser.ask(cells)
    assert head == ["steps", "MAE", "MFF"]
    for column, name in ((1, "MAE"), (2, "MFF")):
        lines = read_log(study / name / "log.jsonl")
        assert [(int(row[0]), float(row[column])) for row in rows if row[column]] == [
            (line["step"], line["loss"]) for line in lines]
    browser.ask("document.querySelector('input[value=images]').click()")
    head, *rows = browser.ask(cells)
    assert head[0] == "images seen" and [int(row[0]) for row in rows][:3] == [32, 320, 640]
    browser.ask("document.querySelector('input[value=epoch]').click()")
    browser.ask("document.getElementById('log').click()")
    assert browser.ask(cells)[1][0] == "0.02" and browser.errors == []


@pytest.mark.parametrize("lines", [
    [line_of(7)], [line_of(1, loss=0.5, grad_norm=0.51), line_of(2, loss=0.500001, grad_norm=0.52)],
    [line_of(10 ** 17, loss=1e29)], [line_of(1, loss=-100_000.5), line_of(20_000_000, loss=99_999.5)],
], ids=["a point", "a narrow range", "large numbers", "long numbers"])
def test_curves_of_odd_numbers_are_drawn_whole(browser, tmp_path, lines):
    folder = make_run(tmp_path / "a run", lines, dict(steps=None))
    browser.open(write(folder, output=tmp_path / "a.html"), 390)
    for place in ("#log", "input[value=epoch]", "input[value=images]"):
        assert browser.ask(CUT) == []
        browser.ask(f"document.querySelector('{place}').click()")
    assert browser.errors == [] and browser.ask(CUT) == []
    assert not browser.ask("document.querySelector('main').innerHTML.includes('NaN')")


def test_a_browser_runs_nothing_of_a_hostile_run(browser, tmp_path):
    text = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
    folder = make_run(tmp_path / "a", [line_of(1, loss=text), line_of(2)], {text: text},
                      {text: 1.0, "step": 2}, pictures=(1,))
    browser.open(write(folder, output=tmp_path / "a.html"))
    browser.ask("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    browser.ask("new Promise(resolve => setTimeout(resolve, 50))")
    assert browser.ask("document.title") == "a - report of mff_min"
    assert (browser.errors, browser.requests) == ([], [])


def test_what_is_cut_off_or_wrong_is_caught(browser, tmp_path):
    page = tmp_path / "a.html"
    page.write_text("<body><div style='width: 50px; overflow: hidden; white-space: nowrap'>far too long</div>"
                    "<svg width=50 height=20><text x=40 y=15>outside</text></svg>"
                    "<script>undefined.name</script><img src='http://127.0.0.1:9/x.png'>")
    browser.open(page)
    assert len(browser.ask(CUT)) == 2
    assert browser.errors and browser.requests == ["http://127.0.0.1:9/x.png"]
    browser.errors.clear()
    browser.requests.clear()
