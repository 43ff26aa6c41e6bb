"""Measure this project side by side with its peers, and print a table for each subject.

    python -m tools.bench ops       # every op: plain PyTorch, torch.compile, Triton
    python -m tools.bench bytes     # the bytes that they move, by count: results/ops_bytes.json
    python -m tools.bench attention   # each form of attention at our shapes: time, error, PyTorch's choice
    python -m tools.bench step      # a training step of each stage: ours, timm, Transformers, lightly
    python -m tools.bench segment   # UPerNet's neck and heads: ours, mmsegmentation's layers
    python -m tools.bench detect    # a step of Mask R-CNN: ours, torchvision's
    python -m tools.bench detect_bytes   # the bytes of its parts, by count: results/boxes_bytes.json
    python -m tools.bench data      # from files to crops on one core: ours, torchvision, timm
    python -m tools.bench imports   # how long a fresh process takes to import each
    python -m tools.bench all       # all of it, smaller, within nine minutes

Each writes results/<subject>_<device>.json, the raw times among it. A peer that is not installed, and what
did not fit into --minutes, is a row that says so. The files beside this one say what is measured, and how.
"""

import argparse
import os

from mff_min.errors import UserError
from mff_run.process import run
from tools.bench import attention, contenders, data, detect, everything, imports, ops, segment, step


def names(text):
    """A list of names, from text with commas."""
    return [name for name in text.split(",") if name]


def positive(kind):
    """A reader of numbers above 0."""
    def read(text):
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
        return value
    return read


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message):
        raise UserError(message)


def parser():
    """The command line: a subject, and its flags."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subjects = parser.add_subparsers(dest="subject", required=True)

    def subject(name, function, text, minutes, rounds):
        new = subjects.add_parser(name, help=text, allow_abbrev=False)
        new.add_argument("--output-dir", default="results", help=f"folder of {name}_<device>.json")
        if minutes:
            new.add_argument("--minutes", type=positive(float), default=minutes,
                             help="what would end later than this is not run")
            new.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        if rounds:
            new.add_argument("--rounds", type=positive(int), default=rounds, help="times each is measured")
        new.set_defaults(run=function)
        return new

    new = subject("ops", lambda args: ops.bench_ops(args.output_dir, args.batch, args.minutes, args.device),
                  "every op: plain PyTorch, torch.compile, Triton", 8.0, 0)
    new.add_argument("--batch", type=positive(int), default=256, help="images; on a CPU, of the byte count")
    subject("bytes", lambda args: ops.bench_bytes(args.output_dir),
            "bytes moved by count: plain PyTorch, torch.compile, Triton", 0, 0)

    subject("attention", attention.bench_attention, "each form of attention at our shapes", 2.0, 0)
    new = subject("step", step.bench_step, "a training step of each stage, beside the peers'", 30.0, 7)
    new.add_argument("--cases", type=names, help=f"sizes, of {','.join(contenders.CASES)}; not given: small, "
                                                 f"vit_s and vit_b, on a GPU vit_b first")
    new.add_argument("--stages", type=names, default=list(contenders.STAGES),
                     help=f"some of {','.join(contenders.STAGES)}")
    new.add_argument("--dtypes", type=names, help="types of matrix products; not given: float32 and "
                                                  "bfloat16, on a GPU bfloat16 first")
    new.add_argument("--batch", type=positive(int), help="images of a step; not given: the case's own")
    new.add_argument("--compile", action="store_true", help="torch.compile, too; always on a GPU")
    new.add_argument("--no-waiting", dest="waiting", action="store_false", help="no loop with a loader")
    new.add_argument("--no-peaks", dest="peaks", action="store_false", help="no peak memory on a CPU")
    new.add_argument("--images", type=positive(int), default=64, help="JPEGs that the loaders read")
    new.add_argument("--workers", type=positive(int), default=max(1, (os.cpu_count() or 2) - 1),
                     help="processes of a loader")
    new.add_argument("--threads", type=positive(int), help="of PyTorch on a CPU; not given: every core")

    new = subject("segment", segment.bench_segment, "UPerNet's neck and heads: ours, mmsegmentation's layers",
                  5.0, 7)
    new.add_argument("--sizes", type=names, help=f"some of {','.join(segment.SIZES)}; not given: vit_t and "
                                                 f"vit_b_128, on a GPU vit_b")
    new.add_argument("--dtypes", type=names, help="types of matrix products; not given: float32, on a GPU "
                                                  "bfloat16")
    new.add_argument("--compile", action="store_true", help="torch.compile, too")
    new.add_argument("--threads", type=positive(int), help="of PyTorch on a CPU; not given: every core")

    new = subject("detect", detect.bench_detect, "a step of Mask R-CNN: ours, torchvision's", 8.0, 7)
    new.add_argument("--sizes", type=names, help=f"some of {','.join(detect.SIZES)}; not given: vit_test, "
                                                 f"vit_t and vit_b_256, on a GPU vit_b")
    new.add_argument("--dtypes", type=names, help="types of matrix products; not given: float32, on a GPU "
                                                  "bfloat16")
    new.add_argument("--threads", type=positive(int), help="of PyTorch on a CPU; not given: every core")
    subject("detect_bytes", lambda args: detect.bench_bytes(args.output_dir),
            "bytes moved by count: the parts of a step of Mask R-CNN", 0, 0)

    new = subject("data", data.bench_data, "from files to crops on one core, beside the peers'", 3.0, 7)
    new.add_argument("--images", type=positive(int), default=64, help="JPEGs that are read in a round")
    subject("imports", imports.bench_imports, "seconds of an import in a fresh process", 3.0, 5)
    subject("all", everything.bench_all, "all subjects, each in a share of the time", 8.7, 3)

    new = subjects.add_parser("peak", help="peak memory of one contender's step: step asks for it")
    for flag in ("--stage", "--case", "--name", "--dtype"):
        new.add_argument(flag, required=True)
    for flag in ("--batch", "--threads"):
        new.add_argument(flag, type=positive(int), required=True)
    new.set_defaults(run=step.peak)
    return parser


def main(argv=None):
    args = parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    run(main, None)
