"""Everything that waits for a GPU, in one command of less than ten minutes: make gpu OUT=FOLDER

    make gpu OUT=FOLDER FLAGS="--parts attention,ops"                   some of the parts, again
    make gpu OUT=FOLDER FLAGS="--batch 128"                             a GPU of 24 GB

It needs the checkout, PyTorch, Triton, NumPy, Pillow and pytest, and no network; timm and Transformers are
peers of the step. A part that fails or takes too long does not stop the others. The result of each part is
written before the next one begins, and what matters most comes first. runs/gpu keeps the compilers' caches.

    gpu_first.txt           what every part printed
    gpu_first.json          the table of parts
    attention_<gpu>.json    each back end of attention: time and error
    profile_<gpu>.json      where the time of a ViT-B step goes
    step_<gpu>.json         that step beside its peers
    ops_<gpu>.json          each op beside eager PyTorch and torch.compile
"""

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "runs" / "gpu"
PYTHON = shlex.split(os.environ.get("PYTHON", "")) or [sys.executable]
SECONDS = 590.0                                                         # of all parts together
GRACE = 5.0                                                             # seconds from SIGTERM to SIGKILL
POLL = 0.05                                                             # seconds between looks at all parts
LEAST = 10.0                                                            # seconds: in less a part only begins


@dataclass
class Part:
    """A command that may take `most` of SECONDS, and leaves `spare` of them to the parts after it."""
    name: str
    command: list[str]
    most: float
    spare: float = 0.0
    process: subprocess.Popen | None = None                             # None: it did not begin
    began: float = 0.0
    ended: float = 0.0
    overran: bool = False


def module(*words):
    """The command of a module of the project."""
    return [*PYTHON, "-m", *words]


def bench(out, *words):
    return module("tools.bench", *words, "--output-dir", str(out))


