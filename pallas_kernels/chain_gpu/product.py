"""Products of rows with weights, computed transposed: [columns, depth] of weights times [depth, rows] of rows.

The weights are the side of which a wgmma takes 64, the rows the side of which it takes any multiple of 8: so 16, 64
and 128 rows run one family of instructions. Along K the dots of one depth are added within a split.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.chain_gpu.blocks import both, by_columns, inside, load, new
from pallas_kernels.chain_gpu.sizes import ChainSizes, row_tile, split_of, stages_of
from pallas_kernels.gpu_call import call
from pallas_kernels.numbers import cdiv, power_of_two
from pallas_kernels.pinned_math import silu
from pallas_kernels.sizes import PROCESSORS
from pallas_kernels.sums import in_order

SILU_COLUMNS = 512  # of one program


def outputs(
    x: Float[Array, "P M K"], w: Float[Array, "N K"], sizes: ChainSizes, *, interpret: bool = False
) -> Float[Array, "S M N"]:
    """The splits' partial sums of Σ_p x[p] @ w.T; one where the sum is finished. x has the weights' dtype.

    Of several parts the last is added first, so that the smallest numbers come first.
    """
    return _partial_sums(x, w[None], sizes, interpret)[0]


def finished(
    x: Float[Array, "P M K"], w: Float[Array, "N K"], sizes: ChainSizes, *, interpret: bool = False
) -> Float[Array, "M N"]:
    """As `outputs`, with all of K in one split, so that nothing is left to add: the head."""
    split = cdiv(w.shape[1], sizes.depth) * sizes.depth
    return _partial_sums(x, w[None], sizes, interpret, split)[0, 0]


def summed(
    x: Float[Array, "M leaf*K"], w: Float[Array, "leaf N K"], sizes: ChainSizes, *, interpret: bool = False
) -> Float[Array, "leaf S M N"]:
    """The splits' partial sums of each leaf's own columns of x times its w."""
    return _partial_sums(x[None], w, sizes, interpret)


def gated(
    x: Float[Array, "M K"], w: Float[Array, "leaf F2 K"], sizes: ChainSizes, *, interpret: bool = False
) -> Float[Array, "M leaf*F"]:
    """silu(gate) · up in the weights' dtype, by leaves' columns. A leaf has its gates, then its ups."""
    (leaves, both_parts, inputs), m = w.shape, x.shape[0]
    width, rows = both_parts // 2, row_tile(m)
    split, out = split_of(sizes, leaves * width, inputs), new((m, leaves * width), w.dtype)
    tiles = leaves, cdiv(width, sizes.columns), cdiv(m, rows)
    if cdiv(inputs, split) > 1 and math.prod(tiles) < PROCESSORS:
        sums = _partial_sums(x[None], w.reshape(1, -1, inputs), sizes, interpret, split)[0]
        columns = min(SILU_COLUMNS, power_of_two(width))
        silu_kernel = functools.partial(_silu, width=width, columns=columns)
        return call("chain_silu", silu_kernel, (m, leaves, cdiv(width, columns)), out, sums, interpret=interpret)
    kernel = functools.partial(_gated, sizes=sizes, rows=rows, split=split, interpret=interpret)
    how: dict[str, Any] = dict(interpret=interpret, warps=8 if rows == 128 else sizes.warps, stages=sizes.stages)
    return call("chain_gated", kernel, tiles, out, x[None], w.reshape(leaves, 2, width, inputs), **how)


def _partial_sums(x: Array, w: Array, sizes: ChainSizes, interpret: bool, split: int | None = None) -> Array:
    """x [P, M, leaf·K], w [leaf, N, K] -> [leaf, S, M, N]. Splits are programs of their own where tiles alone leave
    processors idle, and are added in turn otherwise: the same additions."""
    (_, m, _), (leaves, width, inputs) = x.shape, w.shape
    rows, split = row_tile(m), split or split_of(sizes, width, inputs)
    num_splits, tiles = cdiv(inputs, split), (cdiv(width, sizes.columns), cdiv(m, rows))
    apart = num_splits > 1 and leaves * tiles[0] * tiles[1] < PROCESSORS
    kernel = functools.partial(_sums, sizes=sizes, rows=rows, split=split, apart=apart, interpret=interpret)
    grid = *tiles, leaves * (num_splits if apart else 1)
    out = new((leaves, num_splits if apart else 1, m, width))
    stages = stages_of(sizes, x.shape[0] * rows, x.dtype.itemsize)
    how: dict[str, Any] = dict(interpret=interpret, warps=8 if rows == 128 else sizes.warps, stages=stages)
    return call("chain_product", kernel, grid, out, x, w, **how)


class Weights(NamedTuple):
    """`ref[index]`: Triton takes one index of a ref, so it is joined to the block's."""

    ref: Any
    index: tuple


