"""Promise 9, of the folder of the images: it goes away for a while, in part or for good; a run lies in it."""

import errno
import os
import signal
import subprocess
import time

import numpy as np
from faults.folders import contents, fine
from faults.killed import command, differences
from faults.ranks import differs, ended, two_ranks, whole_run
from faults.signals import saved_step
from faults.suite import Child, Fault, Guard, Tally, fork
from PIL import Image

from mff_data import outages, sources, splits, views
from mff_run import resume, run


def images_in(root):
    """root, a folder of two splits with two classes of six images each."""
    for i in range(24):
        place = root / ("train", "val")[i % 2] / "ab"[i // 2 % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return root


def at_image(number, do):
    """do() before this process, or a loader process of it, reads its image of that number."""
    read, seen = views.Views.read, []

    def late(self, epoch, index):
        seen.append(index)
        if len(seen) == number:
            do()
        return read(self, epoch, index)
    views.Views.read = late


def take_away(place, seconds, empty=False):
    """A folder is elsewhere for so many seconds, or for good; an empty one may stand in its place."""
    away = away_from(place)
    place.rename(away)
    if empty:
        place.mkdir()
    if seconds:
        back = f"rmdir {place}; " * empty + f"mv {away} {place}"
        subprocess.Popen(["sh", "-c", f"sleep {seconds}; {back}"])


def away_from(place):
    """Where take_away puts a folder of images: beside all of them."""
    root = next(path for path in (place, *place.parents) if path.name == "images")
    return root.with_name("away")


def fail_to_open(number, seconds):
    """From now on for so many seconds the system has this error for each image."""
    opened, until = sources.open_image, time.monotonic() + seconds

    def refuse(name, reading):
        if time.monotonic() < until:
            raise OSError(number, os.strerror(number), name)
        return opened(name, reading)
    sources.open_image = refuse


# ---------------------------------------------------------------- outages


def short_outages(folder, quick):
    """The images are gone for some time, or the system has errors: the run ends as if nothing happened."""
    tally, images = Tally(), images_in(folder / "images")
    flags = ["--data", images, "--timeout", 40, "--max-bad", 0]
    whole = folder / "whole"
    assert fork(command("pretrain", whole, *flags)).code == 0
    cases = {"20 ms": lambda: take_away(images, 0.02), "2 s": lambda: take_away(images, 2),
             "one class": lambda: take_away(images / "train" / "a", 1),
             "nothing is mounted": lambda: take_away(images / "train" / "a", 1, empty=True),
             **{errno.errorcode[number]: lambda number=number: fail_to_open(number, 1)
                for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES, errno.ENOTCONN,
                               errno.EMFILE)}}
    for number, (name, begin) in enumerate(cases.items()):
        if quick and name != "one class":
            continue
        run, workers = folder / name, number % 2
        work = command("pretrain", run, *flags, "--workers", workers)

        def act(work=work, begin=begin):
            at_image(20, begin)
            work()
        said = fork(act, 90)
        problem = fine(said, 0) or "; ".join(differences("pretrain", run, whole))
        problem = problem or "an image was replaced" * (run / "bad_samples.jsonl").exists()
        problem = problem or "it is not said" * (name == "2 s" and "waiting for " not in said.said)
        tally.note(f"{name}: {problem}" if problem else "")
    if not quick:
        whole = whole_run("pretrain", folder / "alone", "--data", images)
        with two_ranks("pretrain", folder / "ranks", "--data", images, "--timeout", 40,
                       act=lambda rank: rank or at_image(9, lambda: take_away(images, 2))) as children:
            found, _ = ended(children, 90)
        problems = [fine(one, 0) for one in found] + [differs(folder / "ranks", whole)]
        tally.note("; ".join(filter(None, problems)))
    return tally.outcome()


