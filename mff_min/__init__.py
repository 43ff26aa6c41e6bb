"""The core of mff_min: a ViT, masked image modelling on top of it, and what the stages share."""

import sys

if sys.platform == "win32":                                             # every stage and tool comes by here
    sys.stderr.write("error: Windows is not supported: expected Linux, which WSL 2 or a container gives\n")
    raise SystemExit(2)
