# SPDX-License-Identifier: Apache-2.0
"""The ops that models take as `ops=`: a frozen table of callables, one column for each implementation.

    from mff_min.kernels.ops import load
    ops = load("auto")
    fused = ops.layer_sum(levels, logits)

reference.py holds every op in plain PyTorch: read it first, it says what each of them computes.
docs/kernels.md says how the others are derived, tested and measured. Triton is imported when its column is
first asked for, not before.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import reference


@dataclass(frozen=True)
class Ops:
    """One implementation of every op; the signatures and the shapes are those of kernels/reference.py."""
    name: str
    prepare: Callable                                   # uint8 images -> normalised, mixed images
    layer_sum: Callable                                 # M layer outputs, M logits -> one
    layer_sum_norm: Callable                            # layer_sum, then LayerNorm
    project_sum_norm: Callable                          # M - 1 projections, layer_sum, then LayerNorm
    patch_loss: Callable                                # predicted patches, images -> mean squared error
    low_pass: Callable                                  # images -> images without high frequencies


TORCH = Ops(
    name="torch",
    prepare=reference.prepare,
    layer_sum=reference.layer_sum,
    layer_sum_norm=reference.layer_sum_norm,
    project_sum_norm=reference.project_sum_norm,
    patch_loss=reference.patch_loss,
    low_pass=reference.low_pass,
)


def load(name, device="cuda"):
    """The column called name: "torch", "triton", or "auto": Triton where it can run, else torch.

    device is that of the tensors. "triton" where it cannot run is a ValueError that says what is missing.
    """
    if name not in ("auto", "torch", "triton"):
        raise ValueError(f"ops {name!r} is unknown: expected auto, torch or triton")
    missing = missing_for_triton(torch.device(device))
    if name == "triton" and missing:
        raise ValueError(f"ops 'triton' cannot run here: {missing}")
    return TORCH if name == "torch" or missing else triton_column()


def missing_for_triton(device):
    """What the Triton column lacks for tensors on device, in one phrase, or None."""
    if device.type != "cuda":
        return f"its kernels need a CUDA device, not {device}"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    version = triton_version()
    if version < (3, 6):
        return f"triton {version[0]}.{version[1]} is too old, 3.6 is the oldest that is tested"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor} is too low, 8.0 is the first that works"
    return None


def triton_version():
    """(major, minor) of the installed Triton."""
    names = ("triton", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton")      # PyTorch's builds
    found = [d.version for d in importlib.metadata.distributions() if d.name in names]
    version = found[0] if found else "3.6"              # built from source: taken for a recent one
    return tuple(int(part) for part in version.split(".")[:2])


def triton_column():
    """The Triton kernels, and plain PyTorch where that is as good: docs/kernels.md says where and why."""
    from .layer_sum import layer_sum
    from .layer_sum_norm import layer_sum_norm
    from .patch_loss import patch_loss
    from .prepare import prepare
    from .project_sum_norm import project_sum_norm
    return Ops(
        name="triton",
        prepare=prepare,
        layer_sum=layer_sum,
        layer_sum_norm=layer_sum_norm,
        project_sum_norm=project_sum_norm,
        patch_loss=patch_loss,
        low_pass=reference.low_pass,
    )
