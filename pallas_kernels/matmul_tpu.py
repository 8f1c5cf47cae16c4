"""The matrix product's TPU body: one grid step adds one dot per row tile to a float32 sum in VMEM, in order along K."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.matmul_reference import dot, finish
from pallas_kernels.sizes import MatmulSizes


def within(x: Array, first: Array, size: int) -> Array:
    """`x [_, depth]`, whose columns start at `first`, with zeros from column `size` on: past the end a block holds
    anything."""
    columns = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(columns < size, x, jnp.zeros_like(x))


def add_block(k: Array, x_ref, w_ref, sum_ref, sizes: MatmulSizes, inputs: int) -> None:
    """sum_ref [parts, rows, columns] += the products of block k along K, one dot of fixed shape for each row tile and
    part."""

    @pl.when(k == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def cut(x):
        return x if inputs % sizes.depth == 0 else within(x, k * sizes.depth, inputs)

    for part in range(w_ref.shape[0]):
        w = cut(w_ref[part])
        for first in range(0, x_ref.shape[0], sizes.rows):
            rows = slice(first, first + sizes.rows)
            sum_ref[part, rows] += dot(cut(x_ref[rows]), w)


def _kernel(x_ref, w_ref, bias_ref, residual_ref, out_ref, sum_ref, *, sizes: MatmulSizes, inputs: int) -> None:
    """`bias_ref` and `residual_ref` are None where the product has no such operand."""
    k = pl.program_id(3)
    add_block(k, x_ref, w_ref, sum_ref, sizes, inputs)

    @pl.when(k == pl.num_programs(3) - 1)
    def _():
        parts = range(w_ref.shape[0])
        bias = [] if bias_ref is None else [bias_ref[part][None] for part in parts]
        for first in range(0, x_ref.shape[0], sizes.rows):
            rows = slice(first, first + sizes.rows)
            y = finish(
                [sum_ref[part, rows] for part in parts], bias, None if residual_ref is None else residual_ref[rows]
            )
            out_ref[rows] = y.astype(out_ref.dtype)


def matmul_tpu(
    x: Float[Array, "M K"] | Float[Array, "leaf M K"],
    w: Float[Array, "leaf parts N K"],
    bias: Float[Array, "leaf parts N"] | None,
    residual: Float[Array, "leaf M N"] | None,
    sizes: MatmulSizes,
    out_dtype: jnp.dtype,
    *,
    interpret: Any = False,
) -> Float[Array, "leaf M N"]:
    """The product by blocks. As many row tiles share a fetched block of weights as M has, up to the table's number.

    Leaves are the outermost axis of one grid, so that a leaf's first blocks are fetched while the last leaf's are used.
    """
    (m, inputs), (leaves, parts, outputs, _) = x.shape[-2:], w.shape
    rows = sizes.rows * min(sizes.shared_tiles, pl.cdiv(m, sizes.rows))
    if x.ndim == 2:
        of_x = pl.BlockSpec((rows, sizes.depth), lambda leaf, i, j, k: (i, k))
    else:
        of_x = pl.BlockSpec((None, rows, sizes.depth), lambda leaf, i, j, k: (leaf, i, k))
    of_w = pl.BlockSpec((None, parts, sizes.columns, sizes.depth), lambda leaf, i, j, k: (leaf, 0, j, k))
    of_bias = pl.BlockSpec((None, parts, sizes.columns), lambda leaf, i, j, k: (leaf, 0, j))
    of_out = pl.BlockSpec((None, rows, sizes.columns), lambda leaf, i, j, k: (leaf, i, j))
    return pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, inputs=inputs),
        grid=(leaves, pl.cdiv(m, rows), pl.cdiv(outputs, sizes.columns), pl.cdiv(inputs, sizes.depth)),
        in_specs=[of_x, of_w, None if bias is None else of_bias, None if residual is None else of_out],
        out_specs=of_out,
        out_shape=jax.ShapeDtypeStruct((leaves, m, outputs), out_dtype),
        scratch_shapes=[pltpu.VMEM((parts, rows, sizes.columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=sizes.vmem
        ),
        name="matmul_tpu",
        interpret=interpret,
    )(x, w, bias, residual)
