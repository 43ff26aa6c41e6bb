"""tools.study and what it says of its results: its order, its arithmetic, and that no unit is done twice."""

import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile

import pytest
import torch
from PIL import Image
from run_folders import same_bits
from sources import ROOT

from mff_min.config import parse
from mff_min.errors import UserError
from tools import comparison, study

# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("df, t", [(1, 12.7062047362), (2, 4.3026527297), (3, 3.1824463053),
                                   (4, 2.7764451052), (9, 2.2621571628), (10, 2.2281388520),
                                   (30, 2.0422724563), (100, 1.9839715185)])
def test_the_quantiles_of_student_are_those_of_the_published_table(df, t):
    assert comparison.t_quantile(0.95, df) == pytest.approx(t, abs=1e-9)


def test_of_one_and_of_two_degrees_of_freedom_the_quantile_is_a_closed_form():
    assert comparison.t_quantile(0.99, 1) == pytest.approx(math.tan(0.99 * math.pi / 2), rel=1e-12)
    assert comparison.t_quantile(0.99, 2) == pytest.approx(0.99 * math.sqrt(2 / (1 - 0.99 ** 2)), rel=1e-12)


def test_a_difference_is_taken_seed_by_seed_and_its_interval_is_students():
    found = comparison.difference({0: 11.0, 1: 22.0, 2: 33.0, 9: 99.0}, {0: 10.0, 1: 20.0, 2: 30.0, 7: 0.0})
    assert (found.mean, found.pairs) == (2.0, 3)                        # 1, 2 and 3, of deviation 1
    assert found.half == pytest.approx(4.3026527297 / math.sqrt(3)) and not found.told
    assert comparison.difference({0: 11.0, 1: 21.1}, {0: 10.0, 1: 20.0}).told
    assert comparison.difference({0: 5.0}, {0: 4.0}) == comparison.Difference(1.0, None, 1)
    assert comparison.difference({0: 5.0}, {1: 4.0}) is None


# ---------------------------------------------------------------- tables and sentences


def record(method, seed, stage, **metrics):
    flags = "--model vit_test --out-indices " + ("last" if method == "MAE" else "spread")
    return dict(method=method, seed=seed, stage=stage, flags=flags, seconds=1.0, environment=0,
                metrics=dict(val_images=400, **metrics))


def layers(method, seed, shallow, deep):
    values = (("trained", "block 2", shallow), ("trained", "block 11", deep), ("chance", "chance", 10.0))
    rows = [dict(label="shape", kind=kind, layer=layer, acc1=acc1) for kind, layer, acc1 in values]
    return record(method, seed, "layers", rows=rows)


@pytest.fixture
def results():
    """Two seeds of two methods, and one of a third."""
    records = [layers("MAE", 0, 20.0, 30.0), layers("MAE", 1, 22.0, 32.0),
               layers("MFF_MAE", 0, 21.0, 33.0), layers("MFF_MAE", 1, 23.0, 35.2),
               layers("MFF_2", 0, 20.0, 29.0), record("MAE", 0, "finetune", acc1=50.0),
               record("MFF_MAE", 0, "finetune", acc1=49.0)]
    for seed in (0, 1):
        run = record("MFF_MAE", seed, "pretrain")
        run["loss"] = [[1, 1.0], [20, 0.5 + seed / 10], [40, 0.4]]
        run["fusion"] = [[1, *[1 / 6] * 6], [40, 0.3 - seed / 10, 0.2, 0.2, 0.1, 0.1, 0.1 + seed / 10]]
        records.append(run)
    environment = dict(device="cpu", cpus=2, torch="2.0")
    parts = [dict(units=7, jobs=2, seconds=5), dict(units=2, jobs=2, seconds=60)]
    return dict(preset="minutes", data="shapes", parts=parts, environments=[environment], records=records)


def test_a_table_has_mean_deviation_n_and_the_paired_difference(results):
    metric, tuned = comparison.metrics_of(results)
    assert list(comparison.table_of(metric)) == [
        "| shape, linear | n | mean, % | sd | minus MAE | 95 % interval |",
        "|---|---|---|---|---|---|",
        "| MAE | 2 | 31.00 | 1.41 |  |  |",
        "| MFF_MAE | 2 | 34.10 | 1.56 | +3.10 | +1.83 to +4.37 |",     # 3.0 and 3.2: half is 12.706 * 0.1
        "| MFF_2 | 1 | 29.00 |  | -1.00 | one pair: none |"]
    assert list(comparison.table_of(tuned))[-1] == "| MFF_MAE | 1 | 49.00 |  | -1.00 | one pair: none |"


