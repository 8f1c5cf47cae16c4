"""What stands between products: the residual stream, and its norm for the next product."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.bfloat16_parts import bfloat16_parts
from pallas_kernels.chain_tpu.rows import block_rows, of_rows, over_live_rows, whole
from pallas_kernels.sums import by_tree


def total(
    x: Float[Array, "M D"],
    sums: Float[Array, "P M D"] | None,
    bias: Float[Array, " D"] | None,
    live: Int[Array, ""] | None = None,
    *,
    interpret: Any = False,
) -> Float[Array, "M D"]:
    """x with the sums and the bias added, sums by their tree. Rows after the live ones may hold anything."""
    rows, operands = _operands(x, sums, bias)
    out, of_out = jax.ShapeDtypeStruct(x.shape, jnp.float32), of_rows(rows, x.shape[1])
    return over_live_rows("chain_total", _total, rows, _count(x, live), operands, out, of_out, interpret=interpret)


def _operands(x: Array, sums: Array | None, bias: Array | None) -> tuple[int, list]:
    """(rows of a block, the operands and their blocks)."""
    width, bias = x.shape[1], None if bias is None else bias[None]
    rows = block_rows(x.shape[0], width * (1 if sums is None else sums.shape[0]))
    of_sums = None if sums is None else of_rows(rows, sums.shape[0], width, axis=1)
    return rows, [(x, of_rows(rows, width)), (sums, of_sums), (bias, whole(bias))]


def _count(x: Array, live: Int[Array, ""] | None) -> Int[Array, ""] | int:
    return x.shape[0] if live is None else live


def _added(rows, x_ref, sums_ref, bias_ref) -> Array:
    x = x_ref[rows]
    if sums_ref is not None:
        x = x + by_tree([sums_ref[part, rows] for part in range(sums_ref.shape[0])])
    return x if bias_ref is None else x + bias_ref[...].astype(jnp.float32)


def _total(rows, x_ref, sums_ref, bias_ref, out_ref) -> None:
    out_ref[rows] = _added(rows, x_ref, sums_ref, bias_ref)


def settle(
    x: Float[Array, "M D"],
    sums: Float[Array, "P M D"] | None,
    bias: Float[Array, " D"] | None,
    norm: Float[Array, " D"],
    eps: float,
    dtype: Any,
    parts: int = 1,
    live: Int[Array, ""] | None = None,
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "M D"], Float[Array, "parts M D"]]:
    """(x with the sums and the bias added as in `total`, its norm in `dtype`).

    With several parts the norm is as many numbers of `dtype` whose sum it is: the head's three bfloat16 parts.
    """
    (rows, operands), (m, width) = _operands(x, sums, bias), x.shape
    outs = jax.ShapeDtypeStruct((m, width), jnp.float32), jax.ShapeDtypeStruct((parts, m, width), dtype)
    of_outs = of_rows(rows, width), of_rows(rows, parts, width, axis=1)
    operands.append((norm[None], whole(norm[None])))
    body, count = functools.partial(_settle, eps=eps), _count(x, live)
    return over_live_rows("chain_settle", body, rows, count, operands, outs, of_outs, interpret=interpret)


def _settle(rows, x_ref, sums_ref, bias_ref, norm_ref, total_ref, out_ref, *, eps: float) -> None:
    x = _added(rows, x_ref, sums_ref, bias_ref)
    total_ref[rows] = x
    mean = jnp.sum(x * x, axis=1, keepdims=True) / x.shape[1]
    y = x * jax.lax.rsqrt(mean + eps) * norm_ref[...].astype(jnp.float32)
    for number, part in enumerate(bfloat16_parts(y, out_ref.shape[0])):
        out_ref[number, rows] = part.astype(out_ref.dtype)
