"""Attention of the chain's queries, which are scaled and rounded already."""

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.paged_attention_inputs import PagedBlocks, Pages, Scoring
from pallas_kernels.paged_attention_tpu import attention_of_scaled
from pallas_kernels.sizes_attention import AttentionSizes


def attend(
    q: Float[Array, "R H h"],
    keys: Array,
    values: Array,
    blocks: PagedBlocks,
    sizes: AttentionSizes,
    *,
    interpret: Any = False,
) -> Float[Array, "R H*h"]:
    """Of the queries of `rotate_and_write`, in the pools' dtype; row i is token i % r of block i // r. Rows of blocks
    from `num_blocks` on may hold anything.
    """
    batch = blocks.starts.shape[0]
    q = q.reshape(batch, -1, *q.shape[1:])
    scoring = Scoring(scale=1.0)  # done already
    out = attention_of_scaled(q, Pages(keys, values), blocks, None, scoring, sizes, keys.dtype, interpret=interpret)
    return out.reshape(out.shape[0] * out.shape[1], -1)
