"""Who takes part in a stage's step: ours and the peers', of one size, with the same weights and work.

A contender is a module whose forward pass takes the stage's inputs and returns the loss, and the optimizer
of its own training script. The learning rate is 0, so that the weights stay those whose losses were
compared.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_pretrain
from mff_min.augment import soft_targets
from mff_min.config import parse
from mff_min.optim import LARS, param_groups
from mff_min.probe import LinearProbe, pool_tokens
from mff_min.vit import MODELS
from mff_weights.pretrained import build_vit
from tools.bench.measure import NotRun
from tools.bench.peers import PRETRAIN_PEERS, timm_vit

CLASSES = 1000


@dataclass(frozen=True)
class Case:
    """A size of model and images; the decoder is (width, blocks, heads)."""
    model: str
    img_size: int = 224
    patch_size: int = 16
    decoder: tuple[int, int, int] = (512, 8, 16)
    cpu_batch: int = 16
    gpu_batch: int = 256

    @property
    def num_patches(self):
        return (self.img_size // self.patch_size) ** 2

    def batch(self, device):
        """Images of a step where the command line does not say."""
        return self.gpu_batch if device.type == "cuda" else self.cpu_batch


CASES = {"tiny": Case("vit_test", 16, 4, (16, 1, 2), 4, 4),             # for the tests
         "small": Case("vit_t", 64, 8, (128, 4, 4), 32, 1024),
         "vit_s": Case("vit_s"), "vit_b": Case("vit_b"), "vit_l": Case("vit_l")}


# ---- contenders: a module whose forward pass takes a stage's inputs and returns the loss, and its optimizer

@dataclass(frozen=True)
class Contender:
    """A way to do a stage's step: how its module is built, gets our weights, and is updated."""
    build: Callable                                                     # (case, device) -> module
    optimizer: Callable                                                 # module -> its optimizer
    package: str = "torch"                                              # that it needs
    adapt: Callable = None                                              # (module, ours); None: it is ours


def ours_pretraining(out_indices):
    """The Contender that train_pretrain.py trains with these --out-indices."""
    def build(case, device):
        E, depth, heads = case.decoder
        flags = (f"--model {case.model} --img-size {case.img_size} --patch-size {case.patch_size} "
                 f"--out-indices {out_indices} --decoder-embed-dim {E} --decoder-depth {depth} "
                 f"--decoder-num-heads {heads}")
        flags += " --ops torch" if device.type == "meta" else ""
        return train_pretrain.build_model(parse(train_pretrain.Config, flags.split()), device)
    return Contender(build, adamw(fused=True))


def adamw(**options):
    """Pre-training's AdamW."""
    return lambda module: torch.optim.AdamW(param_groups(module, 0.05), lr=0.0, betas=(0.9, 0.95), **options)


def tuning_adamw(**options):
    """Fine-tuning's AdamW, with a learning rate for each block."""
    def build(module):
        groups = param_groups(module.vit, 0.05, 0.75, len(module.vit.blocks), ("pos_embed", "cls_token"))
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), **options)
    return build


class Tuned(nn.Module):
    """The loss of fine-tuning; a peer draws its own noise for drop path."""

    def __init__(self, vit, takes_noise):
        super().__init__()
        self.vit, self.takes_noise = vit, takes_noise

    def forward(self, images, noise, targets):
        logits = self.vit(images, noise) if self.takes_noise else self.vit(images)
        return F.cross_entropy(logits.float(), targets)


class Probed(nn.Module):
    """The loss of a linear probe of a frozen encoder's class token."""

    def __init__(self, vit):
        super().__init__()
        self.vit, self.probe = vit.requires_grad_(False).eval(), LinearProbe(vit.embed_dim, CLASSES)

    def forward(self, images, labels):
        with torch.no_grad():
            features = pool_tokens(self.vit.forward_features(images), "token").float()
        return F.cross_entropy(self.probe(features), labels)


