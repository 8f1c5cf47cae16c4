"""A small matrix product for a GPU (Pallas, Triton), cut as the design wants it: to see what its tiles do to bits.

Swapped, one dot is [columns, depth] of weights times [depth, rows] of rows: of a Hopper's wgmma the weights are the
side that is always 64, and the rows the side that may be 16, 64 or 128. Rows first, 16 rows are an mma instead.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.matmul_reference import dot

WIDEST = 128  # rows


@dataclasses.dataclass(frozen=True)
class Cut:
    """One dot's shape and order, and how the kernel is compiled."""

    rows: int
    is_swapped: bool = True
    columns: int = 64
    depth: int = 64
    warps: int = 4
    stages: int = 4


def product(x: Float[Array, "M K"], w: Float[Array, "N K"], cut: Cut, interpret: bool = False) -> Float[Array, "M N"]:
    """x @ w.T in float32, the dots added in order along K. N and K are multiples of the cut's columns and depth."""
    (m, _), (n, _) = x.shape, w.shape
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_kernel, cut=cut, interpret=interpret),
        grid=(n // cut.columns, pl.cdiv(m, cut.rows)),
        in_specs=[whole, whole],
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct((m, n), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        name="swapped_product" if cut.is_swapped else "straight_product",
        interpret=interpret,
    )(x, w)


def _kernel(x_ref, w_ref, out_ref, *, cut: Cut, interpret: bool) -> None:
    column, row = pl.program_id(0) * cut.columns, pl.program_id(1) * cut.rows
    rows, columns = pl.ds(row, cut.rows), pl.ds(column, cut.columns)
    inside = (row + jnp.arange(cut.rows) < x_ref.shape[0])[:, None]

    def step(i, total):
        depth = pl.ds(i * cut.depth, cut.depth)
        mask = jnp.broadcast_to(inside, (cut.rows, cut.depth))
        x = plgpu.load(x_ref.at[rows, depth], mask=mask, other=0)
        return total + _dot(x, w_ref[columns, depth], cut, interpret)

    shape = (cut.columns, cut.rows) if cut.is_swapped else (cut.rows, cut.columns)
    total = jax.lax.fori_loop(0, x_ref.shape[1] // cut.depth, step, jnp.zeros(shape, jnp.float32))
    y = total.T if cut.is_swapped else total
    plgpu.store(out_ref.at[rows, columns], y, mask=jnp.broadcast_to(inside, y.shape))


def _dot(x: Array, w: Array, cut: Cut, interpret: bool) -> Array:
    """The dot in the cut's order. A CPU's depends on the number of rows, so interpreted it always has WIDEST."""
    if interpret:
        x = jnp.pad(x, ((0, WIDEST - cut.rows), (0, 0)))
        return dot(w, x)[:, : cut.rows] if cut.is_swapped else dot(x, w)[: cut.rows]
    return dot(w, x) if cut.is_swapped else dot(x, w)
