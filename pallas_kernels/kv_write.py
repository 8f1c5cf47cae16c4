"""New keys and values into pages, in place: only bits are copied, and only the rows of tokens change."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.implementations import Implementation, bodies
from pallas_kernels.kv_write_gpu import kv_write_gpu
from pallas_kernels.kv_write_reference import kv_write_reference
from pallas_kernels.kv_write_tpu import kv_write_tpu
from pallas_kernels.paged_attention_inputs import PagedBlocks, Pages, check_blocks, check_scales, widen

BODIES = bodies(kv_write_reference, kv_write_tpu, kv_write_gpu)


def kv_write(
    pages: Pages,
    k: Float[Array, "B r K h"],
    v: Float[Array, "B r K h"],
    blocks: PagedBlocks,
    *,
    implementation: Implementation,
) -> Pages:
    """The pages with k and v of each block's first `counts[b]` tokens at their positions. No two blocks may hold the
    same position.

    A block's start is a multiple of r. The pools are updated in place where they are donated. For 8-bit pages, numbers
    are divided by the scale of their page and head, which is set before and does not change here, so that a token's
    bits depend on no other token. What is too large becomes the largest number. Raises ValueError for shapes and dtypes
    that do not fit together.
    """
    _check(pages, k, v, blocks)
    page_of = _page_ids(pages, blocks, k.shape[1])
    k = _store(widen(k, pages.keys.shape[3]), pages.keys, pages.key_scales, page_of)
    v = _store(widen(v, pages.keys.shape[3]), pages.values, pages.value_scales, page_of)
    keys, values = BODIES[implementation.name](pages.keys, pages.values, k, v, blocks)
    return pages._replace(keys=keys, values=values)


def _check(pages: Pages, k: Array, v: Array, blocks: PagedBlocks) -> None:
    _, num_kv_heads, _, h = pages.keys.shape
    if k.shape != v.shape or k.ndim != 4 or k.shape[2] != num_kv_heads or k.shape[3] > h:
        raise ValueError(
            f"k and v must be [B, r, {num_kv_heads}, h] with h at most the pages' width of {h}, "
            f"got {k.shape} and {v.shape}"
        )
    check_scales(pages)
    if pages.key_scales is None and not k.dtype == v.dtype == pages.keys.dtype:
        raise ValueError(f"k and v must have the pages' dtype {pages.keys.dtype}, got {k.dtype} and {v.dtype}")
    check_blocks(blocks, k.shape[0], "k")


def _page_ids(pages: Pages, blocks: PagedBlocks, r: int) -> Array:
    """The page of each token, [B, r]; any for tokens past the count."""
    columns = jnp.minimum((blocks.starts[:, None] + jnp.arange(r)) // pages.keys.shape[2], blocks.tables.shape[1] - 1)
    return blocks.tables[blocks.slots[:, None], columns]


def _store(x: Float[Array, "B r K h"], pool: Array, scales: Float[Array, "P K"] | None, page_of: Array) -> Array:
    """x as the pool keeps it. int8 keeps -127 … 127, and ties are rounded to even numbers."""
    if scales is None:
        return x
    scaled = x.astype(jnp.float32) / scales[page_of][..., None]
    if pool.dtype == jnp.int8:
        return jnp.clip(jnp.rint(scaled), -127, 127).astype(pool.dtype)
    largest = float(jnp.finfo(pool.dtype).max)
    return jnp.clip(scaled, -largest, largest).astype(pool.dtype)
