"""What paged attention takes, and its layout for kernels: the rows of a dot are the queries that share a key-value
head."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.pinned_math import LOG2_E
from pallas_kernels.sizes_attention import AttentionSizes

EIGHT_BIT = ("int8", "float8_e4m3fn")
NO_TOKEN = 2**30  # the token of a row that only fills a tile: no count is so large


class Pages(NamedTuple):
    """One layer's pool. 8-bit pages hold numbers that the scale of their page and head multiplies; others have no
    scales.

    Pages may be wider than the heads, because a TPU takes whole lanes of 128. The columns past the head's width are 0,
    and kv_write keeps them so.
    """

    keys: Array  # [P, K, p, h]
    values: Array  # [P, K, p, h]
    key_scales: Float[Array, "P K"] | None = None
    value_scales: Float[Array, "P K"] | None = None


class PagedBlocks(NamedTuple):
    """Query blocks: `counts[b]` consecutive tokens of the sequence in `slots[b]`, the first at position `starts[b]`.

    Decoding is one token to a block; a chunk of a prompt is cut into blocks, of which the last may be short. Blocks
    from `num_blocks` on are padding: they have count 0, a kernel may leave them out, and what attention gives for them
    is undefined.
    """

    tables: Int[Array, "S n"]  # a sequence's pages, in order; entries past its context may be anything
    slots: Int[Array, " B"]
    starts: Int[Array, " B"]
    counts: Int[Array, " B"]
    num_blocks: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class Scoring:
    """score = soft_cap · tanh(scale · q·k / soft_cap), or scale · q·k without a cap.

    A query sees its own key and the `window - 1` before it, or all before it without a window.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, the query's own key, got {self.window}; None means no window")
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"soft_cap must be above 0, got {self.soft_cap}; None means no cap")


def check_scales(pages: Pages) -> None:
    """Raises ValueError for 8-bit pages without scales, and for others with them."""
    wanted = pages.keys.dtype.name in EIGHT_BIT
    if any((scales is not None) != wanted for scales in (pages.key_scales, pages.value_scales)):
        raise ValueError(
            f"pages of 8 bits take key_scales and value_scales [P, K], others neither; the pages are {pages.keys.dtype}"
        )


def check_blocks(blocks: PagedBlocks, batch: int, name: str) -> None:
    """Raises ValueError unless there are `batch` blocks, as the operand of that name has."""
    shapes = [x.shape for x in (blocks.slots, blocks.starts, blocks.counts)]
    if any(shape != (batch,) for shape in shapes):
        raise ValueError(f"slots, starts and counts must be [{batch}] as {name}, got {shapes}")


def dot_dtype(pages: Pages) -> jnp.dtype:
    """The dtype of the dots' operands: the cache's own, or bfloat16 for 8-bit pages, whose numbers it holds exactly."""
    return jnp.dtype(jnp.bfloat16) if pages.keys.dtype.name in EIGHT_BIT else pages.keys.dtype


def scaled(q: Float[Array, "B r H _"], pages: Pages, scoring: Scoring) -> Float[Array, "B r H _"]:
    """Queries times their scale, rounded to the dots' dtype.

    Without a cap the dots give scores to base 2, because log2 e is part of the scale.
    """
    scale = scoring.scale * (LOG2_E if scoring.soft_cap is None else 1.0)
    return (q.astype(jnp.float32) * scale).astype(dot_dtype(pages))


def arrange(q: Float[Array, "B r H _"], pages: Pages, rows: int = 1) -> Float[Array, "B K m h"]:
    """Queries as rows (token, then head of the group), padded to the pages' width and to whole tiles of `rows`."""
    batch, r, num_heads, _ = q.shape
    _, num_kv_heads, _, h = pages.keys.shape
    group = num_heads // num_kv_heads
    q = widen(q, h)
    q = q.reshape(batch, r, num_kv_heads, group, h).transpose(0, 2, 1, 3, 4).reshape(batch, num_kv_heads, r * group, h)
    return jnp.pad(q, ((0, 0), (0, 0), (0, -(r * group) % rows), (0, 0)))


def tokens_of_rows(r: int, group: int, rows: int) -> Int[Array, "m 1"]:
    """Which of a block's tokens each row belongs to; NO_TOKEN for rows that fill the last tile."""
    tokens = jnp.repeat(jnp.arange(r, dtype=jnp.int32), group)
    return jnp.pad(tokens, (0, -(r * group) % rows), constant_values=NO_TOKEN)[:, None]


def sinks_of_rows(sinks: Float[Array, " H"], num_kv_heads: int, r: int, rows: int) -> Float[Array, "K m 1"]:
    """Each row's sink to base 2."""
    by_head = jnp.tile(sinks.astype(jnp.float32).reshape(num_kv_heads, -1) * LOG2_E, (1, r))
    return jnp.pad(by_head, ((0, 0), (0, -by_head.shape[1] % rows)))[..., None]


def widen(x: Array, h: int) -> Array:
    """x with its last axis padded with zeros to the pages' width, h."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, h - x.shape[-1])])


def restore(out: Float[Array, "B K m h"], like: Float[Array, "B r H _"]) -> Float[Array, "B r H _"]:
    """The rows' results in the places of their queries."""
    (batch, num_kv_heads, _, h), (_, r, num_heads, width) = out.shape, like.shape
    group = num_heads // num_kv_heads
    out = out[:, :, : r * group].reshape(batch, num_kv_heads, r, group, h)
    return out.transpose(0, 2, 1, 3, 4).reshape(batch, r, num_heads, h)[..., :width]


def cover_tiles(tables: Int[Array, "S n"], page_size: int, sizes: AttentionSizes) -> Int[Array, "S n2"]:
    """Tables widened to whole tiles of keys. The entries that are added lie past every context, so no page is read by
    them."""
    return jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % (sizes.kv_tile // page_size))))
