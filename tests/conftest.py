"""Set-up for all tests: here kernels run in Triton's interpreter, so no GPU is needed.

Triton decides between interpreter and compiler when it is imported, once a process, and other packages import
it. So the variable is set first of all, and tests that compile start a process of their own with
TRITON_INTERPRET=0.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import sys  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