def test_a_sentence_says_what_can_be_told_and_what_cannot(results):
    metric, tuned = comparison.metrics_of(results)
    assert comparison.verdict(metric) == ("shape, linear: better than MAE: MFF_MAE (+3.10); no difference "
                                          "can be told from MAE: MFF_2 (-1.00, 1 pair).")
    assert comparison.verdict(tuned) == ("shape, fine-tuning: no difference can be told from MAE: MFF_MAE "
                                         "(-1.00, 1 pair).")
    results["records"] += [layers("random", 0, 20.0, 21.0), layers("random", 1, 20.0, 23.2)]
    text = comparison.verdict(comparison.metrics_of(results)[0])        # 9 and 8.8 more
    assert text.startswith("shape, linear: MAE is better than random weights (+8.90); better")
    results["records"][-1]["metrics"]["rows"][1]["acc1"] = 30.0
    text = comparison.verdict(comparison.metrics_of(results)[0])
    assert "MAE is not told apart from random weights (+5.50)" in text
    results["records"][2]["metrics"]["rows"][1]["acc1"] = 10.0          # now -20 and +3.2
    assert "better than" not in comparison.verdict(comparison.metrics_of(results)[0])


def test_a_report_states_what_is_lacking_and_the_error_of_the_test_set_apart(results):
    units = [study.unit_of(each) for each in results["records"]]
    planned = [*units[2:], study.Unit("MFF_4", 0, "layers"), study.Unit("MFF_4", 1, "layers")]
    text = comparison.report(results, planned)                          # two more are done: no matter
    assert text.startswith("Preset minutes on shapes, seeds 0, 1, 7 of 9 units so far; measured on cpu, 2 co")
    p = (0.31 + 0.341 + 0.29) / 3
    error = 100 * math.sqrt(p * (1 - p) / 400)
    assert f"shape, linear: {error:.2f} points of 400 images, chance 10.0 %" in text
    assert "| MFF_MAE | 22.0 | 34.1 |" in text                          # of both layers
    assert "2 cores, PyTorch 2.0. 9 units took 0:01:05, 2 at a time.\n" in text
    assert "so far" not in comparison.report(results, units)
    results["records"][3]["seconds"] = None                             # this one was cut
    assert "took" not in comparison.report(results, units)
    # Blocks 2 and 4 end at 0.2; block 0 at 0.3 and 0.2, the last at 0.1 and 0.2.
    assert "MFF_MAE (equal: 0.167): block 0 (0.250), 2 (0.200), 4 (0.200)." in text


def test_readme_and_report_say_what_so_many_comparisons_are_worth(results):
    want = "there are 1. If no row differed from MAE, 0.1 of them would exclude 0 by chance. All share MAE's"
    assert want in comparison.summary(results, []) and want in comparison.report(results, [])


def test_a_report_of_the_first_units_and_of_a_torn_log_is_whole(results):
    first = dict(results, records=results["records"][-1:])              # one encoder, not yet measured
    assert comparison.summary(first, []) == comparison.origin(first, [])
    assert "for ." not in comparison.report(first, [])
    assert list(comparison.figures_of(first)) == ["loss", "weights"]
    first = dict(results, records=[record("MAE", 0, "finetune", acc1=50.0)])
    assert comparison.report(first, []) == comparison.origin(first, []) # chance is not known yet
    del results["records"][-1]["loss"][1]
    assert comparison.figures_of(results)["loss"].panels[0].series[0].points == [(40.0, 0.4)]


def test_figures_show_the_numbers_of_the_results(results):
    assert "differences" not in comparison.figures_of(results)          # of one metric it would be a point
    results["records"] += [record(method, seed, "knn", acc1=20.0 + seed * (method == "MFF_MAE"))
                           for method in ("MAE", "MFF_MAE") for seed in (0, 1)]
    figures = comparison.figures_of(results)
    panel, = figures["differences"].panels
    zero, means = panel.series
    assert panel.title == "MFF_MAE" and panel.ticks == ["shape, linear", "shape, k-NN"]
    assert means.points == [(0.0, pytest.approx(3.1)), (1.0, pytest.approx(0.5))]
    assert means.errors == pytest.approx([1.2706, 6.3531], abs=1e-4)
    assert figures["loss"].panels[0].series[0].points == [(20.0, pytest.approx(0.55)), (40.0, 0.4)]
    panel, = figures["weights"].panels
    assert [line.name for line in panel.series] == [*(f"block {i}" for i in (0, 2, 4, 6, 8, 11)), "equal"]
    assert panel.series[0].points[-1] == (40.0, pytest.approx(0.25))
    mae, mff = figures["layers"].panels[0].series
    assert (mae.name, mff.name) == ("MAE", "MFF_MAE")
    assert mff.points == [(0.06, 22.0), (1.06, pytest.approx(34.1))]     # 21 and 23, 33 and 35.2
    assert mff.errors == [pytest.approx(2 ** 0.5), pytest.approx(1.1 * 2 ** 0.5)]
    # One, two and six levels: the three that the table is of.
    assert figures["levels"].panels[0].ticks == ["1", "2", "6"]


