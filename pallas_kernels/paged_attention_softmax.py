"""The arithmetic of attention over tiles of keys, which every body shares: what is rounded, and in which order.

A split is a fixed run of tiles. Tiles are folded one after the other into their split's partial result, and splits one
after the other into the query's. So the order of a query's sums depends on its own position alone, whether the splits
are computed in turn or side by side.

The softmax is to base 2 and its running maximum is rounded up to a whole number. Rescaling then multiplies by a power
of two, which is exact. So it makes no difference whether a compiler fuses that into the addition after it, nor whether
a tile or split that holds nothing for a row is folded or left out. Online softmax: Milakov and Gimelshein 2018,
arXiv:1805.02867; splits: Dao et al. 2023, Flash-Decoding.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.paged_attention_inputs import Scoring
from pallas_kernels.pinned_math import LOG2_E, exp2

MASKED = -1e30  # finite, so that MASKED - MASKED is 0 and not NaN

Bound = Int[Array, ""]


class Partial(NamedTuple):
    """The softmax of some rows over a run of keys, before it is divided: out / total is the attention over these
    keys."""

    high: Float[Array, "m 1"]  # a whole number no less than every score; MASKED where there was none
    total: Float[Array, "m 1"]  # Σ 2^(score - high)
    out: Float[Array, "m h"]  # Σ 2^(score - high) · value


def empty(rows: int, h: int) -> Partial:
    """The partial result over no keys."""
    high, total = jnp.full((rows, 1), MASKED, jnp.float32), jnp.zeros((rows, 1), jnp.float32)
    return Partial(high, total, jnp.zeros((rows, h), jnp.float32))


def dot(a: Array, b: Array, contract: int) -> Float[Array, "m n"]:
    """a [m, k] times b, along b's axis `contract`, added in float32. Float32 operands are not rounded to fewer bits."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (((1,), (contract,)), ((), ())), precision, jnp.float32)


def key_range(start: Bound, count: Bound, window: int | None) -> tuple[Bound, Bound]:
    """(first, end) of the positions whose keys some query of a block sees; empty for a block of no tokens."""
    first = jnp.int32(0) if window is None else jnp.maximum(start - (window - 1), 0)
    return first, jnp.where(count > 0, start + count, first)


def visible(
    tokens: Int[Array, "m 1"], keys: Int[Array, "1 s"], start: Bound, count: Bound, window: int | None
) -> Bool[Array, "m s"]:
    """Which rows see which key positions: causal, within the window, and nothing for rows of no token."""
    queries = start + tokens
    seen = (keys <= queries) & (tokens < count)
    return seen if window is None else seen & (keys > queries - window)


def scores_of(
    q: Float[Array, "m h"], keys: Float[Array, "s h"], scales: Float[Array, "1 s"] | None, scoring: Scoring
) -> Float[Array, "m s"]:
    """Scores to base 2 of scaled queries. The scales of 8-bit keys multiply the sums, not the keys."""
    scores = dot(q, keys, 1)
    if scales is not None:
        scores = scores * scales
    if scoring.soft_cap is None:
        return scores
    # cap · tanh(s / cap) with tanh y = 1 - 2 / (e^2y + 1), where e^2y = 2^(2 y log2 e) is bounded to stay finite.
    doubled = jnp.clip(scores * (2 * LOG2_E / scoring.soft_cap), -100.0, 100.0)
    return (scoring.soft_cap * LOG2_E) * (1.0 - 2.0 / (exp2(doubled) + 1.0))


def fold(
    partial: Partial,
    scores: Float[Array, "m s"],
    seen: Bool[Array, "m s"],
    values: Float[Array, "s h"],
    scales: Float[Array, "1 s"] | None,
    row_sum: Callable[[Array], Array],
) -> Partial:
    """One tile of keys into a partial result. `values` must be finite where no row sees the key, because 0 · NaN is
    NaN."""
    scores = jnp.where(seen, scores, MASKED)
    high = jnp.maximum(partial.high, jnp.ceil(scores.max(-1, keepdims=True)))
    weights = jnp.where(seen, exp2(scores - high), 0.0)
    shrink = exp2(partial.high - high)
    scaled = (
        weights if scales is None else jnp.where(seen, weights * scales, 0.0)
    )  # what no row sees may have any scale
    total = partial.total * shrink + row_sum(weights)
    return Partial(high, total, partial.out * shrink + dot(scaled.astype(values.dtype), values, 0))


def lane_sum(x: Float[Array, "m s"]) -> Float[Array, "m 1"]:
    """Sums of the rows inside a kernel: the shape is fixed there, so the device's own reduce has one order."""
    return x.sum(-1, keepdims=True)


def combine(before: Partial, after: Partial) -> Partial:
    """Two partial results as one, the earlier keys first."""
    high = jnp.maximum(before.high, after.high)
    first, second = exp2(before.high - high), exp2(after.high - high)
    return Partial(high, before.total * first + after.total * second, before.out * first + after.out * second)


def finish(partial: Partial, sinks: Float[Array, "m 1"] | None) -> Float[Array, "m h"]:
    """The attention; 0 for rows that saw no key. A sink is one more score, of a key without a value."""
    high, total, out = partial
    if sinks is not None:
        top = jnp.maximum(high, jnp.ceil(sinks))
        shrink = exp2(high - top)
        total, out = total * shrink + exp2(sinks - top), out * shrink
    return out / jnp.where(total > 0, total, 1.0)
