"""FLOPs of a pre-training step, and the rate that a device could do them at: what MFU is made of.

Counted are matrix products and attention, a multiplication and an addition as two, on the tokens that are
there: the encoder has the visible ones, the last decoder block asks for the masked ones alone. Not counted
are norms, GELUs, the loss, the optimizer, and what --grad-checkpointing computes again.

Shapes: L patches, V visible patches, K = L - V masked patches, D width of the encoder, E of the decoder,
T = V + 1 tokens, Q tokens that a block computes, M fused levels, N = P * P * C.
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


def block_flops(block, T, Q):
    """FLOPs of a block's forward pass for Q of T tokens: keys and values, queries, attention, proj, MLP."""
    hidden, D = block.mlp.fc1.weight.shape
    return 4 * T * D * D + 2 * Q * D * D + 4 * Q * T * D + 2 * Q * D * D + 4 * Q * D * hidden


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
