"""Grids over live rows, and the tiles of rows in which everything but products is computed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from pallas_kernels.numbers import cdiv
from pallas_kernels.tiles import tiles_of

SUB_ROWS = 16  # a packed tile of bfloat16
BLOCK_BYTES = 2**20  # of a block's widest array: some ten such arrays, fetched and in use, fit in every VMEM
MOST_ROWS = 256  # of a block
VMEM_LIMIT = 48 * 2**20  # three quarters of the smallest generation's


def block_rows(num_rows: int, width: int) -> int:
    """Rows of one grid step, for float32 rows of that width; free, because arithmetic is done by SUB_ROWS."""
    fit = max(1, min(BLOCK_BYTES // (4 * width * SUB_ROWS), MOST_ROWS // SUB_ROWS, cdiv(num_rows, SUB_ROWS)))
    return fit * SUB_ROWS


def over_live_rows(
    name: str,
    body: Callable[..., None],
    rows: int,
    live: Int[Array, ""] | int,
    operands: list[tuple[Any, pl.BlockSpec | None]],
    outs: Any,
    out_specs: Any,
    *,
    interpret: Any,
) -> Any:
    """A kernel with a grid step for every `rows` rows of which one is live.

    `body(slice of SUB_ROWS rows of the block, *refs of the operands, *refs of the outputs)` is called for every such
    slice with a live row; other rows of the outputs are not written. An operand may be None.
    """

    def kernel(live_ref, *refs) -> None:
        count = jnp.minimum(live_ref[0] - pl.program_id(0) * rows, rows)

        def step(i, _):
            body(pl.ds(pl.multiple_of(i * SUB_ROWS, SUB_ROWS), SUB_ROWS), *refs)
            return 0

        jax.lax.fori_loop(0, tiles_of(count, SUB_ROWS), step, 0)

    arrays, specs = zip(*operands, strict=True)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(tiles_of(live, rows),), in_specs=list(specs), out_specs=out_specs
        ),
        out_shape=outs,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM_LIMIT),
        name=name,
        interpret=interpret,
    )(jnp.full(1, live, jnp.int32), *arrays)


def of_rows(rows: int, *shape: int, axis: int = 0) -> pl.BlockSpec:
    """A block of `rows` rows along an axis, and all of the other axes, whose sizes are `shape`."""

    def index(i, _):
        return tuple(i if at == axis else 0 for at in range(len(shape) + 1))

    return pl.BlockSpec((*shape[:axis], rows, *shape[axis:]), index)


def whole(x: Array | None) -> pl.BlockSpec | None:
    """All of x, at every grid step."""
    return None if x is None else pl.BlockSpec(x.shape, lambda i, _: (0,) * x.ndim)
