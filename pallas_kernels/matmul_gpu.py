"""The matrix product's GPU body (Triton, Hopper and later).

Along K the order is: dots of one depth added within a split, then the splits' sums added in order. With few rows there are fewer tiles than
processors, and the splits of one tile run side by side, their sums added by a second kernel: the same additions, other hands.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.matmul_reference import dot, finish
from pallas_kernels.sizes import MatmulSizes

PROCESSORS = 132  # of an H100; a grid with fewer programs leaves some idle


def load_block(
    ref, index: tuple, starts: tuple[Array | int, Array | int], shape: tuple[int, int], limits: tuple[int, int]
) -> Array:
    """A [rows, columns] block of `ref[index]`; what lies behind the limits is zero and not read."""
    inside = [start + jnp.arange(size) < limit for start, size, limit in zip(starts, shape, limits, strict=True)]
    window = tuple(pl.ds(start, size) for start, size in zip(starts, shape, strict=True))
    return plgpu.load(ref.at[(*index, *window)], mask=inside[0][:, None] & inside[1][None, :], other=0)


def split_sums(
    x_ref, w_ref, w_index: tuple, row: Array, column: Array, split: Array, blocks: MatmulSizes, rows_end: int
) -> list[Array]:
    """The sums over one split of K, a [rows, columns] array for each of the weights' parts."""
    parts, outputs, inputs = w_ref.shape[-3:]

    def step(i, sums):
        start = split * blocks.split + i * blocks.depth
        x = load_block(x_ref, (), (row, start), (blocks.rows, blocks.depth), (rows_end, inputs))
        # numpy's integer: JAX's interpreter of kernels asks an index for its shape
        w = lambda part: load_block(
            w_ref, (*w_index, np.int32(part)), (column, start), (blocks.columns, blocks.depth), (outputs, inputs)
        )
        return [s + dot(x, w(part)) for part, s in enumerate(sums)]

    return jax.lax.fori_loop(0, blocks.split // blocks.depth, step, zeros(parts, blocks))


def zeros(parts: int, blocks: MatmulSizes) -> list[Array]:
    return [jnp.zeros((blocks.rows, blocks.columns), jnp.float32) for _ in range(parts)]


def _finish_tile(sums: list[Array], bias_ref, residual_ref, out_ref, row: Array, column: Array) -> None:
    (m, outputs), (rows, columns) = out_ref.shape, sums[0].shape
    bias = []
    if bias_ref is not None:
        bias = [
            load_block(bias_ref, (), (part, column), (1, columns), (len(sums), outputs)) for part in range(len(sums))
        ]
    residual = (
        None if residual_ref is None else load_block(residual_ref, (), (row, column), (rows, columns), (m, outputs))
    )
    inside = (row + jnp.arange(rows) < m)[:, None] & (column + jnp.arange(columns) < outputs)[None, :]
    y = finish(sums, bias, residual).astype(out_ref.dtype)
    plgpu.store(out_ref.at[pl.ds(row, rows), pl.ds(column, columns)], y, mask=inside)


def _whole(x_ref, w_ref, *refs, blocks: MatmulSizes, has_bias: bool, has_residual: bool) -> None:
    bias_ref, residual_ref, out_ref = _named(refs, has_bias, has_residual)
    row, column = pl.program_id(0) * blocks.rows, pl.program_id(1) * blocks.columns
    num_splits = pl.cdiv(x_ref.shape[1], blocks.split)

    def step(split, sums):
        return [
            s + one
            for s, one in zip(
                sums, split_sums(x_ref, w_ref, (), row, column, split, blocks, x_ref.shape[0]), strict=True
            )
        ]

    sums = jax.lax.fori_loop(0, num_splits, step, zeros(w_ref.shape[0], blocks))
    _finish_tile(sums, bias_ref, residual_ref, out_ref, row, column)


def _one_split(x_ref, w_ref, out_ref, *, blocks: MatmulSizes) -> None:
    row, column, split = pl.program_id(0) * blocks.rows, pl.program_id(1) * blocks.columns, pl.program_id(2)
    m, outputs = out_ref.shape[-2:]
    inside = (row + jnp.arange(blocks.rows) < m)[:, None] & (column + jnp.arange(blocks.columns) < outputs)[None, :]
    for part, total in enumerate(split_sums(x_ref, w_ref, (), row, column, split, blocks, m)):
        plgpu.store(
            out_ref.at[split, np.int32(part), pl.ds(row, blocks.rows), pl.ds(column, blocks.columns)],
            total,
            mask=inside,
        )


def _add_splits(partial_ref, *refs, blocks: MatmulSizes, has_bias: bool, has_residual: bool) -> None:
    bias_ref, residual_ref, out_ref = _named(refs, has_bias, has_residual)
    row, column = pl.program_id(0) * blocks.rows, pl.program_id(1) * blocks.columns
    num_splits, parts = partial_ref.shape[:2]

    def step(split, sums):
        one = lambda part: load_block(
            partial_ref, (split, np.int32(part)), (row, column), (blocks.rows, blocks.columns), out_ref.shape
        )
        return [s + one(part) for part, s in enumerate(sums)]

    sums = jax.lax.fori_loop(0, num_splits, step, zeros(parts, blocks))
    _finish_tile(sums, bias_ref, residual_ref, out_ref, row, column)


def _named(refs: tuple, has_bias: bool, has_residual: bool) -> tuple:
    return refs[0] if has_bias else None, refs[has_bias] if has_residual else None, refs[-1]


def matmul_gpu(
    x: Float[Array, "M K"],
    w: Float[Array, "parts N K"],
    bias: Float[Array, "parts N"] | None,
    residual: Float[Array, "M N"] | None,
    blocks: MatmulSizes,
    out_dtype: jnp.dtype,
    *,
    interpret: bool = False,
    side_by_side: bool | None = None,
) -> Float[Array, "M N"]:
    """The product by tiles. `side_by_side` runs the splits of K in parallel; by default where the tiles alone leave processors idle."""
    (m, inputs), (parts, outputs, _) = x.shape, w.shape
    tiles, num_splits = (pl.cdiv(m, blocks.rows), pl.cdiv(outputs, blocks.columns)), pl.cdiv(inputs, blocks.split)
    if side_by_side is None:
        side_by_side = num_splits > 1 and tiles[0] * tiles[1] < PROCESSORS
    extra = [a for a in (bias, residual) if a is not None]
    flags = dict(blocks=blocks, has_bias=bias is not None, has_residual=residual is not None)
    call = functools.partial(
        pl.pallas_call, interpret=interpret, compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3)
    )
    out = jax.ShapeDtypeStruct((m, outputs), out_dtype)
    if not side_by_side:
        return call(functools.partial(_whole, **flags), grid=tiles, out_shape=out, name="matmul_gpu")(x, w, *extra)
    partial = jax.ShapeDtypeStruct((num_splits, parts, m, outputs), jnp.float32)
    sums = call(
        functools.partial(_one_split, blocks=blocks),
        grid=(*tiles, num_splits),
        out_shape=partial,
        name="matmul_gpu_splits",
    )(x, w)
    return call(functools.partial(_add_splits, **flags), grid=tiles, out_shape=out, name="matmul_gpu_sum")(sums, *extra)
