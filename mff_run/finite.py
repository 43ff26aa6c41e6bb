"""Losses and gradients that are not finite never reach the weights, and no step waits for its device.

Shapes: B images.
"""

import copy

import torch

from mff_min.errors import Fault
from mff_run.files import write_json

NEVER = 2 ** 62                                                         # a step that no run reaches
MOST_SKIPS = 50                                                         # in a row, for float16's overflows


class FiniteSteps:
    """A guard of an optimizer, whose steps change nothing once a loss or gradient was not finite on any rank.

    The device decides, by the optimizer's found_inf: so nothing waits for it, and the weights stay those
    before the first such step until check, at the next step that is logged or saved, ends the run. With half,
    a gradient alone that is not finite is an overflow of float16: as GradScaler has it that step is skipped,
    and counted. The last of MOST_SKIPS in a row ends the run too.

    stream has the samples of every step, source their names. skips is what the property of that name was when
    a resumed run was saved. hint ends the message.
    """

    def __init__(self, optimizer, world, folder, stream, source, hint, half=False, skips=None):
        self.optimizer, self.world, self.folder, self.hint, self.half = optimizer, world, folder, hint, half
        self.stream, self.source = stream, source
        self.skipped, self.in_a_row = torch.tensor(skips or [0, 0], device=world.device)
        self.first = torch.tensor(NEVER, device=world.device)           # the first bad step, on any rank
        self.bad = torch.zeros(2, dtype=torch.bool, device=world.device)            # its loss, gradient here
        self.seen = torch.zeros(3, device=world.device)                 # its loss here, gradient norm, lr

    @torch.no_grad()
    def guard(self, step, lr, loss, grad_norm):
        """Let the optimizer's next step change nothing if it or one before is bad. loss is this rank's."""
        values = torch.stack([loss, grad_norm, torch.full_like(loss, lr)])          # (3,)
        bad = values[:2].isfinite().logical_not()                       # (2,)
        skip = bad[1] & self.half
        if self.half:
            self.skipped = self.skipped + skip
            self.in_a_row = (self.in_a_row + 1) * skip
            bad = torch.stack([bad[0], self.in_a_row >= MOST_SKIPS])    # (2,)

        here = torch.full_like(self.first, NEVER).masked_fill(bad.any(), step)
        first = self.world.min(torch.minimum(self.first, here))
        new = first < self.first
        self.first, self.bad, self.seen = first, bad.where(new, self.bad), values.where(new, self.seen)
        self.optimizer.found_inf = (skip | (first != NEVER)).float()    # as fused AdamW takes it

    @property
    def skips(self):
        """[skipped steps in all, skipped steps in a row], or None without float16; reads the device."""
        return [self.skipped.item(), self.in_a_row.item()] if self.half else None

    def counted(self):
        """The log's entry: how many steps float16 skipped."""
        return {"skipped_steps": self.skips[0]} if self.half else {}

    def check(self):
        """Raise Fault on all ranks where a step was bad, with its samples in a file; waits for the device."""
        step = self.first.item()
        if step == NEVER:
            return
        bad, (loss, grad_norm, lr) = self.bad.tolist(), self.seen.tolist()
        losses, bad_losses = self.world.all_gather(loss), self.world.all_gather(bad[0])
        ranks = [rank for rank, is_bad in enumerate(bad_losses) if is_bad]
        path = self.folder / f"nonfinite-step-{step}.json"
        if self.world.is_main:
            samples = list(self.samples(step, ranks or range(self.world.size)))
            write_json(path, dict(step=step, ranks=ranks, losses=list(map(str, losses)),
                                  grad_norm=str(grad_norm), lr=lr, samples=samples))
        what = f"loss is {losses[ranks[0]]}" if ranks else f"the gradient's norm is {grad_norm}"
        if self.half and not ranks:
            what = f"float16 overflowed in {MOST_SKIPS} steps in a row: {what}"
        where = f" on rank {', '.join(map(str, ranks))}" * (self.world.size > 1 and len(ranks) > 0)
        raise Fault(f"{what} at step {step}{where}; no weight has changed since the step before, and {path} "
                    f"names the samples; {self.hint}")

    def samples(self, step, ranks):
        """What these ranks saw in a step: a dict for each sample."""
        for rank in ranks:
            stream = copy.copy(self.stream)
            stream.start, stream.stop, stream.rank = step - 1, step, rank
            for epoch, index in (key for batch in stream for key in batch):
                yield dict(rank=rank, epoch=epoch, index=index, name=self.source.name(index))
