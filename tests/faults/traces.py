"""Promise 11: what shows that a folder is a run's, or no longer is, and which files in it are others'."""

import os
import shutil

from faults.folders import begin, fine
from faults.killed import command, differences, furthest, uninterrupted
from faults.suite import STAGES, Fault, Guard, Tally, fork, stage

from mff_run import files, log, resume


def without_checkpoints(run):
    for path in resume.checkpoints_in(run):
        path.unlink()


def on_a_lost_disk(run):
    for path in resume.checkpoints_in(run):
        path.unlink()
        path.symlink_to(f"/nowhere/{path.name}")


def lost_checkpoints(folder, quick):
    """A run whose checkpoints are gone is not begun anew over its records, with or without --resume auto."""
    tally = Tally()
    for name in ("pretrain",) if quick else STAGES:
        whole = uninterrupted(name, folder / f"{name}-whole")
        for lose in (without_checkpoints, on_a_lost_disk):
            run = folder / f"{name}-{lose.__name__}"
            shutil.copytree(whole, run)
            lose(run)
            before = sorted(path.name for path in run.iterdir()), (run / "log.jsonl").read_bytes()
            tally.note(fine(fork(command(name, run)), 2, "name another --output-dir"))
            tally.note(fine(fork(stage(name, run, "--steps", 4)), 2, "already holds a run"))
            after = sorted(path.name for path in run.iterdir()), (run / "log.jsonl").read_bytes()
            tally.note("" if before == after else f"{name}: the folder has changed")
    return tally.outcome()


def lost_folder(folder, quick):
    """A folder that was moved from under a run, or lost its lock, is written by the run that has it now."""
    tally = Tally()
    for name in ("pretrain",) if quick else STAGES:
        for way in ("moved", "unlocked"):
            run = folder / f"{name}-{way}"
            first = begin(name, run, "--workers", 0)
            flags = ["--steps", 4]
            if way == "moved":
                run.rename(folder / f"{name}-elsewhere")
            else:
                (run / files.LOCK).unlink()
                flags = ["--steps", furthest(run) + 50, "--resume", "auto", "--allow-change", "steps"]
            second = fork(stage(name, run, *flags))
            tally.note(fine(second, 0))
            said = first.end(20)                                        # it may have been in a save
            tally.note(fine(said, 3, "error: ") if "No such file" in said.last else
                       fine(said, 3, "is no longer this run's"))
    return tally.outcome()


def files_of_others(folder, quick):
    """What a user or another program has put into a run's folder is neither deleted nor written to."""
    tally = Tally()
    for name in ("pretrain",) if quick else STAGES:
        whole = uninterrupted(name, folder / f"{name}-whole")
        run, notes = folder / name, folder / f"{name}-notes"
        run.mkdir()
        notes.write_text("mine\n")
        kept = {"notes.tmp.1": "mine", "my.pt.tmp.12": "mine", "last.pt.tmp": "mine",
                f"last.pt.tmp.{os.getpid()}": "a living process writes it"}
        for path, text in kept.items():
            (run / path).write_text(text)
        (run / "env.json.tmp.999999999").symlink_to(notes)
        (run / "encoder.pt.tmp.999999999").write_text("of a process that was killed")
        tally.note(fine(fork(command(name, run)), 0))
        same = all((run / path).exists() and (run / path).read_text() == text for path, text in kept.items())
        same = same and (run / "env.json.tmp.999999999").is_symlink()
        tally.note("" if same else f"{name}: one is gone or altered")
        tally.note("" if not (run / "encoder.pt.tmp.999999999").exists() else f"{name}: a leftover stays")
        for path in run.glob("*.tmp*"):
            path.unlink()
        tally.note("; ".join(differences(name, run, whole)))

        with open(run / "log.jsonl", "a") as file:                      # lines that a person added
            file.write('{"note": "looks good"}\n[1]\n{"step": "four"}\n' + "[" * 100_000 + "\n")
        ended = fork(command(name, run, "--steps", 5, "--allow-change", "steps"))
        kept = '"looks good"' in (run / "log.jsonl").read_text()
        tally.note(fine(ended, 0) or "a line is lost" * (not kept))

        (run / files.LOCK).unlink()
        (run / files.LOCK).symlink_to(notes)
        tally.note(fine(fork(command(name, run)), 2, "run.lock is a link"))
        tally.note("" if notes.read_text() == "mine\n" else f"{name}: the target of a link was written")
        (run / files.LOCK).unlink()
        for path in ("run.lock", "log.jsonl", "previous.pt", "last.pt"):
            (run / path).unlink(missing_ok=True)
            os.mkfifo(run / path)
            work = command(name, run, "--steps", 6, "--allow-change", "steps")
            if path != "previous.pt":                                   # else last.pt is sound
                tally.note(fine(fork(work, 20), 2, "no "))
                (run / path).unlink()
    return tally.outcome()


def believe_names():
    """Only a checkpoint that is there shows that a run was."""
    resume.traces_of = resume.checkpoints_in
    resume.check_nothing_lost = lambda folder, save_every: None


def believe_the_path():
    """What has the path of a run's folder is a run's folder."""
    resume.check_lock = log.files.check_lock = lambda folder, world: None


def sweep():
    """All that looks temporary is deleted."""
    def remove(folder, names=""):
        for path in folder.glob("*.tmp.*"):
            path.unlink()
    files.remove_leftovers = remove


FAULTS = [Fault("the checkpoints of a run are gone", 11, lost_checkpoints),
          Fault("the folder of a run is another's", 11, lost_folder),
          Fault("files of others in a run's folder", 11, files_of_others)]
GUARDS = [Guard("traces-of-a-run", "the checkpoints of a run are gone", believe_names),
          Guard("lock-compared-with-its-path", "the folder of a run is another's", believe_the_path),
          Guard("leftovers-by-name", "files of others in a run's folder", sweep)]
