"""Parameter groups, layer-wise decay, LARS, and the schedule of a run."""

import math
from dataclasses import dataclass

import torch

from mff_min.errors import UserError


def param_groups(model, weight_decay, layer_decay=1.0, depth=0, undecayed=()):
    """AdamW groups, one for each (lr_scale, weight_decay) that occurs, with the names of their parameters.

    As in timm and the official MAE code, 1-D parameters and biases get no weight decay, nor do the names in
    undecayed (fine-tuning: pos_embed and cls_token). MFF's proj_weights are 4-D and do get it. layer_decay
    < 1 scales the learning rate of an encoder of `depth` blocks by layer_decay ** (depth + 1 - layer id):
    BEiT, arXiv 2106.08254.
    """
    groups = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        decays = param.ndim > 1 and not name.endswith(".bias") and name not in undecayed
        lr_scale = layer_decay ** (depth + 1 - layer_id(name.removeprefix("encoder."), depth))
        decay = weight_decay if decays else 0.0
        new = {"params": [], "names": [], "lr_scale": lr_scale, "weight_decay": decay}
        group = groups.setdefault((lr_scale, decay), new)
        group["params"].append(param)
        group["names"].append(name)
    return list(groups.values())


def layer_id(name, depth):
    """How deep a parameter sits: 0 the embeddings, i + 1 block i, depth + 1 everything above the blocks."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose steps are scaled by the size of each parameter (arXiv 1708.03888).

    As in MoCo v3 and the official MAE code, 1-D parameters (biases) are neither scaled nor decayed, and the
    learning rate stands outside the momentum. trust_coefficient is the length of a gradient relative to its
    parameter. A step changes nothing where found_inf, on the device as fused AdamW takes it, is not 0.
    """

    found_inf = None

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, trust_coefficient=0.001):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum,
                                      trust_coefficient=trust_coefficient))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                update = param.grad
                if param.ndim > 1:
                    update = update + group["weight_decay"] * param
                    ratio = group["trust_coefficient"] * param.norm() / update.norm()
                    # A zero parameter would never leave 0, and a zero gradient gives no finite ratio.
                    update = update * torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                momentum = group["momentum"] * state["momentum"] + update
                for old, new in (state["momentum"], momentum), (param, param - group["lr"] * momentum):
                    old.copy_(new if self.found_inf is None else old.where(self.found_inf > 0, new))


@dataclass(frozen=True)
class Schedule:
    """What follows from the flags, the number of images and the number of processes."""
    num_samples: int
    global_batch: int
    images_at_once: int                                                 # images in all ranks' micro-batches
    stop: int                                                           # the step at which the run ends
    epochs: float                                                       # where lr reaches min_lr
    warmup_epochs: float
    lr: float

    @property
    def accumulation(self):
        """Micro-batches of a process's step."""
        return self.global_batch // self.images_at_once

    def epoch(self, step):
        return step * self.global_batch / self.num_samples

    def evaluation_due(self, done, every):
        """Whether step `done` is the first to reach a multiple of so many epochs."""
        return self.epoch(done) // every > self.epoch(done - 1) // every

    def plan(self, start):
        """What a run from step `start` is about to do, as text."""
        text = (f"steps {start} to {self.stop} of {self.global_batch} images in {self.accumulation} "
                f"micro-batches, {self.epoch(self.stop):.1f} epochs; lr {self.lr:.2e}, "
                f"{self.warmup_epochs:.3g} epochs of warm-up")
        if self.num_samples < self.global_batch:
            text += (f"\nwarning: {self.num_samples} images are fewer than the global batch of "
                     f"{self.global_batch}: some repeat in new views; "
                     f"{'--small or ' * (self.global_batch > 64)}--global-batch lowers it")
        return text


def make_schedule(num_samples, global_batch, images_at_once, epochs, steps, warmup_epochs, blr, lr,
                  published):
    """The Schedule of a stage whose recipe has `published` = (epochs, epochs of warm-up).

    images_at_once is the number of images in the micro-batches of all processes. epochs, steps, warmup_epochs
    and lr are None where they are not given. Raises UserError when the warm-up is not shorter than the run.
    """
    if epochs is None:
        epochs = steps * global_batch / num_samples if steps else published[0]
    if warmup_epochs is None:
        warmup_epochs = min(published[1], epochs / 5)
    if warmup_epochs >= epochs:
        raise UserError(f"--warmup-epochs {warmup_epochs:g}: expected less than the run's {epochs:g} epochs")
    # Rounded before it is rounded up, because epochs may come from steps.
    whole = math.ceil(round(epochs * num_samples / global_batch, 6))
    if not whole:
        raise UserError(f"--epochs {epochs:g} of {num_samples} images is not one step of {global_batch}")
    lr = blr * global_batch / 256 if lr is None else lr
    stop = min(whole, steps or whole)
    return Schedule(num_samples, global_batch, images_at_once, stop, epochs, warmup_epochs, lr)


def cosine_lr(epoch, lr, min_lr, warmup_epochs, epochs):
    """The learning rate at a fractional epoch: linear from 0, then half a cosine to min_lr (MAE, A.1)."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = min((epoch - warmup_epochs) / (epochs - warmup_epochs), 1.0)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def load_optimizer(optimizer, saved):
    """Load what an optimizer saved of its parameters; the settings of its groups stay its own."""
    optimizer.load_state_dict(saved | dict(param_groups=optimizer.state_dict()["param_groups"]))


def clip_grad_norm(model, max_norm):
    """The norm of the model's gradient, a tensor; a longer gradient is cut to max_norm, unless that is 0."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    if hasattr(norm, "full_tensor"):                                    # parameters are sharded
        norm = norm.full_tensor()
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


def set_lr(optimizer, lr):
    """Give every group its learning rate: lr times the group's lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
