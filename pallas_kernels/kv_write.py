"""New keys and values into pages, in place: only bits are copied, and only rows of tokens change."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.implementations import Implementation
from pallas_kernels.kv_write_gpu import kv_write_gpu
from pallas_kernels.kv_write_reference import kv_write_reference
from pallas_kernels.kv_write_tpu import kv_write_tpu
from pallas_kernels.paged_attention_inputs import EIGHT_BIT, PagedBlocks, Pages, widen

BODIES = {
    "xla": kv_write_reference,
    "pallas_tpu": kv_write_tpu,
    "pallas_gpu": kv_write_gpu,
    "pallas_interpret": functools.partial(kv_write_tpu, interpret=True),
}


def kv_write(
    pages: Pages,
    k: Float[Array, "B r K h"],
    v: Float[Array, "B r K h"],
    blocks: PagedBlocks,
    *,
    implementation: Implementation,
) -> Pages:
    """The pages with k and v of each block's first `counts[b]` tokens at their positions. No two blocks may hold the same position.

    The pools are updated in place where they are donated. For 8-bit pages, numbers are divided by the scale of their page and head, which
    is set before and does not change here: a token's bits depend on no other token. What is too large takes the largest number.
    Raises ValueError for shapes and dtypes that do not fit together.
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
            f"k and v must be [B, r, {num_kv_heads}, h] with h at most the pages' width of {h}, got {k.shape} and {v.shape}"
        )
    if (pages.keys.dtype.name in EIGHT_BIT) != (pages.key_scales is not None) or (pages.key_scales is None) != (
        pages.value_scales is None
    ):
        raise ValueError(
            f"pages of 8 bits take key_scales and value_scales [P, K], others neither; the pages are {pages.keys.dtype}"
        )
    if pages.key_scales is None and not k.dtype == v.dtype == pages.keys.dtype:
        raise ValueError(f"k and v must have the pages' dtype {pages.keys.dtype}, got {k.dtype} and {v.dtype}")
    if any(x.shape != k.shape[:1] for x in (blocks.slots, blocks.starts, blocks.counts)):
        raise ValueError(f"slots, starts and counts must be [{k.shape[0]}] as k, got {[x.shape for x in blocks[1:]]}")


def _page_ids(pages: Pages, blocks: PagedBlocks, r: int) -> Array:
    """The page of each token, [B, r]; any for tokens behind the count."""
    columns = jnp.minimum((blocks.starts[:, None] + jnp.arange(r)) // pages.keys.shape[2], blocks.tables.shape[1] - 1)
    return blocks.tables[blocks.slots[:, None], columns]


def _store(x: Float[Array, "B r K h"], pool: Array, scales: Float[Array, "P K"] | None, page_of: Array) -> Array:
    """x as the pool keeps it. int8 keeps -127 … 127; ties go to even numbers."""
    if scales is None:
        return x
    scaled = x.astype(jnp.float32) / scales[page_of][..., None]
    if pool.dtype == jnp.int8:
        return jnp.clip(jnp.rint(scaled), -127, 127).astype(pool.dtype)
    largest = float(jnp.finfo(pool.dtype).max)
    return jnp.clip(scaled, -largest, largest).astype(pool.dtype)
