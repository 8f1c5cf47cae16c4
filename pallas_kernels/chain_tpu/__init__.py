"""A decoder's layer as a few opaque kernels for TPUs.

XLA only copies between them, so no bits depend on how it fuses, and a step is one straight line:

    settle (sums, residual, norm) -> product (qkv) -> heads (bias, norm, rotation) -> write -> attend -> product (out)
    -> settle -> product (gated) -> product (down)

Grids run over the rows that are live. What stands between products is computed SUB_ROWS rows at a time, at any number
of rows: the shape of the arithmetic never changes, so a row's bits do not.
"""