def ours_vit(case, **options):
    """Our ViT of this case's sizes."""
    return build_vit(case.model, (case.img_size, case.img_size), case.patch_size, 3, **options)


def timm_lars(module):
    """timm's LARS."""
    from timm.optim import Lars
    return Lars(module.probe.parameters(), lr=0.0, momentum=0.9)


def same_names(module, ours):
    """Give a module our weights where its parameters have our names."""
    module.load_state_dict(ours.state_dict())


def of_peer(name):
    """The Contender of a peer in pre-training."""
    # Transformers' Trainer fuses AdamW, the scripts of the others do not.
    return Contender(lambda case, device: PRETRAIN_PEERS[name](case).to(device),
                     adamw(fused=True if name == "Transformers ViTMAE" else None),
                     PRETRAIN_PEERS[name].package, lambda module, ours: module.load(ours.state_dict()))


AVG = dict(num_classes=CLASSES, global_pool="avg")
STAGES = {                                                              # the first of each is compared with
    "pretrain": {"mff_min MAE": ours_pretraining("last"), "mff_min MFF_MAE": ours_pretraining("spread"),
                 **{name: of_peer(name) for name in PRETRAIN_PEERS}},
    "finetune": {
        "mff_min": Contender(
            lambda case, device: Tuned(ours_vit(case, drop_path=0.1, **AVG), True).to(device),
            tuning_adamw(fused=True)),
        "timm": Contender(
            lambda case, device: Tuned(timm_vit(case, drop_path_rate=0.1, **AVG), False).to(device),
            tuning_adamw(), "timm", same_names)},
    "probe": {
        "mff_min": Contender(lambda case, device: Probed(ours_vit(case)).to(device),
                             lambda module: LARS(param_groups(module.probe, 0.0))),
        "timm": Contender(lambda case, device: Probed(timm_vit(case, num_classes=0)).to(device), timm_lars,
                          "timm", same_names)},
}
BASELINES = {"pretrain": "timm blocks as facebookresearch/mae", "finetune": "timm", "probe": "timm"}


def make_inputs(stage, case, batch, device):
    """What a stage's modules take: random images, and noise, labels or both."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, case.img_size, case.img_size, generator=generator)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    if stage == "pretrain":
        inputs = images, torch.rand(batch, case.num_patches, generator=generator)
    elif stage == "finetune":
        noise = torch.rand(batch, MODELS[case.model]["depth"], 2, generator=generator)
        inputs = images, noise, soft_targets(labels, CLASSES, 0.1, 0.7)
    else:
        inputs = images, labels
    return [x.to(device) for x in inputs]


# ---- equal work

def fingerprint(module, stage, inputs):
    """(loss, number of trained values) of a module on four images, in float32, without drop path."""
    inputs = [x[:4] for x in inputs]
    tuned = stage == "finetune"
    with torch.no_grad(), exact_convolutions():
        module.train(not tuned)                                         # a probe's statistics are the batch's
        loss = module(inputs[0], None, inputs[2]) if tuned else module(*inputs)
        module.train()
    return loss.item(), sum(p.numel() for p in module.parameters() if p.requires_grad)


@contextlib.contextmanager
def exact_convolutions():
    """Inside it, a GPU's convolutions are not rounded to TF32, as matrix products are not by default."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def check_equal(found, ours):
    """Raise NotRun unless both fingerprints are the same, losses but for rounding."""
    (loss, trained), (our_loss, our_trained) = found, ours
    bound = 256 * torch.finfo(torch.float32).eps * abs(our_loss)        # sums in another order
    if not abs(loss - our_loss) <= bound:
        raise NotRun(f"unequal work: its loss is {loss:.7f}, ours {our_loss:.7f}")
    if trained != our_trained:
        raise NotRun(f"unequal work: it trains {trained} values, ours {our_trained}")


def step_flops(stage, case, contender):
    """Floating-point operations of an image's step, as this method needs them."""
    device = torch.device("meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        contender.build(case, device)(*make_inputs(stage, case, 2, device)).backward()
    return counter.get_total_flops() / 2
