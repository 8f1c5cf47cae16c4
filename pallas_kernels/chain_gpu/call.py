"""How the chain's kernels are called, and what all of them read and write with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

ZERO = np.int32(0)  # numpy's integer, because the interpreter of kernels asks an index for its shape
MOST_ROWS = 128  # of a dot


def call(
    name: str,
    kernel: Callable,
    grid: tuple[int, ...],
    out: Any,
    *inputs: Any,
    interpret: bool,
    warps: int = 4,
    stages: int = 2,
    aliases: dict[int, int] | None = None,
) -> Any:
    """`kernel(*refs of the inputs, refs of the outputs)` for every program of the grid. Refs are of whole arrays."""
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=jax.tree.map(lambda _: whole, inputs),
        out_specs=jax.tree.map(lambda _: whole, out),
        out_shape=out,
        name=name,
        input_output_aliases=aliases or {},
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
    )(*inputs)


def new(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def by_columns(w: Array, x: Array, interpret: bool) -> Array:
    """Weights `[columns, depth]` times rows `[rows, depth]`, as [columns, rows] in float32.

    A CPU's dot depends on the number of rows, so the interpreter computes one size.
    """
    if not interpret:
        return _dot(w, x)
    rows = x.shape[0]
    return _dot(w, jnp.pad(x, ((0, MOST_ROWS - rows), (0, 0))))[:, :rows]


def _dot(a: Array, b: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision, jnp.float32)


def inside(start: Any, size: int, limit: int) -> Array | None:
    """Which of `size` places from `start` on lie before the limit; None where all do, whatever `start` is."""
    return None if limit % size == 0 else start + jnp.arange(size) < limit


def both(rows: Array | None, columns: Array | None, shape: tuple[int, int]) -> Array | None:
    """The mask of a block of rows and columns."""
    masks = [mask for mask in (None if rows is None else rows[:, None], None if columns is None else columns[None])]
    known = [jnp.broadcast_to(mask, shape) for mask in masks if mask is not None]
    return None if not known else known[0] if len(known) == 1 else known[0] & known[1]


def load(ref: Any, mask: Array | None) -> Array:
    """What the mask leaves, and 0."""
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0)


def power_of_two(size: int) -> int:
    """Triton's arrays have such sizes only."""
    return 1 << (size - 1).bit_length()
