"""What top-k, top-p and min-p keep, in plain XLA. Nothing is sorted: thresholds are found by bisection over the bits of
float32, because their order is that of integers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from pallas_kernels.draw_reference import log_softmax
from pallas_kernels.pinned_math import exp, row_sum

TINY = np.finfo(np.float32).tiny
SIGN = np.uint32(1 << 31)  # the first bit of a float32
BITS = 32


def kept_reference(
    logits: Float[Array, "t V"], top_k: Int[Array, " t"], top_p: Float[Array, " t"], min_p: Float[Array, " t"]
) -> Bool[Array, "t V"]:
    """What top-k, then top-p, then min-p keep; top-k = 0, top-p = 1 and min-p = 0 keep all.

    Ties in the order are broken by token id. Top-k = 3 of the logits of tokens 0 … 4, as an example:

        logits                                2.0   0.5   1.0   1.0   1.0
        the edge: the largest threshold that at least 3 logits reach        1.0 (four logits reach it)
        above the edge, and so kept           yes    no    no    no    no
        missing: 3 - 1 = 2 of those on it      -      -   yes   yes    no   (the lowest ids)

    Top-p does the same with masses for counts: its edge is the largest threshold with a mass of at least p at or above
    it, and what is missing is p less the mass above the edge, in units of the one probability that all tokens on the
    edge have.
    """
    vocab = logits.shape[-1]
    order = ordered(logits)
    k = jnp.where((top_k > 0) & (top_k < vocab), top_k, vocab)[:, None]
    edge = _largest(lambda threshold: (order >= threshold).sum(-1, keepdims=True) >= k, order.shape[0])
    missing = k - (order > edge).sum(-1, keepdims=True)
    keep = _above(order, edge, missing)
    probs = exp(log_softmax(jnp.where(keep, logits, -jnp.inf)))
    keep &= jnp.where(top_p[:, None] < 1, _nucleus(order, probs, top_p), True)
    return keep & (probs >= min_p[:, None] * probs.max(-1, keepdims=True))


def _nucleus(order: UInt32[Array, "t V"], probs: Float[Array, "t V"], top_p: Float[Array, " t"]) -> Bool[Array, "t V"]:
    """The shortest run of the likeliest tokens with a mass of at least top_p."""
    p = jnp.maximum(top_p, TINY)[:, None]  # a p that rounds to 0 still keeps the likeliest

    def mass(chosen: Bool[Array, "t V"]) -> Float[Array, "t 1"]:
        return row_sum(jnp.where(chosen, probs, 0))[:, None]

    edge = _largest(lambda threshold: mass(order >= threshold) >= p, order.shape[0])
    each = jnp.max(jnp.where(order == edge, probs, 0), -1, keepdims=True)  # ids on the edge have one probability
    missing = jnp.ceil((p - mass(order > edge)) / jnp.maximum(each, TINY))
    return _above(order, edge, jnp.clip(missing, 1, order.shape[-1]).astype(jnp.int32))


def ordered(x: Float[Array, "t V"]) -> UInt32[Array, "t V"]:
    """float32 as unsigned integers in the same order; -0 and +0 are one number."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = jnp.where(bits == SIGN, 0, bits)  # not by adding 0.0, which the compiler takes out
    return jnp.where(bits >= SIGN, ~bits, bits | SIGN)


def _largest(enough: Callable[[Array], Bool[Array, "t 1"]], rows: int) -> UInt32[Array, "t 1"]:
    """The largest threshold for which `enough(threshold)` holds, bit by bit; enough is true at 0 and falls once."""

    def step(i, found):
        candidate = found | (SIGN >> i.astype(jnp.uint32))
        return jnp.where(enough(candidate), candidate, found)

    return jax.lax.fori_loop(0, BITS, step, jnp.zeros((rows, 1), jnp.uint32))


def _above(order: UInt32[Array, "t V"], edge: UInt32[Array, "t 1"], missing: Int[Array, "t 1"]) -> Bool[Array, "t V"]:
    """All above the edge, and the `missing` lowest ids of those on it."""
    on_edge = order == edge
    return (order > edge) | (on_edge & (jnp.cumsum(on_edge, axis=-1) <= missing))
