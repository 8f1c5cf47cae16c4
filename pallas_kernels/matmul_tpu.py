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
    """`x [_, depth]`, whose columns start at `first`, with zeros from column `size` on: a block behind the end holds anything."""
    columns = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(columns < size, x, jnp.zeros_like(x))


def add_block(x_ref, w_ref, sum_ref, blocks: MatmulSizes, inputs: int) -> None:
    """sum_ref [parts, rows, columns] += the products of one block, a dot of one fixed shape for each row tile and part."""
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    cut = (lambda x: x) if inputs % blocks.depth == 0 else lambda x: within(x, k * blocks.depth, inputs)
    for part in range(w_ref.shape[0]):
        w = cut(w_ref[part])
        for first in range(0, x_ref.shape[0], blocks.rows):
            rows = slice(first, first + blocks.rows)
            sum_ref[part, rows] += dot(cut(x_ref[rows]), w)


def _kernel(*refs, blocks: MatmulSizes, inputs: int, has_bias: bool, has_residual: bool) -> None:
    refs = list(refs)
    x_ref, w_ref = refs.pop(0), refs.pop(0)
    bias_ref = refs.pop(0) if has_bias else None
    residual_ref = refs.pop(0) if has_residual else None
    out_ref, sum_ref = refs
    add_block(x_ref, w_ref, sum_ref, blocks, inputs)

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
    blocks: MatmulSizes,
    out_dtype: jnp.dtype,
    *,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """The product by blocks. Row tiles that share a fetched block of weights: as many as M has, up to the table's."""
    (m, inputs), (parts, outputs, _) = x.shape, w.shape
    rows = blocks.rows * min(blocks.shared_tiles, pl.cdiv(m, blocks.rows))
    of_out = pl.BlockSpec((rows, blocks.columns), lambda i, j, k: (i, j))
    specs = [
        pl.BlockSpec((rows, blocks.depth), lambda i, j, k: (i, k)),
        pl.BlockSpec((parts, blocks.columns, blocks.depth), lambda i, j, k: (0, j, k)),
    ]
    specs += [] if bias is None else [pl.BlockSpec((parts, blocks.columns), lambda i, j, k: (0, j))]
    specs += [] if residual is None else [of_out]
    kernel = functools.partial(
        _kernel, blocks=blocks, inputs=inputs, has_bias=bias is not None, has_residual=residual is not None
    )
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(m, rows), pl.cdiv(outputs, blocks.columns), pl.cdiv(inputs, blocks.depth)),
        in_specs=specs,
        out_specs=of_out,
        out_shape=jax.ShapeDtypeStruct((m, outputs), out_dtype),
        scratch_shapes=[pltpu.VMEM((parts, rows, blocks.columns), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name="matmul_tpu",
        interpret=interpret,
    )(x, w, *(a for a in (bias, residual) if a is not None))
