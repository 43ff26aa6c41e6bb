"""The ops that models take as `ops=`: one frozen table of callables, one column of it for each implementation.

    from kernels import load
    ops = load("auto")
    fused = ops.layer_sum(levels, logits)

reference.py holds every op in plain PyTorch: read it first, it says what each of them computes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from kernels import reference


@dataclass(frozen=True)
class Ops:
    """One implementation of every op; the signatures and the shapes are those of kernels/reference.py."""
    name: str
    prepare: Callable                                                   # uint8 images -> normalised images
    layer_sum: Callable                                                 # M layer outputs, M logits -> one
    patch_loss: Callable                                                # predicted patches, images -> mean squared error
    low_pass: Callable                                                  # images -> images without high frequencies


TORCH = Ops("torch", reference.prepare, reference.layer_sum, reference.patch_loss, reference.low_pass)


def load(name):
    """The table called name: "torch", or "auto" for the fastest that works here (the Triton column has its own issue)."""
    if name in ("auto", "torch"):
        return TORCH
    raise ValueError(f"ops {name!r} is unknown: expected auto or torch")