def test_results_are_json_with_a_record_a_line(results):
    text = study.as_text(results)
    assert json.loads(text) == results
    assert sum(line.startswith('  {"method": ') for line in text.splitlines()) == len(results["records"])


# ---------------------------------------------------------------- the plan


def test_mae_and_mff_come_first_seed_by_seed_in_pairs():
    units = study.plan(study.PRESETS["cpu"], list(study.METHODS), [0, 1, 2])
    arms = list(dict.fromkeys((unit.seed, unit.method) for unit in units))
    assert arms[:6] == [(seed, method) for seed in (0, 1, 2) for method in ("MAE", "MFF_MAE")]
    assert {method for _, method in arms[-9:]} == set(study.ABLATION)
    assert units[:2] == [study.Unit("MAE", 0, "pretrain"), study.Unit("MFF_MAE", 0, "pretrain")]
    assert len(units) == len(set(units))


def test_with_minutes_a_method_and_seed_is_measured_before_the_next_is_begun():
    preset = study.PRESETS["gpu"]
    units = study.plan(preset, ["MAE", "MFF_MAE", "MFF_2"], [0, 1])
    assert study.in_chains(units) == [
        study.Unit(method, seed, stage)
        for methods in (["MAE", "MFF_MAE"], ["MFF_2"]) for seed in (0, 1) for method in methods
        for stage in ("pretrain", "layers", "knn", "linear", "finetune") if stage in preset["ablation"]
        or method != "MFF_2"]


def test_an_encoder_that_is_gone_is_pretrained_again_and_measured_again(tmp_path):
    cfg, units = parse(study.Config, []), study.plan(study.PRESETS["minutes"], ["MAE", "MFF_MAE"], [0])
    mae, mff = ([unit for unit in units if unit.method == method] for method in ("MAE", "MFF_MAE"))

    def left(done):
        return study.what_is_left(cfg, study.in_chains(units), tmp_path, set(done), lambda *unit: False)
    assert left([]) == mae + mff
    assert left(mae) == mff
    assert left(mae + mff[:2]) == mff                                   # and not its last stage alone
    origin = study.folder_of(tmp_path, mff[0])
    origin.mkdir(parents=True)
    (origin / "encoder.pt").touch()
    assert left(mae + mff[:2]) == mff[2:]


def test_seconds_are_known_of_units_all_of_whose_stages_have_been_run():
    units = [study.Unit("MAE", 0, "pretrain"), study.Unit("MAE", 0, "knn"), study.Unit("random", 0, "knn")]
    assert study.seconds_of(units, {}) is None and study.seconds_of(units, dict(knn=2.0)) is None
    assert study.seconds_of(units, dict(pretrain=5.0, knn=2.0)) == 9.0
    assert study.seconds_of([study.Unit("random", 0, "pretrain")], {}) == 0


@pytest.mark.parametrize("preset", study.PRESETS)
def test_every_flag_of_every_preset_is_one_of_its_stage(preset):
    cfg = parse(study.Config, ["--preset", preset])
    units = study.plan(study.PRESETS[preset], list(study.METHODS), [0])
    assert {unit.method for unit in units} == set(study.METHODS)
    for unit in units:
        words = study.command_of(cfg, unit, ROOT / "runs")
        settings = parse(study.MODULES[unit.stage].Config, words)
        assert settings.seed == 0 and (unit.stage == "layers" or settings.resume == "auto")


OWN = dict(pretrain={"out_indices", "detach_shallow", "low_pass_radius", "crop"})


@pytest.mark.parametrize("preset, stage", [(preset, stage) for preset, flags in study.PRESETS.items()
                                           for stage in flags if stage in study.MODULES])
def test_all_methods_share_all_settings_but_those_that_make_them(preset, stage):
    cfg = parse(study.Config, ["--preset", preset])
    settings = [vars(parse(study.MODULES[stage].Config,
                           study.command_of(cfg, study.Unit(method, 0, stage), ROOT)))
                for method in study.METHODS]
    differ = {name for name in settings[0] if len({str(each[name]) for each in settings}) > 1}
    assert differ - {"output_dir", "checkpoint"} == OWN.get(stage, set())


