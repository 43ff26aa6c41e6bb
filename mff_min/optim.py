"""Parameter groups, layer-wise decay and the learning-rate schedule."""

import math


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
        lr_scale = layer_decay ** (depth + 1 - layer_id(name, depth))
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


def cosine_lr(epoch, lr, min_lr, warmup_epochs, epochs):
    """The learning rate at a fractional epoch: linear from 0, then half a cosine to min_lr (MAE, A.1)."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = min((epoch - warmup_epochs) / (epochs - warmup_epochs), 1.0)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(optimizer, lr):
    """Give every group its learning rate: lr times the group's lr_scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