def long_outages(folder, quick):
    """Images that stay away end a run with their name; a signal ends the wait; no others are shown."""
    tally, images = Tally(), images_in(folder / "images")
    for workers in (0, 1):
        run = folder / f"gone-{workers}"
        work = command("pretrain", run, "--data", images, "--timeout", 8, "--workers", workers)
        said = fork(lambda work=work: at_image(20, lambda: take_away(images / "train", 0)) or work(), 60)
        away_from(images).rename(images / "train")
        tally.note(fine(said, 3, f"{images}/train/", "could not be read for ", "is the disk there?"))
    if not quick:
        run = folder / "signal"
        child = Child(lambda: at_image(20, lambda: take_away(images / "train", 0)) or command(
            "pretrain", run, "--data", images, "--save-every", 50, "--workers", 0)())
        while not away_from(images).exists() and child.process.is_alive():
            time.sleep(0.01)
        time.sleep(1)
        os.kill(child.process.pid, signal.SIGTERM)
        problem = fine(child.end(20), 128 + signal.SIGTERM)
        away_from(images).rename(images / "train")
        tally.note(problem or "a step is lost" * (saved_step(run) < 2))
        with two_ranks("pretrain", folder / "ranks", "--data", images, "--timeout", 8, act=lambda rank: rank
                       or at_image(9, lambda: take_away(images / "train", 0))) as children:
            found, _ = ended(children, 60)
        away_from(images).rename(images / "train")
        codes, said = [one.code for one in found], "".join(one.said for one in found)
        right = codes == [3, 3] and said.count("could not be read") == 1
        tally.note("" if right else f"{codes}: {said[-300:]}")
    run, lost = folder / "single", images / "train" / "a" / "0.png"     # a file alone is replaced
    work = command("pretrain", run, "--data", images, "--max-bad", 0.5)
    said = fork(lambda: at_image(9, lambda: lost.rename(folder / "0.png")) or work(), 60)
    tally.note(fine(said, 0, "1 of 12 images cannot be read") or
               "it is not named" * (str(lost) not in (run / "bad_samples.jsonl").read_text()))
    (folder / "0.png").rename(lost)
    for empty in (False, True):                                         # a part is away at a resumed start
        before = contents(run)
        take_away(images / "train" / "b", 0, empty)
        said = fork(command("pretrain", run, "--data", images, "--steps", 5, "--allow-change", "steps"))
        if empty:
            (images / "train" / "b").rmdir()
        away_from(images).rename(images / "train" / "b")
        tally.note(fine(said, 2, "12 images  6 images (+0 -6)") or "a file was changed" * (
            contents(run) != before))
    with two_ranks("pretrain", folder / "apart", "--data", images,      # one rank sees less
                   act=lambda rank: rank and sees_less()) as children:
        found, _ = ended(children, 60)
    problems = [fine(one, 2) for one in found]
    problems += ["it is not said"] * ("see different images" not in found[0].said + found[1].said)
    tally.note("; ".join(filter(None, problems)))
    return tally.outcome()


def sees_less():
    below = sources.files_below

    def fewer(top):
        found, *more = below(top)
        return [path for path in found if path.startswith("a")], *more
    sources.files_below = fewer


# ---------------------------------------------------------------- a run among the images


def runs_among_images(folder, quick):
    """What a run writes never becomes an image: refused at the first start, or left out of what is listed."""
    tally = Tally()
    flat, linked = images_in(folder / "images") / "train", folder / "linked"
    for split in ("train", "val"):
        (linked / split).mkdir(parents=True)
        (linked / split / "a").symlink_to(folder / "images" / split / "a")
        (linked / split / "b").symlink_to(folder / "images" / split / "b")
    (folder / "way").symlink_to(flat)

    def files():
        return sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".json", ".pt"))
    before = files()
    cases = [(flat, flat), (flat, flat / "runs" / "x"), (flat, flat / "a"), (flat, flat / "a" / "new"),
             (flat, folder / "way" / "x"), (folder / "way", flat / "x"), (linked, flat / "a" / "x"),
             (folder / "images", flat / "x"), (folder / "images", flat.parent / "val" / "b" / "x"),
             (flat, flat / "b" / ".." / "x"), (flat, f"{flat}/x/")]
    for data, output in cases[:2] if quick else cases:
        said = fork(command("pretrain", output, "--data", data))
        tally.note(fine(said, 2, "the output ", "read as images"))
    if not quick:
        with two_ranks("pretrain", flat / "ranks", "--data", flat) as children:
            found, _ = ended(children, 60)
        tally.note("; ".join(filter(None, (fine(one, 2) for one in found))))
    tally.note("" if files() == before else "a file was written")

    # Beside the splits it may lie; in the place of one it is none.
    whole = folder / "whole"
    assert fork(command("pretrain", whole, "--data", folder / "images")).code == 0
    (folder / "single").mkdir()
    (folder / "single" / "train").symlink_to(flat)
    for data, output in ((folder / "images", folder / "images" / "runs" / "x"),
                         (folder / "single", folder / "single" / "val")):
        for steps in (2, 4):
            tally.note(fine(fork(command("pretrain", output, "--data", data, "--steps", steps,
                                         "--allow-change", "steps")), 0))
    # Another run's folder that came to lie there is left out, and a resumed run goes on.
    other = folder / "other"
    tally.note(fine(fork(command("pretrain", other, "--data", flat, "--steps", 2)), 0))
    whole.rename(flat / "moved")
    said = fork(command("pretrain", other, "--data", flat, "--steps", 4, "--allow-change", "steps"))
    tally.note(fine(said, 0, "12 images of 2 classes", "moved (1) left out"))
    return tally.outcome()


FAULTS = [Fault("the images' disk goes away for a while", 9, short_outages),
          Fault("images that stay away", 9, long_outages),
          Fault("a run among its images", 9, runs_among_images)]


def replace_at_once():
    """Each error of the system is an image's."""
    outages.Patience.read = lambda patience, index, work: work()


def believe_each_rank():
    """A rank's images are the others' too, and those of before."""
    run.Run.check_data = lambda run, fingerprint: setattr(run, "data", fingerprint)
    resume.check_same_data = lambda cfg, state, seen: None


def list_everything():
    """All pictures below the data's folder are images."""
    sources.check_output = lambda path, sources: None
    splits.is_of_runs = sources.is_of_runs = lambda path: False


GUARDS = [Guard("outages-waited-for", "the images' disk goes away for a while", replace_at_once),
          Guard("images-agreed-among-ranks", "images that stay away", believe_each_rank),
          Guard("runs-left-out", "a run among its images", list_everything)]