def _sums(x_ref, w_ref, out_ref, *, sizes: ChainSizes, rows: int, split: int, apart: bool, interpret: bool) -> None:
    column, row, place = pl.program_id(0) * sizes.columns, pl.program_id(1) * rows, pl.program_id(2)
    num_splits = cdiv(w_ref.shape[-1], split)
    leaf, own = (place // num_splits, place % num_splits) if apart else (place, np.int32(0))
    how = dict(sizes=sizes, rows=rows, split=split, interpret=interpret)
    weights, first = [Weights(w_ref, (leaf,))], leaf * w_ref.shape[-1]
    of_split = functools.partial(_of_split, x_ref, first, weights, row, column, **how)
    (total,) = of_split(own) if apart else _in_turn(of_split, num_splits)
    _store(out_ref, (leaf, own), row, column, total, rows, sizes.columns)


def _gated(x_ref, w_ref, out_ref, *, sizes: ChainSizes, rows: int, split: int, interpret: bool) -> None:
    leaf, tile, row = pl.program_id(0), pl.program_id(1), pl.program_id(2) * rows
    (_, _, width, inputs), column = w_ref.shape, tile * sizes.columns
    how = dict(sizes=sizes, rows=rows, split=split, interpret=interpret)
    parts = [Weights(w_ref, (leaf, np.int32(part))) for part in range(2)]
    gate, up = _in_turn(functools.partial(_of_split, x_ref, 0, parts, row, column, **how), cdiv(inputs, split))
    _store(out_ref, (), row, column, silu(gate) * up, rows, sizes.columns, leaf * width, width)


def _silu(sums_ref, out_ref, *, width: int, columns: int) -> None:
    row, leaf, column = pl.program_id(0), pl.program_id(1), pl.program_id(2) * columns
    mask = inside(column, columns, width)

    def part(number: int) -> Array:
        window = pl.ds((2 * leaf + number) * width + column, columns)
        return in_order([load(sums_ref.at[np.int32(split), row, window], mask) for split in range(sums_ref.shape[0])])

    y = silu(part(0)) * part(1)
    plgpu.store(out_ref.at[row, pl.ds(leaf * width + column, columns)], y.astype(out_ref.dtype), mask=mask)


def _in_turn(of_split: Callable, num_splits: int) -> list[Array]:
    """The splits' sums, added in order. A sum that begins at +0 is never -0, so adding the first to +0 is exact."""
    if num_splits == 1:
        return of_split(np.int32(0))
    zeros = [jnp.zeros(x.shape, x.dtype) for x in jax.eval_shape(of_split, np.int32(0))]

    def add(split, totals):
        return [total + more for total, more in zip(totals, of_split(split), strict=True)]

    return jax.lax.fori_loop(0, num_splits, add, zeros)


def _of_split(
    x_ref,
    first,
    weights: list[Weights],
    row,
    column,
    split_index,
    *,
    sizes: ChainSizes,
    rows: int,
    split: int,
    interpret: bool,
) -> list[Float[Array, "columns rows"]]:
    """The sums over one split of K with each of the weights. The rows, from column `first` on, are read once."""
    (parts, m, _), (width, inputs) = x_ref.shape, weights[0].ref.shape[-2:]
    in_rows, in_columns = inside(row, rows, m), inside(column, sizes.columns, width)

    def step(i, totals):
        start = split_index * split + i * sizes.depth
        k, in_depth = pl.ds(start, sizes.depth), None
        if inputs % split:
            in_depth = start + jnp.arange(sizes.depth) < inputs
        mask = both(in_rows, in_depth, (rows, sizes.depth))
        cells = pl.ds(row, rows), pl.ds(first + start, sizes.depth)
        xs = [load(x_ref.at[(np.int32(part), *cells)], mask) for part in reversed(range(parts))]
        mask = both(in_columns, in_depth, (sizes.columns, sizes.depth))
        ws = [load(w.ref.at[(*w.index, pl.ds(column, sizes.columns), k)], mask) for w in weights]
        return [
            in_order([total, *(by_columns(w, x, interpret) for x in xs)]) for total, w in zip(totals, ws, strict=True)
        ]

    zeros = [jnp.zeros((sizes.columns, rows), jnp.float32) for _ in weights]
    return jax.lax.fori_loop(0, split // sizes.depth, step, zeros)


def _store(
    ref, index, row, column, y: Array, rows: int, columns: int, first: Any = 0, width: int | None = None
) -> None:
    """[columns, rows] as rows of `ref[index]`, from column `first` on, of the `width` that there are."""
    m, width = ref.shape[-2], width or ref.shape[-1]
    mask = both(inside(row, rows, m), inside(column, columns, width), (rows, columns))
    place = ref.at[(*index, pl.ds(row, rows), pl.ds(first + column, columns))]
    plgpu.store(place, y.T.astype(ref.dtype), mask=mask)