def test_all_methods_start_from_the_same_encoder():
    def encoder(method):
        words = study.command_of(parse(study.Config, []), study.Unit(method, 3, "pretrain"), ROOT)
        cfg = parse(study.train_pretrain.Config, words)
        torch.manual_seed(cfg.seed)
        return study.train_pretrain.build_model(cfg, torch.device("cpu")).encoder.state_dict()
    assert all(same_bits(encoder("MAE"), encoder(method)) for method in study.METHODS)


def test_curves_keep_at_most_a_hundred_points_with_both_ends():
    assert study.thinned(list(range(40))) == list(range(40))
    found = study.thinned(list(range(1001)))
    assert len(found) == 100 and (found[0], found[-1]) == (0, 1000) and found == sorted(set(found))


def test_data_is_named_by_the_last_part_of_its_path():
    assert study.name_of("shapes") == "shapes" and study.name_of("cifar10:DIR/c10/") == "c10"
    assert study.name_of("runs/data/imagenette/") == "imagenette"
    with pytest.raises(UserError, match="the name shapes is that of the embedded images"):
        study.name_of("runs/data/shapes")


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("flags, complaint", [
    ("--seeds 0,x", "--seeds 0,x: expected different whole numbers"), ("--seeds 1,1", "expected different"),
    ("--methods MAE,MFF", "--methods 'MFF' is none of MAE, MFF_MAE"), ("--jobs 0", "--jobs 0: expected more"),
    ("--data shapes:500", "--data shapes:500: expected shapes alone"),
    ("--data nowhere", "nowhere does not exist"),
    ("--minutes -1", "--minutes -1.0: expected 0 or more"), ("--report", "holds no finished unit yet"),
])
def test_bad_input_is_one_line(tmp_path, flags, complaint):
    folders = ["--output-dir", str(tmp_path), "--study-dir", str(tmp_path / "s"), "--device", "cpu"]
    with pytest.raises(UserError, match=complaint) as caught:
        study.main(parse(study.Config, [*flags.split(), *folders]))
    assert "\n" not in str(caught.value) and not (tmp_path / "s").exists()


def test_results_of_another_study_are_refused(tmp_path):
    def refused(preset="minutes", data="shapes", flags=None, text=None):
        unit = study.Unit("MAE", 0, "layers")
        flags = flags or study.flags_of(study.PRESETS["minutes"], unit)
        records = [dict(unit._asdict(), flags=flags, seconds=1.0, metrics=dict(val_images=9, rows=[]))]
        path = tmp_path / "study.json"
        settings = dict(shapes="shapes:10000" if preset == "minutes" else "shapes:7")
        found = dict(preset=preset, data=data, images="shapes:10000", settings=settings, records=records,
                     parts=[], environments=[])
        path.write_text(text or json.dumps(found))
        try:
            study.read_results(path, "shapes", "shapes:10000", parse(study.Config, []))
        except UserError as error:
            return str(error)
    assert refused() is None
    assert "--preset cpu on shapes:7: expected --preset minutes on shapes:10000" in refused(preset="cpu")
    assert "holds --preset minutes on flowers" in refused(data="flowers")
    assert "MAE, seed 0, layers with other settings (--pool token)" in refused(flags="--pool token")
    assert "is not the results of a study" in refused(text="{}")
    assert "is not the results of a study" in refused(text='{"preset"')


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("study_*.json")), ids=lambda path: path.stem)
def test_the_committed_results_go_on_with_todays_flags(path):
    found = json.loads(path.read_text())
    cfg = parse(study.Config, ["--preset", found["preset"], "--data", found["data"]])
    assert study.read_results(path, found["data"], found["images"], cfg) == found
    assert found["settings"] == json.loads(json.dumps(study.preset_of(found["preset"], found["data"])))


def test_a_study_folder_of_another_preset_is_refused(tmp_path):
    with study.held(tmp_path, dict(preset="cpu", data="shapes")):
        pass
    with pytest.raises(UserError, match="holds another study: its preset cpu and not minutes; name another"):
        with study.held(tmp_path, dict(preset="minutes", data="shapes")):
            pass


def test_two_studies_do_not_work_in_one_folder(tmp_path):
    kind = dict(preset="cpu", data="shapes")
    with study.held(tmp_path, kind):
        with pytest.raises(UserError, match="another process works in"):
            with study.held(tmp_path, kind, patience=0.1):
                pass
    with study.held(tmp_path, kind, patience=0.1):
        pass


# ---------------------------------------------------------------- real stages

