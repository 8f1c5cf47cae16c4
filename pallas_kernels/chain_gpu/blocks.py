"""What all of the chain's kernels read and compute with: masked blocks, and the transposed dot."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels.matmul_reference import dot

MOST_ROWS = 128  # of a dot


def new(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def by_columns(w: Array, x: Array, interpret: bool) -> Array:
    """Weights `[columns, depth]` times rows `[rows, depth]`, as [columns, rows] in float32.

    A CPU's dot depends on the number of rows, so the interpreter computes one size.
    """
    if not interpret:
        return dot(w, x)
    rows = x.shape[0]
    return dot(w, jnp.pad(x, ((0, MOST_ROWS - rows), (0, 0))))[:, :rows]


def over_keys(x: Array, interpret: bool) -> Array:
    """The sum of each row's column of [keys, rows]; of one size in the interpreter, as in `by_columns`."""
    rows = x.shape[1]
    return jnp.pad(x, ((0, 0), (0, MOST_ROWS - rows))).sum(0)[:rows] if interpret else x.sum(0)


def inside(start: Any, size: int, limit: int) -> Array | None:
    """Which of `size` places from `start` on lie before the limit; None where all do, whatever `start` is."""
    return None if limit % size == 0 else start + jnp.arange(size) < limit


def both(rows: Array | None, columns: Array | None, shape: tuple[int, int]) -> Array | None:
    """The mask of a block of rows and columns; None where neither has one."""
    masks = [rows if rows is None else rows[:, None], columns if columns is None else columns[None]]
    spread = [jnp.broadcast_to(mask, shape) for mask in masks if mask is not None]
    return functools.reduce(jnp.logical_and, spread) if spread else None


def load(ref: Any, mask: Array | None) -> Array:
    """What the mask leaves, and 0."""
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0)
