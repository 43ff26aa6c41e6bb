"""FLOPs of a step of each stage, and the rate that a device could do them at: what MFU is made of.

Counted are matrix products and attention, a multiplication and an addition as two, on the tokens that are
there: in pre-training the encoder has the visible ones, and the last decoder block asks for the masked ones.
Not counted are norms, GELUs, the loss, the optimizer, and what --grad-checkpointing computes again. Branches
that drop path leaves out count, as they run.

Shapes: L patches, V visible patches, K = L - V masked patches, D width of the encoder, E of the decoder,
T tokens, in pre-training V + 1, Q tokens that a block computes, M fused levels, N = P * P * C, G classes.
"""

import statistics
import time

import torch


def step_flops(model):
    """FLOPs of a forward and backward pass of a MaskedAutoencoder, for one image.

        patch projection    2 V N D                    fusion              2 (M - 1) T D D
        decoder_embed       2 T D E                    decoder_pred        2 K E N

    and the blocks, forward; the backward pass of a product y = x w has two of the same size, dx and dw, so
    all of it counts three times, less the dx that nothing asks for: of the images, and of levels detached.
    """
    encoder, (N, E) = model.encoder, model.decoder_pred.weight.shape
    D, L, V = encoder.embed_dim, encoder.num_patches, model.num_visible
    T, K = V + 1, L - V
    embed, fusion = 2 * V * encoder.patch_embed.proj.weight.numel(), 2 * len(model.proj_layers) * T * D * D
    blocks = sum(block_flops(block, T, T) for block in encoder.blocks)
    blocks += sum(block_flops(block, L + 1, L + 1) for block in model.decoder_blocks[:-1])
    blocks += block_flops(model.decoder_blocks[-1], L + 1, K)
    ends = 2 * T * D * E + 2 * K * E * N
    return 3 * (blocks + ends + fusion + embed) - embed - fusion * model.detach_shallow


def classifier_flops(encoder, head, frozen):
    """FLOPs of a forward and backward pass of an encoder that sees every patch, with its head, for one image.

    A frozen encoder has no backward pass, and its head's asks for no dx.

        patch projection    2 L N D                    head                2 D G
    """
    L, T = encoder.num_patches, encoder.num_patches + 1
    embed, classify = 2 * L * encoder.patch_embed.proj.weight.numel(), 2 * head.weight.numel()
    blocks = sum(block_flops(block, T, T) for block in encoder.blocks)
    return embed + blocks + 2 * classify if frozen else 3 * (embed + blocks + classify) - embed


def block_flops(block, T, Q):
    """FLOPs of a block's forward pass for Q of T tokens: keys and values, queries, attention, proj, MLP."""
    hidden, D = block.mlp.fc1.weight.shape
    return 4 * T * D * D + 2 * Q * D * D + 4 * Q * T * D + 2 * Q * D * D + 4 * Q * D * hidden


def peak_img_per_s(flops, dtype, world):
    """Images per second at which the devices of a run would do nothing but multiply; 0 on a CPU.

    flops is of one image. Says the rate, and its share of the data-sheet rate.
    """
    if world.device.type != "cuda":
        return 0.0
    tflops, name = product_tflops(world.device, dtype), torch.cuda.get_device_name(world.device)
    sheet, short = datasheet_tflops(name, dtype), str(dtype).removeprefix("torch.")
    share = f", {100 * tflops / sheet:.0f} % of the {sheet} TFLOP/s of its data sheet" if sheet else ""
    world.say(f"MFU refers to a {short} product's {tflops:.0f} TFLOP/s, sustained on {name}{share}")
    return tflops * 1e12 * world.size / flops


def product_tflops(device, dtype=torch.bfloat16, side=None, seconds=0.5):
    """TFLOP/s of a device that does nothing but square matrix products in dtype: what every MFU refers to.

    It multiplies for at least so many seconds, since a GPU that gets warm is slower; the rate is the median
    over batches of products. side is 8192 on a GPU and 1024 on a CPU.
    """
    on_gpu = device.type == "cuda"
    side, times = side or (8192 if on_gpu else 1024), 10 if on_gpu else 1
    generator = torch.Generator(device).manual_seed(0)                  # the default one is not drawn from
    x = torch.randn(side, side, generator=generator, device=device).to(dtype)
    y = torch.empty_like(x)

    def multiply():
        for _ in range(times):
            torch.mm(x, x, out=y)
    return 2 * side ** 3 * times / statistics.median(batch_seconds(multiply, device, seconds)) / 1e12


def batch_seconds(work, device, seconds):
    """The times of calls of work, at least three and so many seconds together.

    A GPU has the next call to do while the last one is read, so it never rests. Two calls warm up.
    """
    marks, times = [], []
    while sum(times) < seconds or len(times) < 3:
        work()
        marks.append(mark(device))
        if len(marks) > 3:
            times.append(between(*marks[-3:-1]))
    return times


def mark(device):
    """This moment: of a GPU's work, an event; of a CPU's, the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start, stop):
    """Seconds from one mark to a later one."""
    if isinstance(start, float):
        return stop - start
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


# TFLOP/s of dense 16-bit products with float32 sums, by the exact name that CUDA has for the card: others of
# the same family are slower (H100 PCIe, RTX 4090 Laptop).
DATASHEET = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H200": 989, "NVIDIA B200": 2250, "NVIDIA L40S": 362,
             "NVIDIA A100-SXM4-40GB": 312, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100-PCIE-40GB": 312,
             "NVIDIA A100 80GB PCIe": 312, "NVIDIA GeForce RTX 4090": 165}


def datasheet_tflops(name, dtype):
    """The data-sheet rate of a device with this name; None where it is not known, and for float32."""
    return DATASHEET.get(name) if dtype in (torch.bfloat16, torch.float16) else None
