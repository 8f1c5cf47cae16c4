"""From a packed projection to the heads that attention takes: normalised, and rotated by position."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.ops.live import Live
from jaxengine.ops.norm import rms_norm
from jaxengine.ops.regions import over_tiles
from jaxengine.ops.rope import cos_sin, rotate


class PackedHeads(NamedTuple):
    """A projection's rows, and the norms of its queries and keys where the model has some."""

    rows: Any  # `[R, N]`, in the order of leaves: each has its queries, its keys, its values
    q_norm: Float[Array, " h"] | None
    k_norm: Float[Array, " h"] | None


Heads = tuple[Float[Array, "R H h"], Float[Array, "R K h"], Float[Array, "R K h"]]


def rotated_heads(model_config: ModelConfig, packed: PackedHeads, positions: Int[Array, " R"], live: Live) -> Heads:
    """Queries (float32), keys and values (the model's dtype) of the rows, as one pinned region. Differentiable."""
    body = functools.partial(_heads_of_tile, model_config)
    return over_tiles(body, live.tile, packed[1:], (packed.rows, positions), live.count)


def _heads_of_tile(
    model_config: ModelConfig, norms: tuple[Array | None, Array | None], rows: tuple[Array, Array]
) -> Heads:
    (packed, positions), (q_norm, k_norm) = rows, norms
    q, k, v = _split(model_config, packed)
    if q_norm is not None and k_norm is not None:
        q = rms_norm(q, q_norm, model_config.rms_norm_eps)
        k = rms_norm(k, k_norm, model_config.rms_norm_eps)
    cos, sin = cos_sin(positions, model_config.rope, model_config.head_dim)
    dtype = model_config.dtype
    return rotate(q, cos, sin).astype(jnp.float32), rotate(k, cos, sin).astype(dtype), v.astype(dtype)


def _split(model_config: ModelConfig, packed: Float[Array, "t N"]) -> list[Float[Array, "t heads h"]]:
    """Queries, keys and values of all leaves' heads. A leaf's columns are its queries, its keys, its values."""
    leaves, h = model_config.reduction_leaves, model_config.head_dim
    queries = model_config.num_attention_heads // leaves
    keys = model_config.num_key_value_heads // leaves
    by_leaf = packed.reshape(packed.shape[0], leaves, -1, h)
    parts = jnp.split(by_leaf, [queries, queries + keys], axis=2)
    return [part.reshape(packed.shape[0], -1, h) for part in parts]
