"""A decoder's layer as a few opaque kernels for Hopper GPUs (Triton).

XLA puts nothing between them but bitcasts, so a step is one run of launches:

    settle (splits' sums, residual, norm) -> product (qkv) -> heads (sums, bias, norm, rotation, write)
    -> attend (splits of the context) -> join -> product (out) -> settle -> product (gated) -> product (down)

What the bits depend on is the order along the reduced axis alone: depth and split of a product, tile and split of the
context (sizes.py). Rows and columns of a tile follow the number of rows, and splits run side by side or in turn.
"""
