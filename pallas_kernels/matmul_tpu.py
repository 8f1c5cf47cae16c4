"""The matrix product's TPU body: one grid step adds one dot per row tile to a float32 sum in VMEM, in order along K."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.matmul_reference import dot, finish
from pallas_kernels.sizes import MatmulSizes

VMEM_LIMIT = 48 * 2**20  # bytes: above the compiler's own 16 MiB, below every generation's VMEM


def within(x: Array, first: Array, size: int) -> Array:
    """`x [_, depth]`, whose columns start at `first`, with zeros from column `size` on: past the end a block holds
    anything."""
    columns = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(columns < size, x, jnp.zeros_like(x))


def add_block(x_ref, w_ref, sum_ref, sizes: MatmulSizes, inputs: int) -> None:
    """sum_ref [parts, rows, columns] += the products of one block, one dot of fixed shape for each row tile and
    part."""
    k = pl.program_id(2)

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
    add_block(x_ref, w_ref, sum_ref, sizes, inputs)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        parts = range(w_ref.shape[0])
        bias = [] if bias_ref is None else [bias_ref[part][None] for part in parts]
        y = finish([sum_ref[part] for part in parts], bias, None if residual_ref is None else residual_ref[...])
        out_ref[...] = y.astype(out_ref.dtype)


def matmul_tpu(
    x: Float[Array, "M K"],
    w: Float[Array, "parts N K"],
    bias: Float[Array, "parts N"] | None,
    residual: Float[Array, "M N"] | None,
    sizes: MatmulSizes,
    out_dtype: jnp.dtype,
    *,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """The product by blocks. As many row tiles share a fetched block of weights as M has, up to the table's number."""
    (m, inputs), (parts, outputs, _) = x.shape, w.shape
    rows = sizes.rows * min(sizes.shared_tiles, pl.cdiv(m, sizes.rows))
    of_x = pl.BlockSpec((rows, sizes.depth), lambda i, j, k: (i, k))
    of_w = pl.BlockSpec((parts, sizes.columns, sizes.depth), lambda i, j, k: (0, j, k))
    of_bias = pl.BlockSpec((parts, sizes.columns), lambda i, j, k: (0, j))
    of_out = pl.BlockSpec((rows, sizes.columns), lambda i, j, k: (i, j))
    return pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, inputs=inputs),
        grid=(pl.cdiv(m, rows), pl.cdiv(outputs, sizes.columns), pl.cdiv(inputs, sizes.depth)),
        in_specs=[of_x, of_w, None if bias is None else of_bias, None if residual is None else of_out],
        out_specs=of_out,
        out_shape=jax.ShapeDtypeStruct((m, outputs), out_dtype),
        scratch_shapes=[pltpu.VMEM((parts, rows, sizes.columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name="matmul_tpu",
        interpret=interpret,
    )(x, w, bias, residual)
