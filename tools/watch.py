"""The page of tools.report, written again every minute while a run goes on. The browser loads it again.

    python -m tools.watch runs/mff                                  runs/mff/report.html
    python -m tools.watch runs/mae runs/mff --every 20              both side by side: runs/report.html

It ends when no process has any of the runs' folders, with a last page.
"""

import time
from dataclasses import dataclass

from mff_min.config import check_ranges, knob, parse
from mff_run.process import run
from tools import report


@dataclass(frozen=True)
class Config(report.Config):
    every: float = knob(60.0, "seconds between two pages", least=1, most=86_400)


def main(cfg):
    """Write the page until no run goes on; returns its path."""
    check_ranges(cfg)
    said = set()

    def say(text):
        if text not in said:                                            # of an earlier page
            print(text, flush=True)
        said.add(text)
    while True:
        path, shown = report.write_report(cfg, cfg.every, say)
        if not any(each.alive for each in shown):
            say(f"{path}: no run goes on, so this page is the last")
            return path
        say(f"{path}: open it in a browser; it is written again every {cfg.every:g} seconds")
        time.sleep(cfg.every)


if __name__ == "__main__":
    run(main, parse(Config))