def tests(*words):
    return module("pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *words)


def profile(out, batch, mode):
    return module("tools.gpu.profile_step", "--batch", str(batch), "--mode", mode, "--output-dir", str(out))


def all_parts(out, batch):
    """The parts in their order. A group runs at once: most of what tests do is done by the host."""
    step = (f"--cases vit_b --stages pretrain --dtypes bfloat16 --batch {batch} --no-waiting --rounds 5 "
            f"--minutes {{minutes}}").split()
    return [[Part("machine", module("tools.gpu.machine"), 30)],
            [Part("kernels", tests("tests/method/test_kernels_gpu.py"), 150),
             Part("stages", tests("tests/run/test_pretrain.py", "tests/method/test_augment.py"), 160)],
            [Part("attention", bench(out, "attention", "--minutes", "0.6"), 60)],
            [Part("eager", profile(out, batch, "eager"), 50)],
            [Part("compiled", profile(out, batch, "compiled"), 100)],
            [Part("blocks", profile(out, batch, "blocks"), 80)],
            [Part("step", bench(out, "step", *step), 240, spare=70)],
            [Part("ops", bench(out, "ops", "--minutes", "{minutes}"), 240)]]


# ---------------------------------------------------------------- one group of parts


def run_group(group, end):
    """Run these parts at once, until their time or all of it is over; returns a row for each, in order."""
    for part in group:
        part.most = min(part.most, end - part.spare - time.monotonic())
    begun = [part for part in group if part.most > LEAST]
    try:
        for part in begun:
            start(part)
        running = begun
        while running := [part for part in running if is_running(part)]:
            time.sleep(POLL)
    finally:                                                            # Ctrl-C: nothing goes on by itself
        for part in begun:
            end_group(part, signal.SIGKILL)
    return [row_of(part) for part in group]


def start(part):
    """Start a part; what it prints goes to a file, since a pipe would end it when nobody reads."""
    minutes = f"{max(part.most - 25, 5) / 60:.2f}"                      # less its start and its last row
    command = [word.replace("{minutes}", minutes) for word in part.command]
    caches = {"TRITON_CACHE_DIR": str(WORK / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor")}
    part.began = time.monotonic()
    with open(WORK / f"{part.name}.txt", "w") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        part.process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                        stdin=subprocess.DEVNULL, start_new_session=True,
                                        env={"PYTHONUNBUFFERED": "1", **os.environ, **caches})


def is_running(part):
    """Whether a part still runs. When its time is over it is asked to end, and GRACE later it is killed."""
    runs, late = part.process.poll() is None, time.monotonic() - part.began - part.most
    if runs and late > 0 and not part.overran:
        part.overran = True
        end_group(part, signal.SIGTERM)
    if runs and late < GRACE:
        return True
    end_group(part, signal.SIGKILL)                                     # itself, or workers that outlived it
    part.process.wait()
    part.ended = time.monotonic()
    return False


def end_group(part, number):
    """Send a signal to a part and to all that it started."""
    if part.process:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(part.process.pid, number)


def row_of(part):
    """What the table says of a part."""
    if not part.process:
        return dict(part=part.name, state="not run", why=f"{max(part.most, 0):.0f} s were left", seconds=0)
    code = part.process.returncode
    row = dict(part=part.name, state="failed" if code else "passed", code=code,
               seconds=round(part.ended - part.began, 1))
    if part.overran:
        row |= dict(state="failed", why=f"it was ended after {part.most:.0f} s")
    elif code:
        lines = (WORK / f"{part.name}.txt").read_text(errors="replace").strip().splitlines()
        row["why"] = lines[-1][:200]
    return row


# ---------------------------------------------------------------- all of them


def run_parts(groups, out, seconds):
    """Run groups of parts, and write their output and the table into the folder out after each group.

    With more seconds than SECONDS every part may take longer in proportion: for a slow machine.
    """
    out.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    began, rows, log = time.monotonic(), [], out / "gpu_first.txt"
    log.write_text("")
    for part in sum(groups, []):
        part.most *= max(seconds / SECONDS, 1.0)
    for group in groups:
        print(f"at {time.monotonic() - began:4.0f} s: {', '.join(part.name for part in group)}", flush=True)
        new = run_group(group, began + seconds)
        for row in new:
            text = "it did not begin\n"
            if row["state"] != "not run":
                text = (WORK / f"{row['part']}.txt").read_text(errors="replace")
            with open(log, "a") as file:
                file.write(f"==== {row['part']}: {row['state']}\n{text}\n")
            print("\n".join(text.splitlines()[-25:]), flush=True)       # its end: what it found
        rows += new
        found = dict(seconds=round(time.monotonic() - began), parts=rows)
        unfinished = out / "gpu_first.json.tmp"                         # whole, however this process ends
        unfinished.write_text(json.dumps(found, indent=1))
        os.replace(unfinished, out / "gpu_first.json")
    return rows


def table(rows):
    """The lines of the table of parts."""
    for row in rows:
        yield f"{row['part']:10} {row['state']:8} {row['seconds']:6.1f} s  {row.get('why', '')}".rstrip()


def chosen(groups, names):
    """The parts of these names alone. Raises SystemExit for a name that no part has."""
    known = [part.name for group in groups for part in group]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"error: --parts {unknown[0]}: expected some of {','.join(known)}")
    groups = [[part for part in group if part.name in names] for group in groups]
    return [group for group in groups if group]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", default="results", type=Path, help="folder of the results")
    parser.add_argument("--parts", help="some of them, separated by commas; not given: all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all parts together")
    parser.add_argument("--batch", type=int, default=512, help="images of the ViT-B step, for 80 GB")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    groups = all_parts(out, args.batch)
    if args.parts:
        groups = chosen(groups, args.parts.split(","))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    rows = run_parts(groups, out, args.seconds)
    print(f"\n{chr(10).join(table(rows))}\n\nresults: {out}", flush=True)
    return int(any(row["state"] != "passed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
