"""Parameters, gradients and optimizer state spread over all processes: PyTorch's fully_shard (FSDP2).

What is unusual here: a checkpoint knows nothing of it. Rank 0 gathers whole tensors and writes the file that
other runs write, and every rank cuts its own part out of that file, so that any number of processes, sharded
or not, goes on from it. For that a process must find room for the whole file in its host's memory: 12 bytes
per parameter with AdamW, 8 GB for vit_h. And each device must hold all parameters once, at the start; rank
0's does so again whenever it draws or evaluates.

The arithmetic is DDP's. Parameters are gathered in float32, and autocast rounds them as it does there;
fully_shard's own mixed precision would also round the residual stream and the norms' parameters.

PyTorch's modules for it take long to import, longer than all of this project's: functions do it, when called.
"""

import contextlib

import torch

from mff_min.errors import UserError
from mff_min.vit import Block


def check_sharding(fsdp, world_size):
    """Raise UserError for --fsdp where there is no other process to hold a part."""
    if fsdp and world_size == 1:
        raise UserError("--fsdp spreads the parameters over processes, and this is the only one: start "
                        "several with torchrun --nproc-per-node=N, or leave --fsdp out")


def shard(model, world, accumulates, compile):
    """Shard model in place: a group of parameters for each Block, and one for all others. Returns model.

    Every rank has the same values at first, on its device. A block's parameters are gathered before its
    forward pass, freed, and gathered again for its backward pass; the others, which the fusion and the
    embeddings use directly, stay in between. With accumulates, all of them stay from a step's first forward
    pass to its last backward pass: that step gathers once and adds gradients up once, for the memory of
    whole parameters and gradients. With compile, each block's forward pass is compiled.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        if compile:                                                     # without the gathering around it
            block.forward = torch.compile(block.forward, dynamic=False)
        fully_shard(block, mesh=mesh, reshard_after_forward=not accumulates)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def maybe_no_sync(trained, more):
    """A context for a micro-batch: with more to come in this step, ranks do not add up its gradients yet."""
    if hasattr(trained, "set_requires_gradient_sync"):                  # fully_shard's
        trained.set_requires_gradient_sync(not more)
        trained.set_reshard_after_backward(not more)
    elif more and hasattr(trained, "no_sync"):                          # DDP, compiled or not
        return trained.no_sync()
    return contextlib.nullcontext()


def is_part(value):
    """Whether value is a sharded tensor, a DTensor."""
    return isinstance(value, torch.Tensor) and hasattr(value, "full_tensor")


def full_tensor(tensor):
    """A sharded tensor as a whole, which all ranks must ask for together; any other tensor itself."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def local(tensor):
    """This rank's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if is_part(tensor) else tensor


def gathered(value, keep):
    """value with each sharded tensor in it, nested in dicts and lists, as a whole on the CPU.

    All ranks must call this together; those with keep=False get None for each of these tensors.
    """
    if isinstance(value, dict):
        return {key: gathered(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [gathered(item, keep) for item in value]
    if not is_part(value):
        return value
    value = full_tensor(value.detach())
    return value.to("cpu", copy=True) if keep else None                 # a copy leaves the padding behind


def own_part(state, optimizer):
    """What this rank needs of an optimizer's whole state_dict: all of it, unless parameters are sharded."""
    params = [param for group in optimizer.param_groups for param in group["params"]]

    def cut(value, param):
        if not is_part(param) or value.ndim == 0:                       # AdamW's count of steps
            return value
        from torch.distributed.tensor import distribute_tensor
        part = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
        return part.clone()                                             # else it keeps the whole alive
    parts = {i: {key: cut(value, param) for key, value in state["state"][i].items()}
             for i, param in enumerate(params) if i in state["state"]}
    return {**state, "state": parts}


def whole(model, build, world, everywhere=False):
    """The model itself; where it is sharded, a copy that build() makes with all parameters.

    All ranks must call this together. Of a sharded model rank 0 alone gets one, the others None, or with
    everywhere each rank.
    """
    if not any(map(is_part, model.parameters())):
        return model
    keep = world.is_main or everywhere
    weights = gathered(model.state_dict(), keep)
    if not keep:
        return None
    copy = build()
    copy.load_state_dict(weights)
    return copy
