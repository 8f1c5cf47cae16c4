"""The matrix product's GPU body (Triton, Hopper and later).

Along K the dots of one depth are added within a split, then the sums of the splits are added in order. With few rows
there are fewer tiles than processors; then the splits of a tile run side by side, and a second kernel makes the same
additions of their sums in the same order.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.matmul_reference import dot, finish
from pallas_kernels.sizes import PROCESSORS, MatmulSizes


def load_block(
    ref, index: tuple, starts: tuple[Array | int, Array | int], shape: tuple[int, int], limits: tuple[int, int]
) -> Array:
    """A [rows, columns] block of `ref[index]`; what lies past the limits is not read, and 0."""
    inside = [start + jnp.arange(size) < limit for start, size, limit in zip(starts, shape, limits, strict=True)]
    window = tuple(pl.ds(start, size) for start, size in zip(starts, shape, strict=True))
    return plgpu.load(ref.at[(*index, *window)], mask=inside[0][:, None] & inside[1][None, :], other=0)


def split_sums(
    x_ref, w_ref, w_index: tuple, row: Array, column: Array, split: Array, sizes: MatmulSizes, rows_end: int
) -> list[Array]:
    """The sums over one split of K, a [rows, columns] array for each of the weights' parts."""
    parts, outputs, inputs = w_ref.shape[-3:]
    limits, shape = (outputs, inputs), (sizes.columns, sizes.depth)

    def step(i, sums):
        start = split * sizes.split + i * sizes.depth
        x = load_block(x_ref, (), (row, start), (sizes.rows, sizes.depth), (rows_end, inputs))
        # numpy's integer, because JAX's interpreter of kernels asks an index for its shape
        indices = [(*w_index, np.int32(part)) for part in range(parts)]
        products = (dot(x, load_block(w_ref, index, (column, start), shape, limits)) for index in indices)
        return added(sums, products)

    return jax.lax.fori_loop(0, sizes.split // sizes.depth, step, zeros(parts, sizes))


def added(sums: list[Array], more: Iterable[Array]) -> list[Array]:
    return [s + one for s, one in zip(sums, more, strict=True)]


def zeros(parts: int, sizes: MatmulSizes) -> list[Array]:
    return [jnp.zeros((sizes.rows, sizes.columns), jnp.float32) for _ in range(parts)]


def _finish_tile(sums: list[Array], bias_ref, residual_ref, out_ref, row: Array, column: Array) -> None:
    """`bias_ref` and `residual_ref` are None where the product has no such operand."""
    limits, (rows, columns), parts = out_ref.shape, sums[0].shape, len(sums)
    bias, residual = [], None
    if bias_ref is not None:
        bias = [load_block(bias_ref, (), (part, column), (1, columns), (parts, limits[1])) for part in range(parts)]
    if residual_ref is not None:
        residual = load_block(residual_ref, (), (row, column), (rows, columns), limits)
    inside = _inside(row, column, (rows, columns), limits)
    y = finish(sums, bias, residual).astype(out_ref.dtype)
    plgpu.store(out_ref.at[pl.ds(row, rows), pl.ds(column, columns)], y, mask=inside)


def _inside(row: Array, column: Array, shape: tuple[int, int], limits: tuple[int, int]) -> Array:
    """Which places of a tile are in the result."""
    rows = (row + jnp.arange(shape[0]) < limits[0])[:, None]
    return rows & (column + jnp.arange(shape[1]) < limits[1])[None, :]


def _place(sizes: MatmulSizes) -> tuple[Array, Array]:
    """(first row, first column) of this program's tile."""
    return pl.program_id(0) * sizes.rows, pl.program_id(1) * sizes.columns


def _whole(x_ref, w_ref, bias_ref, residual_ref, out_ref, *, sizes: MatmulSizes) -> None:
    row, column = _place(sizes)
    num_splits = pl.cdiv(x_ref.shape[1], sizes.split)

    def step(split, sums):
        return added(sums, split_sums(x_ref, w_ref, (), row, column, split, sizes, x_ref.shape[0]))

    sums = jax.lax.fori_loop(0, num_splits, step, zeros(w_ref.shape[0], sizes))
    _finish_tile(sums, bias_ref, residual_ref, out_ref, row, column)


def _one_split(x_ref, w_ref, out_ref, *, sizes: MatmulSizes) -> None:
    (row, column), split = _place(sizes), pl.program_id(2)
    limits = out_ref.shape[-2:]
    inside = _inside(row, column, (sizes.rows, sizes.columns), limits)
    tile = pl.ds(row, sizes.rows), pl.ds(column, sizes.columns)
    for part, total in enumerate(split_sums(x_ref, w_ref, (), row, column, split, sizes, limits[0])):
        plgpu.store(out_ref.at[split, np.int32(part), *tile], total, mask=inside)


def _add_splits(partial_ref, bias_ref, residual_ref, out_ref, *, sizes: MatmulSizes) -> None:
    row, column = _place(sizes)
    num_splits, parts = partial_ref.shape[:2]
    shape = sizes.rows, sizes.columns

    def step(split, sums):
        indices = [(split, np.int32(part)) for part in range(parts)]
        return added(sums, (load_block(partial_ref, i, (row, column), shape, out_ref.shape) for i in indices))

    sums = jax.lax.fori_loop(0, num_splits, step, zeros(parts, sizes))
    _finish_tile(sums, bias_ref, residual_ref, out_ref, row, column)


def matmul_gpu(
    x: Float[Array, "M K"],
    w: Float[Array, "parts N K"],
    bias: Float[Array, "parts N"] | None,
    residual: Float[Array, "M N"] | None,
    sizes: MatmulSizes,
    out_dtype: jnp.dtype,
    *,
    interpret: bool = False,
    side_by_side: bool | None = None,
) -> Float[Array, "M N"]:
    """The product by tiles. `side_by_side` runs the splits of K in parallel; by default where the tiles alone leave
    processors idle."""
    (m, inputs), (parts, outputs, _) = x.shape, w.shape
    tiles, num_splits = (pl.cdiv(m, sizes.rows), pl.cdiv(outputs, sizes.columns)), pl.cdiv(inputs, sizes.split)
    if side_by_side is None:
        side_by_side = num_splits > 1 and tiles[0] * tiles[1] < PROCESSORS
    parameters = plgpu.CompilerParams(num_warps=4, num_stages=3)

    def call(kernel, name: str, grid: tuple[int, ...], out_shape: jax.ShapeDtypeStruct, *operands):
        return pl.pallas_call(
            functools.partial(kernel, sizes=sizes),
            grid=grid,
            out_shape=out_shape,
            compiler_params=parameters,
            name=name,
            interpret=interpret,
        )(*operands)

    out = jax.ShapeDtypeStruct((m, outputs), out_dtype)
    if not side_by_side:
        return call(_whole, "matmul_gpu", tiles, out, x, w, bias, residual)
    partial = jax.ShapeDtypeStruct((num_splits, parts, m, outputs), jnp.float32)
    sums = call(_one_split, "matmul_gpu_splits", (*tiles, num_splits), partial, x, w)
    return call(_add_splits, "matmul_gpu_sum", tiles, out, sums, bias, residual)
