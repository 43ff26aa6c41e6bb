"""What ends a run, and how names and sizes are written in a message."""

import shutil
import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU)


class UserError(Exception):
    """Bad input. The stage ends with this text on one line and exit code 2."""


def listed(names, most=5):
    """Names as text, at most five of them: "cat, dog (2)"."""
    names = sorted(names)
    more = ", ..." if len(names) > most else ""
    return f"{', '.join(map(printable, names[:most]))}{more} ({len(names)})" if names else "none"


def printable(name):
    """A name as it may stand in a line of text: one with control characters is escaped and quoted."""
    return name if name.isprintable() else ascii(name)


def amount(count):
    """A number of bytes as text."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


class Fault(Exception):
    """Something went wrong in a run that had started well. The stage ends with this text and exit code 3."""


def shared_memory(needs):
    """What to say where /dev/shm, which holds the batches that workers hand over, is too small for needs."""
    space = shutil.disk_usage("/dev/shm")
    return (f"/dev/shm has {amount(space.total)}, {amount(space.free)} free, and {needs}: expected a larger "
            f"one (of a container: --shm-size or --ipc=host), fewer --workers or a smaller --batch-size")