BATCH = "--global-batch 16 --batch-size 16"
TINY = dict(shapes="shapes:100", ablation=("pretrain",),
            pretrain="--model vit_test --img-size 16 --decoder-embed-dim 16 --decoder-depth 1 "
                     f"--decoder-num-heads 2 {BATCH} --steps 80 --lr 1e-3",
            layers="--layers 11 --images 20 --pool avg",
            finetune=f"{study.TUNE} {BATCH} --steps 2 --lr 1e-3")
# The study's clock is an hour ahead as soon as there is a file "late" in its folder.
SCRIPT = f"""
import os, time, types
from tools import study
from mff_min.config import parse
from mff_run.process import run
study.PRESETS["minutes"] = {TINY}
cfg = parse(study.Config)
study.time = types.SimpleNamespace(
    sleep=time.sleep, monotonic=lambda: time.monotonic() + 3600 * os.path.exists(cfg.study_dir + "/late"))
run(study.main, cfg)
"""


def flags_in(folder, cache, *flags):
    """The flags of a study of seed 0 all of whose files are in folder, but for the cache."""
    return [*flags, "--seeds", "0", "--device", "cpu", "--study-dir", f"{folder}/s", "--output-dir",
            f"{folder}/r", "--figures", f"{folder}/f", "--cache-dir", str(cache)]


def begin(folder, cache, *flags):
    """A process that carries out a tiny study in folder."""
    command = [sys.executable, "-c", SCRIPT, *flags_in(folder, cache, *flags)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process, code=0):
    said, _ = process.communicate(timeout=600)
    assert process.returncode == code, said
    return said


def results_in(folder):
    return json.loads((folder / "r" / "study_shapes_cpu_minutes.json").read_text())


