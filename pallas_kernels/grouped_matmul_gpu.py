"""The grouped product's GPU body (Triton): a program takes one visit of one block of outputs, and stores its own rows."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul_reference import visits_of, without_rest
from pallas_kernels.matmul_gpu import split_sums, zeros
from pallas_kernels.matmul_reference import finish
from pallas_kernels.sizes import MatmulSizes


def _kernel(tiles, experts, starts, ends, x_ref, w_ref, out_ref, *, blocks: MatmulSizes) -> None:
    visit = pl.program_id(0)
    row, column = tiles[visit] * blocks.rows, pl.program_id(1) * blocks.columns
    (m, inputs), outputs = x_ref.shape, out_ref.shape[1]

    def step(split, sums):
        return [
            s + one
            for s, one in zip(
                sums, split_sums(x_ref, w_ref, (experts[visit],), row, column, split, blocks, m), strict=True
            )
        ]

    sums = jax.lax.fori_loop(0, pl.cdiv(inputs, blocks.split), step, zeros(w_ref.shape[1], blocks))
    rows, columns = row + jnp.arange(blocks.rows), column + jnp.arange(blocks.columns)
    mine = ((rows >= starts[visit]) & (rows < ends[visit]))[:, None] & (columns < outputs)[None, :]
    plgpu.store(
        out_ref.at[pl.ds(row, blocks.rows), pl.ds(column, blocks.columns)],
        finish(sums, [], None).astype(out_ref.dtype),
        mask=mine,
    )


def grouped_matmul_gpu(
    x: Float[Array, "M K"],
    w: Float[Array, "E parts N K"],
    group_sizes: Int[Array, " E"],
    blocks: MatmulSizes,
    out_dtype: jnp.dtype,
    *,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """The product visit by visit, all side by side: two visits of a tile store different rows."""
    (m, _), outputs = x.shape, w.shape[2]
    visits = visits_of(group_sizes, m, blocks.rows)
    out = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks),
        grid=(visits.tiles.shape[0], pl.cdiv(outputs, blocks.columns)),
        out_shape=jax.ShapeDtypeStruct((m, outputs), out_dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        name="grouped_matmul_gpu",
        interpret=interpret,
    )(*visits[:4], x, w)
    return without_rest(out, group_sizes)
