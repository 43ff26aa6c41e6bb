"""The project's own source, for the tests that read it."""

import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = {path.relative_to(ROOT).as_posix(): path.read_text()
         for pattern in ("*.py", "mff_*/*.py", "kernels/*.py", "tools/**/*.py")
         for path in sorted(ROOT.glob(pattern))}
SCRIPTS = {path.removesuffix(".py"): text for path, text in FILES.items() if "/" not in path}


def complaints(check):
    """What a checker, a function of path and text, has to say about every file."""
    return [complaint for path, text in FILES.items() for complaint in check(path, text)]


def comments(text):
    """(line number, text, stands alone) of every comment."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# "), token.line.strip().startswith("#")