def without_times(results):
    """What two equal studies must share."""
    return {study.unit_of(each): dict(each, seconds=0) for each in results["records"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """The folder of a tiny study of three methods that was never stopped, and what it said."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, finish(begin(folder, cache, "--methods", "MAE,MFF_MAE,random"))


def test_a_study_keeps_what_its_stages_measured(whole):
    folder, said = whole
    assert "9 units, 9 of them left" in said and "for them, 2 at a time" in said and "| MAE | 1 |" in said
    found = results_in(folder)
    assert len(found["records"]) == 9 and found["environments"][0]["device"] == "cpu"
    assert found["parts"] == [dict(units=9, jobs=2, seconds=found["parts"][0]["seconds"])]
    trained = {each["method"]: each for each in found["records"] if each["stage"] == "pretrain"}
    assert trained["MAE"]["loss"][-1][0] == 80 and trained["MAE"]["seconds"] > 0
    assert "fusion" not in trained["MAE"]
    step, *weights = trained["MFF_MAE"]["fusion"][-1]
    assert step == 80 and len(weights) == 6 and sum(weights) == pytest.approx(1, abs=1e-4)
    kinds = {row["kind"] for each in found["records"] for row in each["metrics"].get("rows", ())}
    assert kinds == {"trained", "pixels", "chance"}
    assert (folder / "f" / "study_shapes_cpu_minutes_loss.png").exists()
    assert not (folder / "s" / "trial").exists()

    # The random encoder is what pre-training starts from, and so are the probe's own random weights.
    rows = json.loads((folder / "s" / "random" / "seed0" / "layers" / "metrics.json").read_text())["rows"]
    trained, random = ([row["acc1"] for row in rows if row["kind"] == kind] for kind in ("trained", "random"))
    assert trained == random != []


@pytest.mark.parametrize("way, code, words", [
    ("SIGKILL", -9, ""),
    ("SIGTERM", 143, "stopped: signal 15: "),
    ("SIGINT", 130, "stopped: signal 2: "),
    ("minutes", 0, "stopped after 30 minutes: "),
])
def test_a_study_that_is_stopped_goes_on_to_the_same_numbers_and_repeats_nothing(tmp_path, cache, whole, way,
                                                                                 code, words):
    flags = ["--methods", "MAE", "--minutes", "30"]
    unit, process = tmp_path / "s" / "MAE" / "seed0" / "pretrain", begin(tmp_path, cache, *flags)
    until = time.monotonic() + 300
    while not ((log := unit / "log.jsonl").exists() and '"step": 20' in log.read_text()):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    if way == "minutes":
        (tmp_path / "s" / "late").touch()
    elif way == "SIGINT":                                               # as a terminal sends it
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(process.pid, getattr(signal, way))
    said = finish(process, code)
    assert "Traceback" not in said
    assert not words or f"{words}0 units finished in this part, 3 left; the same command goes on\n" in said

    (tmp_path / "s" / "late").unlink(missing_ok=True)
    said = finish(begin(tmp_path, cache, *flags))
    assert "3 units, 3 of them left" in said and "measuring" not in said
    assert re.search(r"^steps [2-7]\d to 80 of 16 images", (unit / "output.txt").read_text(), re.M)
    found, units = results_in(tmp_path), without_times(results_in(whole[0]))
    assert without_times(found) == {unit: units[unit] for unit in units if unit.method == "MAE"}
    assert {each["seconds"] is None for each in found["records"] if each["stage"] == "pretrain"} == {True}
    assert [part["units"] for part in found["parts"]] == [0, 3][way == "SIGKILL":]


def test_where_the_results_are_alone_nothing_is_left_to_do(tmp_path, cache, whole, monkeypatch, capsys):
    shutil.copytree(whole[0] / "r", tmp_path / "r")
    monkeypatch.setitem(study.PRESETS, "minutes", TINY)
    study.main(parse(study.Config, flags_in(tmp_path, cache, "--methods", "MAE,random")))
    assert "6 units, 0 of them left" in capsys.readouterr().out
    assert results_in(tmp_path) == results_in(whole[0])
    assert not list((tmp_path / "s").rglob("*.pt"))


@pytest.fixture
def clock(monkeypatch):
    """A study on a GPU whose units do nothing for as many seconds as clock.costs says; clock.ran are they."""
    clock = types.SimpleNamespace(now=0.0, costs={}, ran=[])

    class Process:
        exitcode = sentinel = 0

        def __init__(self, cfg, unit, folder):
            clock.ran.append(unit)
            self.ends = clock.now + clock.costs.get(unit, clock.costs[unit.stage])
            place = study.folder_of(folder, unit)
            place.mkdir(parents=True)
            (place / "encoder.pt").touch()

        def is_alive(self):
            return clock.now < self.ends

        def terminate(self):
            self.ends = clock.now

        def join(self, timeout=None):
            pass

    def wait(sentinels, timeout):
        clock.now += 1.0

    def read_record(unit, flags, folder, seconds):
        if folder.exists():
            metrics = dict(rows=[], acc1=50.0, val_images=9)
            return (dict(unit._asdict(), flags=flags, seconds=seconds, metrics=metrics),
                    dict(device="an H100", cpus=16, torch="2.11.0"))

    monkeypatch.setattr(study, "start", Process)
    monkeypatch.setattr(study, "read_record", read_record)
    monkeypatch.setattr(study, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(study.multiprocessing.connection, "wait", wait)
    return clock


def visit(folder, *flags):
    """A part of a study on a GPU, whose run folders are gone afterwards: the results alone stay."""
    study.main(parse(study.Config, ["--preset", "gpu", "--device", "cuda", "--methods", "MAE,MFF_MAE",
                                    "--seeds", "0,1", "--study-dir", f"{folder}/s", "--output-dir",
                                    f"{folder}/r", "--figures", f"{folder}/f", *flags]))
    shutil.rmtree(folder / "s")


def kept_in(folder):
    found = json.loads((folder / "r" / "study_shapes_gpu.json").read_text())
    return {study.unit_of(each) for each in found["records"]}


def test_a_visit_takes_whole_chains_and_begins_none_that_does_not_fit(tmp_path, clock, capsys):
    clock.costs = dict(pretrain=120.0, layers=10.0, knn=10.0, linear=10.0, finetune=50.0)
    chains = [(method, seed) for seed in (0, 1) for method in ("MAE", "MFF_MAE")]
    visit(tmp_path, "--minutes", "9")
    said = capsys.readouterr().out
    assert "no estimate: no unit of this study has finished pretrain, layers, knn, linear, finetune" in said
    assert list(map(study.chain_of, clock.ran)) == [chain for chain in chains[:2] for _ in range(5)]
    assert ("stopped after 0:06:40 of 9 minutes, as MAE, seed 1, would take about 0:03:20: 10 units finished "
            "in this part, 10 left; the same command goes on\n") in said
    assert set(map(study.chain_of, kept_in(tmp_path))) == set(chains[:2])

    visit(tmp_path, "--minutes", "5")                   # the results alone came along
    said = capsys.readouterr().out
    assert "20 units, 10 of them left" in said and "about 0:06:40 for them, 1 at a time" in said
    assert list(map(study.chain_of, clock.ran[10:])) == [chains[2]] * 5
    visit(tmp_path, "--minutes", "1")                   # the first is begun in any case
    assert "stopped after 1 minutes: " in capsys.readouterr().out and clock.ran[15:] == [
        study.Unit("MFF_MAE", 1, "pretrain")]


def test_a_chain_that_was_cut_is_begun_anew_where_its_encoder_is_gone(tmp_path, clock, capsys):
    clock.costs = dict(pretrain=120.0, layers=10.0, knn=10.0, linear=10.0, finetune=50.0)
    clock.costs[study.Unit("MFF_MAE", 0, "layers")] = 300.0             # and then the time is over
    visit(tmp_path, "--minutes", "8")
    assert "stopped after 8 minutes: 6 units finished in this part, 14 left" in capsys.readouterr().out
    kept = kept_in(tmp_path)
    assert study.Unit("MFF_MAE", 0, "pretrain") in kept and len(kept) == 6
    clock.ran, clock.costs = [], dict(clock.costs, pretrain=1000.0)
    visit(tmp_path, "--minutes", "8")
    assert clock.ran == [study.Unit("MFF_MAE", 0, "pretrain")]
    # What was known of the encoder that is gone is not mixed with what is known of this one.
    assert kept_in(tmp_path) == {unit for unit in kept if unit.method == "MAE"}


# An interpreter for tools/gpu/study.sh whose tools.study has a tiny preset.
PYTHON = f"""#!{sys.executable}
import os, runpy, sys
if not sys.argv[2].startswith("tools."):
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
sys.path.insert(0, {str(ROOT)!r})
sys.argv = sys.argv[2:]
if sys.argv[0] == "tools.study":
    from tools import study
    from mff_min.config import parse
    from mff_run.process import run
    study.PRESETS["minutes"] = {TINY}
    run(study.main, parse(study.Config))
else:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def visit_a_machine(folder, python, *flags, code=0):
    """What tools/gpu/study.sh says in a folder without runs, where this text is the interpreter."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    (folder / "python").write_text(python)
    (folder / "python").chmod(0o755)
    command = ["bash", ROOT / "tools" / "gpu" / "study.sh", "images.zip", "out", *flags]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHON": f"{folder}/python"}, timeout=600,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == code, done.stdout
    return done.stdout


def test_a_visit_to_a_gpu_machine_leaves_results_that_the_next_goes_on_from(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for i in range(80):
            file = io.BytesIO()
            Image.new("RGB", (24, 20), (2 * i, 99, 0)).save(file, "JPEG")
            place = f"{'val' if i % 4 == 0 else 'train'}/{'ab'[i // 4 % 2]}/{i}.JPEG"
            archive.writestr(place, file.getvalue())
    flags = "300 --preset minutes --device cpu --seeds 0 --jobs 1".split()
    said = visit_a_machine(tmp_path, PYTHON, *flags, "--methods", "MAE")
    assert "3 units, 3 of them left" in said and "no estimate: " in said and "| MAE | 1 |" in said
    home = tmp_path / "out"
    assert {path.name for path in home.iterdir()} == {"study_imagenette_cpu_minutes.json", "study.txt",
                                                      "units.txt"}
    assert "| MAE | 1 |" in (home / "study.txt").read_text()
    assert (home / "units.txt").read_text().count("==> ") == 3
    said = visit_a_machine(tmp_path, PYTHON, *flags)                    # MAE and MFF_MAE
    assert "6 units, 3 of them left" in said and re.search(r"about [\d:]+ for them, 1 at a time", said)
    kept = json.loads((home / "study_imagenette_cpu_minutes.json").read_text())["records"]
    assert [study.unit_of(each) for each in kept] == [
        study.Unit(method, 0, stage) for method in ("MAE", "MFF_MAE")
        for stage in ("pretrain", "layers", "finetune")]


def test_a_visit_begins_with_the_results_that_came_along_and_ends_as_the_study_does(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "study_imagenette_gpu.json").write_text("kept")
    python = '#!/bin/sh\n[ "$2" != tools.study ] || { shift; echo "$*"; exit 3; }\n'
    assert "of 20 s are gone before the study begins" in visit_a_machine(tmp_path, python, "20", code=2)
    said = visit_a_machine(tmp_path, python, "590", "--seeds", "1", code=3)
    words = next(line for line in said.splitlines() if line.startswith("tools.study ")).split()
    cfg = parse(study.Config, words[1:])
    assert (cfg.preset, cfg.methods, cfg.seeds, cfg.device) == ("gpu", "MAE,MFF_MAE", "1", "cuda")
    assert 8 < cfg.minutes < 9.5 and study.name_of(cfg.data) == "imagenette"
    assert (tmp_path / "out" / "study_imagenette_gpu.json").read_text() == "kept"
    assert " ".join(words) in (tmp_path / "out" / "study.txt").read_text()


def test_the_command_in_a_figure_draws_it(tmp_path, whole, monkeypatch):
    drawn = whole[0] / "f" / "study_shapes_cpu_minutes_loss"
    words = shlex.split(json.loads(drawn.with_suffix(".json").read_text())["command"])
    monkeypatch.setitem(study.PRESETS, "minutes", TINY)
    assert words[:3] == ["python", "-m", "tools.study"] and words[-2] == "--figures"
    study.main(parse(study.Config, [*words[3:-1], str(tmp_path)]))
    numbers = [json.loads((folder / f"{drawn.name}.json").read_text()) for folder in (tmp_path, drawn.parent)]
    assert numbers[0]["panels"] == numbers[1]["panels"] and (tmp_path / f"{drawn.name}.svg").exists()


def test_a_study_asks_for_matplotlib_before_its_units_and_only_to_draw(tmp_path, whole, capsys, monkeypatch):
    monkeypatch.setitem(study.PRESETS, "minutes", TINY)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(study, "run_units", lambda *_: pytest.fail("a unit was run"))
    flags = ["--device", "cpu", "--output-dir", f"{whole[0]}/r"]
    for more in ([], ["--report"]):
        with pytest.raises(UserError, match=r"pip install -e '\.\[figures\]'"):
            study.main(parse(study.Config, [*flags, *more, "--figures", str(tmp_path / "f")]))
    assert not (tmp_path / "f").exists()
    study.main(parse(study.Config, [*flags, "--report"]))
    assert "| MAE | 1 |" in capsys.readouterr().out


def test_other_images_of_the_same_name_are_another_study(tmp_path, cache):
    for place, colour in (("a", "red"), ("b", "blue")):
        for split in ("train", "val"):
            for label in ("x", "y"):
                folder = tmp_path / place / "data" / split / label
                folder.mkdir(parents=True)
                Image.new("RGB", (16, 16), colour).save(folder / f"{colour}.png")
    cfg = parse(study.Config, ["--data", str(tmp_path / "a" / "data"), "--cache-dir", str(cache)])
    images = study.images_of(cfg)
    kept = dict(preset="minutes", data="data", images=images, settings=study.PRESETS["minutes"], records=[],
                parts=[], environments=[])
    (tmp_path / "study_data_cpu_minutes.json").write_text(json.dumps(kept))

    def refused(place):
        flags = ["--data", str(tmp_path / place / "data"), "--output-dir", str(tmp_path), "--device", "cpu",
                 "--study-dir", str(tmp_path / "s"), "--figures", str(tmp_path / "f")]
        with pytest.raises(UserError) as caught:
            study.main(parse(study.Config, flags))
        return str(caught.value)
    assert "is of other images that are called data too" in refused("b")
    (tmp_path / "study_data_cpu_minutes.json").unlink()
    with study.held(tmp_path / "s", dict(preset="minutes", data="data", device="cpu", images=images)):
        pass
    assert f"holds another study: its images {images} and not " in refused("b")


def test_a_unit_that_fails_ends_the_study_with_its_words_and_code(tmp_path, cache):
    place = tmp_path / "s" / "MAE" / "seed0" / "pretrain"
    place.mkdir(parents=True)
    (place / "last.pt").write_text("nothing")
    last = finish(begin(tmp_path, cache, "--methods", "MAE"), code=2).strip().splitlines()[-1]
    assert last.startswith("error: MAE, seed 0, pretrain ended with code 2") and "no checkpoint in" in last


def test_a_failure_is_told_in_the_words_of_the_last_attempt(tmp_path):
    unit = study.Unit("MAE", 0, "finetune")
    output = study.folder_of(tmp_path, unit) / "output.txt"
    output.parent.mkdir(parents=True)

    def told(text):
        output.write_text(text)
        return str(study.failure(unit, 1, tmp_path)).partition("output.txt): ")[2]
    first = "train_finetune --lr 1\nerror: out of memory\n"
    assert told(first) == "out of memory"
    assert told(f"{first}train_finetune --lr 1\nTraceback\nKeyError: 'a bug'\n") == "KeyError: 'a bug'"
    assert told(f"{first}train_finetune --lr 1\n") == "it said nothing"
    table = "error: other settings:\n  lr  1  2\ngive the same flags again\n"
    assert told(f"train_finetune --lr 1\n{table}") == "other settings:; lr 1 2; give the same flags again"


def test_a_unit_that_misses_a_signal_is_asked_again():
    class Deaf:
        asked = 0

        def is_alive(self):
            return self.asked < 3

        def terminate(self):
            self.asked += 1

        def join(self, timeout):
            assert timeout

    unit = Deaf()
    study.stop({"a": (unit, 0.0, False)})
    assert unit.asked == 3
