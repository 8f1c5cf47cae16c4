"""Attention over pages with one fixed order along the context: a query's bits depend on its sequence and position
alone."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.implementations import Implementation, bodies
from pallas_kernels.paged_attention_gpu import paged_attention_gpu
from pallas_kernels.paged_attention_inputs import EIGHT_BIT, PagedBlocks, Pages, Scoring, check_blocks, check_scales
from pallas_kernels.paged_attention_reference import paged_attention_reference
from pallas_kernels.paged_attention_tpu import paged_attention_tpu
from pallas_kernels.sizes_attention import AttentionSizes, attention_sizes

BODIES = bodies(paged_attention_reference, paged_attention_tpu, paged_attention_gpu)
DTYPES = ("bfloat16", "float16", "float32", *EIGHT_BIT)


def paged_attention(
    q: Float[Array, "B r H h"],
    pages: Pages,
    blocks: PagedBlocks,
    *,
    scoring: Scoring,
    implementation: Implementation,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B r H h"]:
    """Causal attention of query blocks over their sequences' pages, in float32; 0 for tokens past a block's count,
    anything in blocks from `num_blocks` on.

    The blocks' own keys and values are already in the pages. Queries are rounded to the cache's dtype (bfloat16 for an
    8-bit cache) after scaling, softmax weights before they are multiplied with the values; everything else is float32.
    Query head i reads key-value head i // (H / K). `sinks` adds a score for each head that takes weight and has no
    value. Raises ValueError for shapes and dtypes that do not fit together and for a page size that does not divide
    the device's tile of keys.
    """
    _check(q, pages, blocks, sinks)
    page_size, head_dim = pages.keys.shape[2:]
    sizes = attention_sizes(implementation.device, pages.keys.dtype, head_dim)
    _check_page_size(page_size, sizes)
    return BODIES[implementation.name](q, pages, blocks, sinks, scoring, sizes)


def _check(q: Array, pages: Pages, blocks: PagedBlocks, sinks: Array | None) -> None:
    keys, values = pages.keys, pages.values
    if keys.ndim != 4 or keys.shape != values.shape or keys.dtype != values.dtype:
        got = " and ".join(f"{x.dtype}{x.shape}" for x in (keys, values))
        raise ValueError(f"keys and values must both be [P, K, p, h] of one dtype, got {got}")
    if keys.dtype.name not in DTYPES:
        raise ValueError(f"pages must be one of {', '.join(DTYPES)}, got {keys.dtype}")
    if q.ndim != 4 or q.shape[3] > keys.shape[3] or q.shape[2] % keys.shape[1]:
        raise ValueError(
            f"q must be [B, r, H, h] with H a multiple of the pages' {keys.shape[1]} heads and h at most their width "
            f"of {keys.shape[3]}, got {q.shape}"
        )
    check_scales(pages)
    for scales in (pages.key_scales, pages.value_scales):
        if scales is not None and (scales.shape != keys.shape[:2] or scales.dtype != jnp.float32):
            raise ValueError(f"scales must be float32{keys.shape[:2]}, got {scales.dtype}{scales.shape}")
    check_blocks(blocks, q.shape[0], "q")
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"sinks must be [{q.shape[2]}], one for each query head, got {sinks.shape}")


def _check_page_size(page_size: int, sizes: AttentionSizes) -> None:
    if sizes.kv_tile % page_size:
        allowed = [n for n in range(1, sizes.kv_tile + 1) if sizes.kv_tile % n == 0]
        raise ValueError(
            f"the page size must divide the tile of {sizes.kv_tile} keys, got {page_size}; allowed are {allowed}"
        )
