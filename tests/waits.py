"""What in the steps of a stage would make a CPU wait for its GPU, seen without a GPU."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mff_run.progress import Meter


class Waits(TorchFunctionMode):
    """Notes in `found` all that would stop a CPU until its GPU is done: values that leave the device,
    and tensors that go there without non_blocking."""
    LEAVE = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.item, torch.equal,
             torch.allclose, torch.Tensor.__bool__, torch.Tensor.__float__, torch.Tensor.__int__,
             torch.Tensor.__index__, torch.Tensor.__repr__}

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        # Of integers alone: PyTorch moves the norms of gradients to the device on which they are.
        moves = (function is torch.Tensor.to and not args[0].is_floating_point()
                 and any(isinstance(value, torch.device) for value in args))
        if function in self.LEAVE or moves and not (kwargs or {}).get("non_blocking"):
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


class HiddenWaits(TorchDispatchMode):
    """The same for what PyTorch does inside: a value that is read, a shape that depends on values."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def waits_in_steps(stage, start, monkeypatch):
    """What would wait for the GPU in each step of the run of a stage that start() makes: lists of names."""
    make_loader, next_batch, in_steps = stage.make_loader, Meter.next, []

    def made_before(*arguments):
        return iter(list(make_loader(*arguments)))                      # loading may wait for its own tensors

    def next_and_note(meter, batches):
        if meter.micro % meter.schedule.accumulation == 0:
            in_steps.append([])
        return next_batch(meter, batches)

    class Noted:
        def append(self, name):
            if in_steps:
                in_steps[-1].append(name)
    monkeypatch.setattr(stage, "make_loader", made_before)
    monkeypatch.setattr(Meter, "next", next_and_note)
    with Waits(Noted()), HiddenWaits(Noted()):
        start()
    return in_steps
