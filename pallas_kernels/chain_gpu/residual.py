"""What stands between products: the residual stream, and its norm for the next product. One program a row."""

import functools

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.bfloat16_parts import bfloat16_parts
from pallas_kernels.chain_gpu.blocks import inside, load, new
from pallas_kernels.gpu_call import call
from pallas_kernels.numbers import power_of_two
from pallas_kernels.sums import by_tree, in_order


def embed(table: Float[Array, "V D"], ids: Int[Array, " M"], *, interpret: bool = False) -> Float[Array, "M D"]:
    """Rows of the table in float32."""
    return call("chain_embed", _embed, ids.shape, new((*ids.shape, table.shape[1])), table, ids, interpret=interpret)


def _embed(table_ref, ids_ref, out_ref) -> None:
    row, cells, mask = _row(table_ref)
    x = load(table_ref.at[ids_ref[row], cells], mask)
    plgpu.store(out_ref.at[row, cells], x.astype(jnp.float32), mask=mask)


def total(
    x: Float[Array, "M D"],
    sums: Float[Array, "leaf S M D"] | None,
    bias: Float[Array, " D"] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "M D"]:
    """x with the sums and the bias added: a leaf's splits in order, leaves by their tree."""
    return call("chain_total", _total, x.shape[:1], new(x.shape), x, sums, bias, interpret=interpret)


def _total(x_ref, sums_ref, bias_ref, out_ref) -> None:
    row, cells, mask = _row(x_ref)
    plgpu.store(out_ref.at[row, cells], _added(x_ref, sums_ref, bias_ref, row, cells, mask), mask=mask)


def _row(x_ref) -> tuple:
    """(this program's row, its columns, which of them there are)."""
    width = x_ref.shape[1]
    return pl.program_id(0), pl.ds(0, power_of_two(width)), inside(0, power_of_two(width), width)


def _added(x_ref, sums_ref, bias_ref, row, cells, mask: Array | None) -> Array:
    x = load(x_ref.at[row, cells], mask)
    if sums_ref is not None:
        x = x + over_leaves(sums_ref, row, cells, mask)
    return x if bias_ref is None else x + load(bias_ref.at[cells], mask).astype(jnp.float32)


def settle(
    x: Float[Array, "M D"],
    sums: Float[Array, "leaf S M D"] | None,
    bias: Float[Array, " D"] | None,
    norm: Float[Array, " D"],
    eps: float,
    dtype: jnp.dtype,
    parts: int = 1,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "M D"], Float[Array, "P M D"]]:
    """(x with the sums and the bias added as in `total`, its norm in `dtype`).

    With several parts the norm is as many numbers of `dtype` whose sum it is: the head's three bfloat16 parts.
    """
    m, width = x.shape
    out = new((m, width)), new((parts, m, width), dtype)
    kernel = functools.partial(_settle, eps=eps)
    return call("chain_settle", kernel, (m,), out, x, sums, bias, norm, interpret=interpret)


def _settle(x_ref, sums_ref, bias_ref, norm_ref, total_ref, out_ref, *, eps: float) -> None:
    row, cells, mask = _row(x_ref)
    x = _added(x_ref, sums_ref, bias_ref, row, cells, mask)
    plgpu.store(total_ref.at[row, cells], x, mask=mask)
    scale = load(norm_ref.at[cells], mask).astype(jnp.float32)
    y = x * (1.0 / jnp.sqrt(jnp.sum(x * x) / x_ref.shape[1] + eps)) * scale
    for number, part in enumerate(bfloat16_parts(y, out_ref.shape[0])):
        plgpu.store(out_ref.at[np.int32(number), row, cells], part.astype(out_ref.dtype), mask=mask)


def over_leaves(sums_ref, row, cells, mask: Array | None) -> Array:
    """A row of [leaf, S, M, N]: a leaf's splits in order, then leaves as ((0 + 1) + (2 + 3)) + …"""
    leaves, splits = sums_ref.shape[:2]
    totals = [
        in_order([load(sums_ref.at[np.int32(leaf), np.int32(split), row, cells], mask) for split in range(splits)])
        for leaf in range(leaves)
    ]
    return by_tree(totals)
