"""The draw's twin in plain XLA: log-softmax, the draw, and a token's logprob."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.pinned_math import exp, row_cumsum, row_sum
from pallas_kernels.sizes import VOCAB_BLOCK
from pallas_kernels.tiles import by_tiles

TILE = 8  # rows
NEVER = 2**30  # more than every index


class Draw(NamedTuple):
    """A token of each row, and what the logprobs of all its tokens follow from: `highs` and `log_masses`."""

    tokens: Int[Array, " t"]
    logprobs: Float[Array, " t"]  # of those tokens
    highs: Float[Array, " t"]  # the largest logit
    log_masses: Float[Array, " t"]  # log Σ exp(logit - largest)

    def all_logprobs(self, logits: Float[Array, "t V"]) -> Float[Array, "t V"]:
        """The logprobs of every token, with the bits that `logprobs` has."""
        return (logits - self.highs[:, None]) - self.log_masses[:, None]


def log_softmax(x: Float[Array, "... n"]) -> Float[Array, "... n"]:
    """x - log Σ exp x in float32; -inf stays -inf."""
    high, log_mass = _normaliser(x)
    return (x - high[..., None]) - log_mass[..., None]


def _normaliser(x: Float[Array, "... n"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(the largest of a row, log Σ exp of the differences from it)."""
    high = jax.lax.stop_gradient(x.max(-1))
    return high, jnp.log(row_sum(exp(x - high[..., None])))


def draw_blocks(
    logprobs: Float[Array, "t V"], uniforms: Float[Array, "t 2"], block_size: int = VOCAB_BLOCK
) -> Int[Array, " t"]:
    """One token a row from the distribution exp(logprobs).

    The first uniform picks a block by inverse CDF, the second an id within it.
    """
    batch, vocab = logprobs.shape
    blocks = exp(logprobs).reshape(batch, vocab // block_size, block_size)
    block = _inverse_cdf(row_sum(blocks), uniforms[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * block_size + _inverse_cdf(inside, uniforms[:, 1])


def _inverse_cdf(weights: Float[Array, "t n"], u: Float[Array, " t"]) -> Int[Array, " t"]:
    """The first index whose cumulative weight exceeds u · total, among those of positive weight."""
    cumulative = row_cumsum(weights)
    positive = weights > 0
    hit = positive & (cumulative > u[:, None] * cumulative[:, -1:])
    last = weights.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)  # when, by rounding, no sum exceeds u · total
    return jnp.where(hit.any(-1), jnp.argmax(hit, axis=-1), last).astype(jnp.int32)


def first_above(
    weights: Float[Array, "r c"], cumulative: Float[Array, "r c"], index: Int[Array, "r c"], threshold: Array
) -> Array:
    """The lowest index of positive weight whose cumulative weight exceeds the threshold, or the highest of positive
    weight.

    It is made for kernels: of max, min and compare over one row's weights, whatever the shape they are in.
    """
    positive = weights > 0
    first = jnp.min(jnp.where(positive & (cumulative > threshold), index, NEVER))
    return jnp.where(first < NEVER, first, jnp.maximum(jnp.max(jnp.where(positive, index, -1)), 0))


def plain_draw(logits: Float[Array, "t V"], uniforms: Float[Array, "t 2"] | None, given: Int[Array, " t"]) -> Draw:
    """All rows at once; without uniforms all tokens are given. In a tile of fixed size, a row's bits do not depend on
    the other rows.
    """
    highs, log_masses = _normaliser(logits)
    logprobs = (logits - highs[:, None]) - log_masses[:, None]
    tokens = given if uniforms is None else jnp.where(given >= 0, given, draw_blocks(logprobs, uniforms))
    return Draw(tokens, jax.vmap(lambda row, token: row[token])(logprobs, tokens), highs, log_masses)


def draw_reference(logits: Float[Array, "t V"], uniforms: Float[Array, "t 2"], given: Int[Array, " t"]) -> Draw:
    """The draw, TILE rows at a time."""
    return by_tiles(plain_draw, TILE, logits, uniforms, given)
