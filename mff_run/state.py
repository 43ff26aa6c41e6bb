"""What the checkpoint of a run holds, and that a run could have written it.

Whoever writes a file can seal it. So all that PyTorch would take on trust is compared with what the run has.
"""

import math

import torch

from mff_min.errors import UserError
from mff_run.files import read_checkpoint

# What a run's checkpoint holds, and what it may hold: a stage adds it, or once there was none.
RUN_STATE = {"model": dict, "optimizer": dict, "step": int, "loss": float, "config": dict}
MORE_STATE = {"data": torch.Tensor, "scaler": dict, "skips": list, "classes": list, "average": dict}
# What an optimizer keeps of a parameter: "step" is a count, all else has the parameter's shape.
KEPT = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "LARS": {"momentum"}}


def read_state(path):
    """The state in a run's checkpoint. UserError where it is damaged, or no run could have written it."""
    state = read_checkpoint(path, RUN_STATE)
    for name, kind in (RUN_STATE | MORE_STATE).items():
        value = state.get(name)
        without = name in MORE_STATE and (name not in state or name == "skips" and value is None)
        if type(value) is not kind and not without:
            raise UserError(f"checkpoint {path} has a {name} that is {type(value).__name__}: expected "
                            f"{kind.__name__}")
    if not all(isinstance(name, str) for name in state.get("classes") or ()):
        raise UserError(f"checkpoint {path} has classes that are no text: it is not the state of a run")
    data = state.get("data", torch.zeros(1, dtype=torch.int64))
    if (data.layout, data.device.type, data.dtype, data.ndim) != (torch.strided, "cpu", torch.int64, 1):
        raise UserError(f"checkpoint {path} has data of {data.dtype}: expected a whole number per image")
    counts = state.get("skips") or [0, 0]
    if len(counts) != 2 or not all(type(n) is int and 0 <= n < 2 ** 62 for n in (state["step"], *counts)):
        raise UserError(f"checkpoint {path} is of step {str(state['step'])[:40]}, with {str(counts)[:40]} "
                        f"skipped: expected counts")
    return state


def is_like(value, own):
    """Whether value could be a later value of a tensor: its shape and kind of numbers, all finite."""
    return (type(value) is torch.Tensor and value.layout == torch.strided and value.device.type == "cpu"
            and value.shape == own.shape and not value.is_complex() and not value.is_quantized
            and value.is_floating_point() == own.is_floating_point() and bool(value.float().isfinite().all()))


def check_optimizer(state, optimizer):
    """Raise UserError unless state holds what this optimizer would have saved at its step.

    A fused step trusts the shapes of what it is given, and that each tensor has memory of its own: else it
    writes outside of it.
    """
    saved, kept, count = state["optimizer"], KEPT[type(optimizer).__name__], torch.tensor(0.0)
    own = [param for group in optimizer.param_groups for param in group["params"]]

    def fits(param, values):
        if not (isinstance(values, dict) and values.keys() == kept):
            return False
        return all(is_like(value, count if name == "step" else param) and value.is_contiguous()
                   and not (name == "exp_avg_sq" and (value < 0).any())
                   and not (name == "step" and not 0 <= value <= state["step"])
                   for name, value in values.items())
    found, groups, problem = saved.get("state"), saved.get("param_groups"), ""
    groups = groups if isinstance(groups, list) else []
    places = [group.get("params") for group in groups if isinstance(group, dict)]
    if str(places) != str([group["params"] for group in optimizer.state_dict()["param_groups"]]):
        problem = f"its parameters are in {len(places)} groups, here in {len(optimizer.param_groups)}"
    elif not isinstance(found, dict) or found and found.keys() != set(range(len(own))):
        problem = "it has no entry for each parameter"
    elif wrong := [i for i in found if not fits(own[i], found[i])]:
        problem = (f"of parameter {wrong[0]} it has not {', '.join(sorted(kept))}, finite and shaped as here "
                   f"{tuple(own[wrong[0]].shape)}")
    elif len({value.data_ptr() for i in found for value in found[i].values()}) < len(kept) * len(found):
        problem = "its tensors share memory"
    if problem:
        raise UserError(f"the resumed optimizer does not fit: {problem}")


def check_scaler(saved, scaler):
    """Raise UserError unless saved is what float16's loss scaler would have saved."""
    if saved.keys() != scaler.state_dict().keys() or not all(
            type(value) in (int, float) and 0 <= value < math.inf for value in saved.values()):
        raise UserError(f"the resumed scaler of float16 does not fit: expected finite "
                        f"{', '.join(scaler.state_dict())}")
