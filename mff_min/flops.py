"""FLOPs of a step of each stage, and the rate that a device could do them at: what MFU is made of.

Counted are matrix products and attention, a multiplication and an addition as two, on the tokens that are
there: in pre-training the encoder has the visible ones, and the last decoder block asks for the masked ones.
Not counted are norms, GELUs, the loss, the optimizer, and what --grad-checkpointing computes again. Branches
that drop path leaves out count, as they run.

Shapes: L patches, V visible patches, K = L - V masked patches, D width of the encoder, E of the decoder,
T tokens, in pre-training V + 1, Q tokens that a block computes, M fused levels, N = P * P * C, G classes.
"""

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
    embed, fusion = 2 * V * N * D, 2 * len(model.proj_layers) * T * D * D
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


def peak_img_per_s(flops, tflops, world):
    """Images a second at which the devices of a run would do nothing but multiply; 0 where it is not known.

    flops is of one image, tflops of one device: 0 on a GPU is what a bfloat16 product reaches.
    """
    if not tflops and world.device.type == "cuda":
        tflops = product_tflops(world.device)
    return tflops * 1e12 * world.size / flops


def product_tflops(device, side=8192, times=20):
    """TFLOP/s of square bfloat16 products on a GPU: what it reaches when it does nothing else."""
    generator = torch.Generator(device).manual_seed(0)                  # the default one is not drawn from
    x = torch.randn(side, side, generator=generator, device=device).to(torch.bfloat16)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(times + 3):                                          # three warm up
        if i == 3:
            start.record()
        x @ x
    stop.record()
    stop.synchronize()
    return 2 * side ** 3 * times / start.elapsed_time(stop) / 1e9
