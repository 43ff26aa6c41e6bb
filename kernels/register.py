# SPDX-License-Identifier: Apache-2.0
"""How a kernel becomes an op of PyTorch, which torch.compile and autograd see as one step.

An op has two sides. launch starts the kernel on CUDA. Its twin is plain PyTorch: it runs on a CPU, and it
tells the shapes and types of the results where there is no data (torch.compile, export, meta tensors). The
twin of a forward pass is the reference; the twin of its backward pass is gradients(reference).
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch.library import custom_op, infer_schema

NAMESPACE = __package__.replace(".", "_")               # so that two copies of this folder do not collide


def register(name, launch, twin, fake=None):
    """The op called name, with the signature of launch. Both sides return contiguous tensors of their own.

    fake tells shapes and types in the twin's place: a twin that is gradients must not, since autograd within
    a backward pass of torch.compile would wait for the GPU's own thread of autograd, for ever.
    """
    schema = infer_schema(launch, mutates_args=())
    op = custom_op(f"{NAMESPACE}::{name}", twin, mutates_args=(), device_types="cpu", schema=schema)
    op.register_kernel("cuda")(launch)
    op.register_fake(fake or twin)
    return op


def gradients(function):
    """The backward pass of function: (dout, *inputs) -> the gradients of all tensors of inputs, in order."""
    def backward(dout, *inputs):
        # PyTorch runs an op with autograd off, and torch.enable_grad does not turn it on: a new thread does.
        with ThreadPoolExecutor(max_workers=1) as pool:
            found = pool.submit(differentiate, function, dout, inputs).result()
        return [x.clone(memory_format=torch.contiguous_format) for x in found]
    return backward


def gradient_shapes(*inputs):
    """Empty tensors like what gradients finds for these inputs."""
    tensors = [x for item in inputs for x in (item if isinstance(item, list) else [item])]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors
            if isinstance(x, torch.Tensor)]


def differentiate(function, dout, inputs):
    """The gradients that autograd finds for the tensors of inputs, which may stand in lists."""
    tensors = []

    def fresh(x):
        if isinstance(x, list):
            return [fresh(item) for item in x]
        if not isinstance(x, torch.Tensor):
            return x
        tensors.append(x.detach().requires_grad_())
        return tensors[-1]
    out = function(*map(fresh, inputs))
    return torch.autograd.grad(out, tensors, dout)
