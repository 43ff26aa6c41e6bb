"""Promise 4: where a disk is full or refuses, a run says which file and why, and loses nothing it has."""

import errno
import functools
import json
import os
import resource
import shutil
import subprocess

from faults.killed import chosen, command, gone_on, points_of, uninterrupted, watched
from faults.suite import STAGES, Fault, Guard, Tally, fork, prepared, share_out

from mff_run import files, resume

ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS)


def half_done(name, folder):
    """A run that was killed in its second save: it has one checkpoint, and more log than that."""
    fork(watched(name, folder, at=("replace", "previous.pt")))
    assert (folder / "last.pt").exists() and not (folder / "previous.pt").exists()
    for path in folder.glob("*.tmp.*"):
        path.unlink()                                                   # what is left later is the next run's
    return folder


def failed(ended, folder, reason, checkpoint):
    """What is wrong with how a run ended that met such an error. checkpoint is what it had before."""
    if ended.code not in (2, 3):
        yield f"code {ended.code}: {ended.last}"
    if not ended.last.startswith("error: ") or str(folder) not in ended.last or reason not in ended.last:
        yield f"it says {ended.last}"
    if "Traceback" in ended.said:
        yield "it shows a traceback"
    for path in folder.glob("*.tmp.*"):
        yield f"{path.name} is left"
    # A newer one may have followed: that a run goes on from it, no more than an interval back, is tried next.
    if checkpoint and not resume.checkpoints_in(folder):
        yield "its checkpoint is gone"
    log = folder / "log.jsonl"
    if log.exists() and log.read_bytes()[-1:] not in (b"", b"\n"):
        yield "a line of the log is half written"


def fails_at(name, begun, folder, whole, point, number):
    """A run for which a write, fsync or rename fails once."""
    checkpoint = b""
    if begun:
        shutil.copytree(begun, folder)
        checkpoint = (folder / "last.pt").read_bytes()

    def stop():
        raise OSError(number, os.strerror(number))
    ended = fork(watched(name, folder, at=point[0], when=point[1], stop=stop))
    problems = list(failed(ended, folder, os.strerror(number), checkpoint))
    problem, lost = gone_on(name, folder, whole)
    problems += [problem] if problem else []
    at = f"{name}, {errno.errorcode[number]} at point {point[0]}"
    yield f"{at}: {'; '.join(problems)}" if problems else "", lost
    shutil.rmtree(folder)


def refused_calls(folder, quick):
    """Each file-changing call of a run refused in turn, for one of five reasons."""
    trials = []
    for name in ("pretrain",) if quick else STAGES:
        whole = uninterrupted(name, folder / f"{name}-whole")
        begun = half_done(name, folder / f"{name}-begun")
        shutil.copytree(begun, folder / f"{name}-points")
        seen = points_of(name, folder / f"{name}-points")
        points = [(i, when) for i, when in chosen(seen, 5) if seen[i][0] != "unlink" and when != "after"]
        most = 16 if quick else 60 if name == "pretrain" else 20
        points = points[::len(points) // most + 1] + [(("write", "log.jsonl"), "halfway")]
        trials += [functools.partial(fails_at, name, begun, folder / f"{name}-{i}", whole, point,
                                     ERRORS[i % len(ERRORS)]) for i, point in enumerate(points)]
    tally = Tally()
    share_out(trials, tally)
    return tally.outcome()


def limited(name, begun, folder, whole, limit):
    """A run whose files may not grow over a limit (RLIMIT_FSIZE)."""
    shutil.copytree(begun, folder)
    checkpoint = (folder / "last.pt").read_bytes()
    run = command(name, folder)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        run()
    ended = fork(work)
    problems = list(failed(ended, folder, os.strerror(errno.EFBIG), checkpoint))
    problem, lost = gone_on(name, folder, whole)
    problems += [problem] if problem else []
    yield f"{name} with files of {limit} bytes: {'; '.join(problems)}" if problems else "", lost


def on_small_disk(name, folder, whole):
    """A run on a file system without room for a second checkpoint; no trial where none can be mounted."""
    folder.mkdir()
    size = (whole / "last.pt").stat().st_size
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.7 * size)}", "tmpfs", folder]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        return
    try:
        run = folder / "run"
        ended = fork(command(name, run, "--save-every", 1))
        problems = list(failed(ended, run, os.strerror(errno.ENOSPC), b""))
        if not list(resume.checkpoints_in(run)):
            problems.append("no checkpoint is left")
        if "GB are free" not in ended.said:
            problems.append("nothing was said of it at the start")
        subprocess.run(["mount", "-o", f"remount,size={20 * size}", folder], check=True)
        problem, lost = gone_on(name, run, whole)
        problems += [problem] if problem else []
        yield f"{name} on a small disk: {'; '.join(problems)}" if problems else "", lost
    finally:
        subprocess.run(["umount", folder], check=True)


def full_disks(folder, quick):
    """File-size limits and small file systems: what the system refuses by itself."""
    trials = []
    for name in ("pretrain",) if quick else STAGES:
        whole = uninterrupted(name, folder / f"{name}-whole")
        begun = half_done(name, folder / f"{name}-begun")
        size = (whole / "last.pt").stat().st_size
        limits = [4096 + (size - 4096) * i // 10 for i in range(10)]
        trials += [functools.partial(limited, name, begun, folder / f"{name}-{i}", whole, limit)
                   for i, limit in enumerate(limits[::4] if quick else limits)]
        if name != "probe":                                             # whose head is as small as its config
            trials.append(functools.partial(on_small_disk, name, folder / f"{name}-disk", whole))
    tally = Tally()
    share_out(trials, tally)
    return tally.outcome()


def unwritable(folder, quick):
    """Folders that cannot be written are refused before work starts, also by a user who is not root."""
    tally = Tally()
    whole = uninterrupted("probe", folder / "whole")
    for path in (prepared(), folder, whole):
        path.chmod(0o755)                                               # temporary folders are their owner's
    (folder / "a file").write_text("")
    closed = folder / "closed"
    closed.mkdir(mode=0o555)
    for place, reason in ((whole, errno.EACCES), (closed, errno.EACCES), (closed / "new", errno.EACCES),
                          (folder / "a file", errno.EEXIST), (folder / "a file" / "x", errno.ENOTDIR)):
        run = command("probe", place)

        def work(run=run):
            if not os.geteuid():
                os.setuid(65534)                                        # nobody
            run()
        ended = fork(work)
        fine = ended.code == 2 and str(place) in ended.last and os.strerror(reason) in ended.last
        fine = fine and ended.said.count("error: ") == 1 and "Traceback" not in ended.said
        tally.note("" if fine else f"{place.name}: code {ended.code}, {ended.said}")
    return tally.outcome()


FAULTS = [Fault("a write, fsync or rename that fails", 4, refused_calls),
          Fault("a file-size limit and a full disk", 4, full_disks),
          Fault("a folder that cannot be written", 4, unwritable)]


def append_carelessly():
    def append(path, values):
        with getattr(files, "open", open)(path, "a") as file:
            file.write(json.dumps(values) + "\n")
    files.append_line = append


GUARDS = [Guard("half-lines-stay", "a write, fsync or rename that fails", append_carelessly)]
