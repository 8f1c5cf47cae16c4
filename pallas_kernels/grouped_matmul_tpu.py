"""The grouped product's TPU body: which block of weights is fetched follows from the visits, known before the kernel starts."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul_reference import rows_of_visit, visits_of, without_rest
from pallas_kernels.matmul_reference import finish
from pallas_kernels.matmul_tpu import VMEM_LIMIT, add_block
from pallas_kernels.sizes import MatmulSizes


def _kernel(tiles, experts, starts, ends, x_ref, w_ref, out_ref, sum_ref, *, blocks: MatmulSizes, inputs: int) -> None:
    add_block(x_ref, w_ref, sum_ref, blocks, inputs)
    visit = pl.program_id(1)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        y = finish([sum_ref[part] for part in range(w_ref.shape[0])], [], None).astype(out_ref.dtype)
        first_of_tile = (visit == 0) | (tiles[visit] != tiles[jnp.maximum(visit - 1, 0)])
        others = jnp.where(first_of_tile, jnp.zeros_like(y), out_ref[...])
        out_ref[...] = jnp.where(rows_of_visit(tiles[visit], blocks.rows, starts[visit], ends[visit]), y, others)


def grouped_matmul_tpu(
    x: Float[Array, "M K"],
    w: Float[Array, "E parts N K"],
    group_sizes: Int[Array, " E"],
    blocks: MatmulSizes,
    out_dtype: jnp.dtype,
    *,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """The product visit by visit. Visits of one tile follow each other, and its result stays in VMEM in between."""
    (m, inputs), (_, parts, outputs, _) = x.shape, w.shape
    visits = visits_of(group_sizes, m, blocks.rows)
    grid = (pl.cdiv(outputs, blocks.columns), visits.tiles.shape[0], pl.cdiv(inputs, blocks.depth))
    out = pl.pallas_call(
        functools.partial(_kernel, blocks=blocks, inputs=inputs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=grid,
            in_specs=[
                pl.BlockSpec((blocks.rows, blocks.depth), lambda j, v, k, tiles, *_: (tiles[v], k)),
                pl.BlockSpec(
                    (None, parts, blocks.columns, blocks.depth), lambda j, v, k, _, experts, *__: (experts[v], 0, j, k)
                ),
            ],
            out_specs=pl.BlockSpec((blocks.rows, blocks.columns), lambda j, v, k, tiles, *_: (tiles[v], j)),
            scratch_shapes=[pltpu.VMEM((parts, blocks.rows, blocks.columns), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((m, outputs), out_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name="grouped_matmul_tpu",
        interpret=interpret,
    )(*visits[:4], x, w)
    return without_rest(out, group_sizes)
