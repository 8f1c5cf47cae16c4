"""The KV write's XLA twin: one scatter."""

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.paged_attention_inputs import PagedBlocks


def kv_write_reference(keys: Array, values: Array, k: Array, v: Array, blocks: PagedBlocks) -> tuple[Array, Array]:
    """Pools `[P, K, p, h]` with the blocks' `[B, r, K, h]` written; tokens past a count go to no page."""
    num_pages, _, page_size, _ = keys.shape
    tokens = jnp.arange(k.shape[1])
    positions = blocks.starts[:, None] + tokens
    ids = blocks.tables[blocks.slots[:, None], jnp.minimum(positions // page_size, blocks.tables.shape[1] - 1)]
    ids = jnp.where(tokens < blocks.counts[:, None], ids, num_pages)

    def put(pool: Array, x: Array) -> Array:
        return pool.at[ids, :, positions % page_size].set(x, mode="drop")

    return put(keys, k), put(values, v)
