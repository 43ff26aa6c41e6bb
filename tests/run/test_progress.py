"""The progress line, on a terminal and in a file, and what it counts as time."""

import torch

from mff_min.optim import Schedule
from mff_run.progress import Meter, Progress, duration
from mff_run.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))


def test_progress_prints_lines_into_a_file_and_rewrites_one_on_a_terminal(capsys, monkeypatch):
    def show():
        progress = Progress(200, 100, ALONE)
        progress.started -= 50
        progress.show(150, "step 3")
        progress.say("a word")
        progress.show(200, "step 4")
        return capsys.readouterr().out

    plain = show()
    assert plain.splitlines() == [" 75.0 %  step 3  0:00:50 gone, 0:00:50 left", "a word",
                                  "100.0 %  step 4  0:00:50 gone, 0:00:00 left"]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    lines = plain.splitlines()
    assert show() == "".join(f"\r\033[K{line}" if "%" in line else f"\n{line}\n" for line in lines)


def test_a_slow_step_repeats_the_line_so_that_it_is_not_taken_for_dead(capsys):
    progress = Progress(100, 0, ALONE, every=0.0)
    progress.show(10, "step 1")
    progress.tick(15)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16] for line in lines] == [" 10.0 %  step 1 ", " 15.0 %  step 1 "]


def test_durations_read_as_a_clock():
    assert [duration(s) for s in (0, 59.9, 3661)] == ["0:00:00", "0:00:59", "1:01:01"]
    assert [duration(s) for s in (86_400, 200_000)] == ["1 day 0:00:00", "2 days 7:33:20"]


def test_an_evaluation_counts_neither_as_training_nor_as_waiting(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    schedule = Schedule(1000, 64, images_at_once=64, stop=10, epochs=1, warmup_epochs=0, lr=1.0)
    meter = Meter(schedule, 0, ALONE)
    now[0] += 4
    with meter.paused():
        now[0] += 1000
    assert meter.read(1, 0.0, 0.0) == dict(img_per_s=16, data_wait=0)
