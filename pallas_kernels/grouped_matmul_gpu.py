"""The grouped product's GPU body (Triton): a program computes one visit and block of outputs, and stores its own
rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul_reference import visits_of, without_rest
from pallas_kernels.matmul_gpu import added, split_sums, zeros
from pallas_kernels.matmul_reference import finish
from pallas_kernels.sizes import MatmulSizes


def _kernel(tiles, experts, starts, ends, x_ref, w_ref, out_ref, *, sizes: MatmulSizes) -> None:
    visit = pl.program_id(0)
    row, column = tiles[visit] * sizes.rows, pl.program_id(1) * sizes.columns
    (m, inputs), outputs = x_ref.shape, out_ref.shape[1]

    def step(split, sums):
        return added(sums, split_sums(x_ref, w_ref, (experts[visit],), row, column, split, sizes, m))

    sums = jax.lax.fori_loop(0, pl.cdiv(inputs, sizes.split), step, zeros(w_ref.shape[1], sizes))
    rows, columns = row + jnp.arange(sizes.rows), column + jnp.arange(sizes.columns)
    mine = ((rows >= starts[visit]) & (rows < ends[visit]))[:, None] & (columns < outputs)[None, :]
    y = finish(sums, [], None).astype(out_ref.dtype)
    plgpu.store(out_ref.at[pl.ds(row, sizes.rows), pl.ds(column, sizes.columns)], y, mask=mine)


def grouped_matmul_gpu(
    x: Float[Array, "M K"],
    w: Float[Array, "E parts N K"],
    group_sizes: Int[Array, " E"],
    sizes: MatmulSizes,
    out_dtype: jnp.dtype,
    *,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """The product, all visits side by side, because two visits of a tile store different rows."""
    (m, _), outputs = x.shape, w.shape[2]
    sizes = sizes if sizes.split else dataclasses.replace(sizes, split=sizes.depth)  # the interpreter's table has none
    visits = visits_of(group_sizes, m, sizes.rows)
    out = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes),
        grid=(visits.tiles.shape[0], pl.cdiv(outputs, sizes.columns)),
        out_shape=jax.ShapeDtypeStruct((m, outputs), out_dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        name="grouped_matmul_gpu",
        interpret=interpret,
    )(*visits[:4], x, w)
    return without_rest(out, group_sizes)
