"""Files that outlive a fault: written whole or not at all, sealed, found again, kept from other runs.

A file is written under a temporary name, flushed to the disk and renamed, so that a reader never meets half
of it, whatever is killed when. A file of tensors is the zip archive that torch.save writes, with the SHA-256
of its other bytes as its comment: PyTorch reads it as ever, and here an altered bit is noticed.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
import tempfile
import time
from pathlib import Path

import torch

from mff_min.errors import Fault, UserError, listed, printable
from mff_run.torchfile import WAY_ON, StandIn, look_through, refuse, shown, stand_ins

SEAL = b"sha256:"                                                       # then 64 digits: the zip's comment
LENGTH = (len(SEAL) + 64).to_bytes(2, "little")                         # which stands before it

# What a run writes, or the temporary file that write_atomically has for it.
OF_A_RUN = (r"(?:last|encoder|classifier|classifier_ema|segmenter)\.pt|log\.jsonl"
            r"|(?:config|env|metrics|nonfinite-step-\d+)\.json"
            r"|(?:reconstruction|features|segmentation)[-\d]*\.png")

NO_PLAIN_FILE = ("{} is a link, or no plain file: nothing is written to it; expected the run's own file, or "
                 "none: remove it, and --resume auto goes on")

# ---------------------------------------------------------------- writing


def write_atomically(path, write, previous=None, sweep=True):
    """Let write(file) fill a new file, which takes the place of path when it is whole and on the disk.

    What stood there takes the name previous, if that is given. sweep=False is for many files in a new folder:
    no killed process has left anything there, and it need not be listed for each. An OSError names the path.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp.{os.getpid()}")
    if sweep:
        remove_leftovers(path.parent, re.escape(path.name))
    try:
        with open(temporary, "wb") as file:
            take(file)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # Nothing that is there moves before the new file is on the disk.
        if previous and path.exists():
            os.replace(path, path.with_name(previous))
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno:
            error.filename = str(path)                                  # writing and fsync name none
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder):
    """Wait until the names in a folder are on the disk too: fsync of a file says nothing of its name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:                                 # a file system that cannot
            raise
    finally:
        os.close(handle)


def make_folder(flag, path):
    """Make the folder that a flag names, where there is none. UserError where no file can be put into it.

    A file is made and removed again: permissions alone do not tell whether a folder can be written.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}") from None


def write_json(path, value):
    """Write plain values as JSON, atomically."""
    write_atomically(path, lambda file: file.write(json.dumps(value, indent=1).encode() + b"\n"))


def append_line(path, values):
    """Append plain values to a file of JSON lines, the whole line or nothing of it.

    Raises Fault where another process has put a link or a pipe in the place of the file.
    """
    line = json.dumps(values).encode() + b"\n"
    flags = os.O_NOFOLLOW | os.O_NONBLOCK                               # a pipe would be waited for
    try:
        handle = open(path, "ab", buffering=0, opener=lambda name, own: os.open(name, own | flags, 0o666))
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise Fault(NO_PLAIN_FILE.format(path)) from None
        raise
    with handle as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise Fault(NO_PLAIN_FILE.format(path))
        end = file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[file.write(line):]
        except OSError as error:
            file.truncate(end)
            error.filename = str(path)
            raise


class Summed:
    """A file to write to, with the SHA-256 of what was written, and the error, which PyTorch hides."""

    def __init__(self, file):
        self.file, self.sum, self.error = file, hashlib.sha256(), None

    def write(self, data):
        self.sum.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self.file.flush()


def write_tensors(path, content, previous=None):
    """Write content, tensors and plain values nested in dicts, as PyTorch does, atomically and sealed."""
    def write(file):
        summed = Summed(file)
        try:
            torch.save(content, summed)
        except RuntimeError:
            if summed.error:
                raise summed.error from None
            raise
        file.seek(-2, os.SEEK_CUR)                                      # the length of the comment, 0 so far
        file.write(LENGTH + SEAL + summed.sum.hexdigest().encode())
    write_atomically(path, write, previous)


# ---------------------------------------------------------------- reading


def seal_of(path):
    """The seal at the end of a file of tensors, with its length before it, or b"" where it was not sealed.

    Where the end has been altered it is still told that there was a seal.
    """
    with open(path, "rb") as file:
        if file.read(8) == b"version ":                                 # git-lfs's pointer has a SHA-256 too
            return b""
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 2 ** 16, 0))
        end = file.read()
    record = end.rfind(b"PK\5\6")                                       # the archive's last
    comment = end[record + 20:] if record >= 0 else b""                 # its length, and itself
    torn = record >= 0 and int.from_bytes(comment[:2], "little") != len(comment) - 2
    sealed = torn or LENGTH + SEAL in end or comment.startswith(LENGTH) or comment[2:].startswith(SEAL)
    return end[-len(LENGTH + SEAL) - 64:] if sealed else b""


def check_seal(path):
    """Raise UserError where a file of tensors is sealed and was altered since."""
    seal = seal_of(path)
    if not seal:
        return
    found, left = hashlib.sha256(), os.path.getsize(path) - len(seal)
    with open(path, "rb") as file:
        while left > 0:
            block = file.read(min(left, 2 ** 20))
            found.update(block)
            left -= len(block)
    found.update(bytes(2))                                              # the length of the comment was 0
    if seal != LENGTH + SEAL + found.hexdigest().encode():
        raise UserError(f"checkpoint {path} is damaged: its SHA-256 is not the one that it was written with")


