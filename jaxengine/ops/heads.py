"""From a packed projection to the heads that attention takes: normalised, and rotated by position."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.ops.linear import by_leaf
from jaxengine.ops.live import Live
from jaxengine.ops.norm import rms_norm
from jaxengine.ops.regions import over_tiles
from jaxengine.ops.rope import cos_sin, rotate
from sharding.leaves import Leaves, spread


class PackedHeads(NamedTuple):
    """A projection's rows, and the norms of its queries and keys where the model has some."""

    rows: Any  # `[R, N]`, in the order of leaves: each has its queries, its keys, its values
    q_norm: Float[Array, " h"] | None
    k_norm: Float[Array, " h"] | None


Heads = tuple[Float[Array, "R H h"], Float[Array, "R K h"], Float[Array, "R K h"]]


def rotated_heads(
    model_config: ModelConfig, leaves: Leaves, packed: PackedHeads, positions: Int[Array, " R"], live: Live
) -> Heads:
    """Queries (float32), keys and values (the model's dtype) of the rows, one pinned region for each leaf.

    Differentiable. A leaf's part is compiled at one shape, however many leaves are here, and the gradients of the norms
    are added leaf by leaf: so neither has other bits where other devices have some of the leaves.
    """
    count = model_config.reduction_leaves
    body = functools.partial(_heads_of_tile, model_config.share(count))
    norms = [None if norm is None else spread(leaves.shared(norm), count) for norm in packed[1:]]

    def of_leaf(norms: Any, rows: Float[Array, "R N"]) -> Heads:
        return over_tiles(body, live.tile, norms, (rows, positions), live.count)

    if count == 1:
        return of_leaf(jax.tree.map(lambda norm: norm[0], norms), packed.rows)
    rows = by_leaf(packed.rows, count)
    _, heads = jax.lax.scan(lambda _, of: (None, of_leaf(*of)), None, (norms, rows))
    q, k, v = (x.swapaxes(0, 1).reshape(x.shape[1], -1, x.shape[-1]) for x in heads)
    return q, k, v


def _heads_of_tile(
    model_config: ModelConfig, norms: Sequence[Array | None], rows: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    """Those of one leaf."""
    (packed, positions), (q_norm, k_norm) = rows, norms
    queries, keys = model_config.num_attention_heads, model_config.held_key_value_heads
    heads = packed.reshape(packed.shape[0], -1, model_config.head_dim)
    q, k, v = jnp.split(heads, [queries, queries + keys], axis=1)
    if q_norm is not None and k_norm is not None:
        q = rms_norm(q, q_norm, model_config.rms_norm_eps)
        k = rms_norm(k, k_norm, model_config.rms_norm_eps)
    cos, sin = cos_sin(positions, model_config.rope, model_config.head_dim)
    dtype = model_config.dtype
    return rotate(q, cos, sin).astype(jnp.float32), rotate(k, cos, sin).astype(dtype), v.astype(dtype)
