"""The grouped product's TPU body: the visits, known before the kernel starts, name the blocks of weights to fetch."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul_reference import rows_of_visit, visits_of, without_rest
from pallas_kernels.matmul_reference import finish
from pallas_kernels.matmul_tpu import add_block
from pallas_kernels.sizes import MatmulSizes


def _kernel(tiles, experts, starts, ends, x_ref, w_ref, out_ref, sum_ref, *, sizes: MatmulSizes, inputs: int) -> None:
    add_block(pl.program_id(3), x_ref, w_ref, sum_ref, sizes, inputs)
    visit = pl.program_id(2)

    @pl.when(pl.program_id(3) == pl.num_programs(3) - 1)
    def _():
        y = finish([sum_ref[part] for part in range(w_ref.shape[0])], [], None).astype(out_ref.dtype)
        first_of_tile = (visit == 0) | (tiles[visit] != tiles[jnp.maximum(visit - 1, 0)])
        others = jnp.where(first_of_tile, jnp.zeros_like(y), out_ref[...])
        out_ref[...] = jnp.where(rows_of_visit(tiles[visit], sizes.rows, starts[visit], ends[visit]), y, others)


def grouped_matmul_tpu(
    x: Float[Array, "leaf M K"],
    w: Float[Array, "leaf E parts N K"],
    group_sizes: Int[Array, " E"],
    sizes: MatmulSizes,
    out_dtype: jnp.dtype,
    *,
    interpret: Any = False,
) -> Float[Array, "leaf M N"]:
    """The product leaf by leaf and visit by visit.

    The visits of a tile are consecutive, so its result stays in VMEM between them.
    Tiles that no expert visits are not written: all their rows are after the last group.
    """
    (leaves, m, inputs), (*_, parts, outputs, _) = x.shape, w.shape
    visits = visits_of(group_sizes, m, sizes.rows)
    of_x = pl.BlockSpec((None, sizes.rows, sizes.depth), lambda leaf, j, v, k, tiles, *_: (leaf, tiles[v], k))
    of_w = pl.BlockSpec(
        (None, None, parts, sizes.columns, sizes.depth),
        lambda leaf, j, v, k, _, experts, *__: (leaf, experts[v], 0, j, k),
    )
    of_out = pl.BlockSpec((None, sizes.rows, sizes.columns), lambda leaf, j, v, k, tiles, *_: (leaf, tiles[v], j))
    grid = (leaves, pl.cdiv(outputs, sizes.columns), visits.count, pl.cdiv(inputs, sizes.depth))
    out = pl.pallas_call(
        functools.partial(_kernel, sizes=sizes, inputs=inputs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=grid,
            in_specs=[of_x, of_w],
            out_specs=of_out,
            scratch_shapes=[pltpu.VMEM((parts, sizes.rows, sizes.columns), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((leaves, m, outputs), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=sizes.vmem
        ),
        name="grouped_matmul_tpu",
        interpret=interpret,
    )(*visits[:4], x, w)
    return without_rest(out, group_sizes)