def read_checkpoint(path, needs=(), foreign=False):
    """The dict in a checkpoint file, on the CPU. UserError where it is damaged or lacks a key of needs.

    With foreign, a StandIn takes the place of each object that is no tensor and no plain value; without, a
    file that holds one is refused.
    """
    check_regular(path)
    try:
        check_seal(path)
        names = look_through(path)
        if names and not foreign:
            refuse(path, f"asks for {shown(min(names))}")
        with torch.serialization.safe_globals(stand_ins(names)):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"checkpoint {path} does not exist") from None
    except UserError:
        raise
    except Exception as error:                                          # a damaged file raises many kinds
        lines = str(error).splitlines() or [type(error).__name__]
        # What PyTorch says of the flag is how to have the file's code run.
        more = "weights_only" in str(error)
        reason = f"it holds more than weights; {WAY_ON}" if more else printable(lines[0][:200])
        raise UserError(f"checkpoint {path} cannot be read ({reason})") from None
    if isinstance(state, StandIn) and not state.entries:
        raise UserError(f"checkpoint {path} holds a {shown(type(state).__name__)}, whose class is not "
                        f"loaded: expected a dict of tensors; {WAY_ON}")
    if isinstance(state, StandIn):
        state = state.entries
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} holds a {type(state).__name__}: expected a dict")
    missing = [key for key in needs if key not in state]
    if missing:
        raise UserError(f"checkpoint {path} has no {', '.join(missing)}: it is not the state of a run")
    for key in {"model", "config"}.intersection(needs):
        if not isinstance(state[key], dict):
            raise UserError(f"checkpoint {path} has a {key} that is no dict: it is not the state of a run")
        names = [name for name in state[key] if not str(name).isprintable()]
        if names:                                                       # they would reach the terminal
            raise UserError(f"checkpoint {path} has control characters in names: {listed(map(str, names))}")
    return state


def check_regular(path):
    """Raise UserError where a path is anything but a plain file, or a link to one: a pipe never ends."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is no plain file: expected one, or none")


# ---------------------------------------------------------------- one run per folder

LOCK = "run.lock"


def remove_leftovers(folder, names=OF_A_RUN):
    """Remove the temporary files of processes that were killed while they wrote to a folder.

    Only those that write_atomically makes for files of these names, a regular expression, and no links. A
    process that lives, perhaps on another machine, holds the lock of its file.
    """
    for path in Path(folder).glob("*.tmp.*"):
        found = re.fullmatch(rf"(?:{names})\.tmp\.(\d+)", path.name)
        if found and path.is_file() and not path.is_symlink() and not is_alive(int(found[1])):
            with contextlib.suppress(OSError), open(path, "rb+") as file:       # it was removed just now
                if take(file):
                    path.unlink()


def take(file):
    """Lock a temporary file for its writer. False where another process has it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):                          # POSIX allows either
        return False
    except OSError:                                                     # a file system without such locks
        pass
    return True


def is_alive(pid):
    """Whether another process of this number lives on this machine."""
    try:
        if pid == os.getpid():                                          # in a container all have the number 1
            return False
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:                                             # it is another user's
        pass
    return True


def lock(folder, say):
    """The open file by which this process keeps a folder to itself, until it is closed or the process ends.

    Raises UserError, which says who has it, where it is taken. The lock is POSIX's, which children of fork do
    not have: workers that outlive a killed run for a moment do not keep its folder.
    """
    path = Path(folder) / LOCK
    check_regular(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW                      # not the target of a link
    try:
        file = os.fdopen(os.open(path, flags, 0o666), "r+")
        if os.fstat(file.fileno()).st_nlink > 1:                        # it has another name too
            file.close()
            raise OSError(errno.ELOOP, "a hard link")
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise UserError(f"{path} is a link: expected a file, or none") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):                          # POSIX allows either
        with file:
            file.seek(0)
            owner = file.read().strip() or "another process"
        raise UserError(f"{folder} is in use by {owner}: stop that, or name another folder to write "
                        f"to") from None
    except OSError as error:
        say(f"warning: {folder} cannot be locked ({error.strerror}): nothing keeps a second run out of it")
        return file
    file.seek(0)
    file.truncate()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
    file.flush()
    return file


def is_held(folder):
    """Whether another process has the lock of a folder; where it cannot be told, no."""
    try:
        with open(Path(folder) / LOCK, "rb") as file:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):                          # POSIX allows either
        return True
    except OSError:                                                     # no such file, or no such locks
        pass
    return False


def check_lock(folder, world):
    """Raise Fault where the lock in a folder is not the file that this process holds, if it holds one.

    The lock belongs to a file, the run to a path: where the folder was moved, or its lock removed, another
    run may be there.
    """
    with contextlib.suppress(OSError):
        path = os.stat(Path(folder) / LOCK)
        if any(os.path.samestat(path, os.fstat(file.fileno())) for file in world.held):
            return
    if world.held:
        raise Fault(f"{folder} is no longer this run's: it was moved, or its {LOCK} was removed; nothing "
                    f"more is written there")
