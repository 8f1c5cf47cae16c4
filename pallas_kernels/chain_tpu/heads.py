"""From the packed projection to heads: bias, norm and rotation; then the write of keys and values."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.chain_tpu.rows import block_rows, of_rows, over_live_rows, whole
from pallas_kernels.kv_write_tpu import write_rows
from pallas_kernels.packed_heads import KEYS, QUERIES, VALUES, Geometry, Projection
from pallas_kernels.paged_attention_inputs import PagedBlocks
from pallas_kernels.pinned_math import LOG2_E


def rotate_and_write(
    geometry: Geometry,
    projection: Projection,
    keys: Array,
    values: Array,
    blocks: PagedBlocks,
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "R H h"], Array, Array]:
    """(queries, ready for `attend`: scaled to base 2 and rounded; the pools `[P, K, p, width]` with the blocks' rows
    written, in place).

    Row i is token i % r of block i // r; rows of blocks from `num_blocks` on may hold anything and write nothing.
    """
    g, (num_rows, _), width = geometry, projection.sums.shape[1:], keys.shape[3]
    r = num_rows // blocks.starts.shape[0]
    positions = (blocks.starts[:, None] + jnp.arange(r, dtype=jnp.int32)).reshape(-1, 1)
    widths = g.queries * width, 2 * g.keys * width
    rows = block_rows(num_rows, sum(widths))
    vectors = (None if x is None else x[None] for x in projection[1:])
    operands = [(x, of_rows(rows, x.shape[1])) for x in (projection.sums[0], positions)]
    operands += [(x, whole(x)) for x in vectors]
    q, new = over_live_rows(
        "chain_heads",
        functools.partial(_heads, g=g, width=width),
        rows,
        blocks.num_blocks * r,
        operands,
        [jax.ShapeDtypeStruct((num_rows, size), keys.dtype) for size in widths],
        [of_rows(rows, size) for size in widths],
        interpret=interpret,
    )
    pools = write_rows(keys, values, new, blocks, interpret=interpret)
    return q.reshape(num_rows, g.queries, width)[..., : g.width], *pools


def _heads(
    rows, packed_ref, positions_ref, bias_ref, q_norm_ref, k_norm_ref, frequencies_ref, q_ref, new_ref, *, g, width
) -> None:
    """Queries; keys, then values. Each head is as wide as pages."""
    angles = positions_ref[rows].astype(jnp.float32) * frequencies_ref[...]
    cos, sin = jnp.cos(angles) * g.rope_factor, jnp.sin(angles) * g.rope_factor

    def packed(kind: int, own: int) -> Float[Array, "n h"]:
        at = slice(g.column(kind, own) * g.width, (g.column(kind, own) + 1) * g.width)
        x = packed_ref[rows, at]
        return x if bias_ref is None else x + bias_ref[:, at].astype(jnp.float32)

    def rotated(x: Float[Array, "n h"], norm_ref) -> Float[Array, "n h"]:
        if norm_ref is not None:
            mean = jnp.sum(x * x, axis=1, keepdims=True) / g.width
            x = x * jax.lax.rsqrt(mean + g.eps) * norm_ref[...].astype(jnp.float32)
        a, b = x[:, : g.width // 2], x[:, g.width // 2 :]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)

    def put(ref, place: int, x: Float[Array, "n h"]) -> None:
        first = place * width
        ref[rows, first : first + g.width] = x.astype(ref.dtype)
        if width > g.width:
            rest = jnp.zeros((x.shape[0], width - g.width), ref.dtype)
            ref[rows, first + g.width : first + width] = rest

    for own in range(g.queries):
        put(q_ref, own, rotated(packed(QUERIES, own), q_norm_ref) * (LOG2_E * g.width**-0.5))
    for own in range(g.keys):
        put(new_ref, own, rotated(packed(KEYS, own), k_norm_ref))
        put(new_ref, g.keys + own, packed(VALUES, own))
