"""Candidates: some tokens of a distribution by name, and all others together as one entry, "the rest".

What two models say of the same candidates can be compared without the whole vocabulary of each position.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.base.pytree import pytree
from pallas_kernels.pinned_math import exp, row_sum

NOTHING = -1  # the id of a place that holds no token


@pytree
class Candidates:
    """Tokens of each position, all different, and a distribution over them and the rest."""

    token_ids: Int[Array, "B T K"]  # NOTHING where a place holds none
    logprobs: Float[Array, "B T K+1"]  # of the tokens, then of all others together; -inf where there is none


def with_likeliest(logprobs: Float[Array, "t V"], also: Int[Array, "t k"], top_k: int) -> Int[Array, "t K"]:
    """The ids of the `top_k` likeliest tokens, then those of `also` that are not among them, NOTHING in the others'
    places. Tokens of probability 0 are left out.
    """
    values, ids = jax.lax.top_k(logprobs, top_k)
    ids = jnp.where(values > -jnp.inf, ids, NOTHING).astype(jnp.int32)
    known = (also[:, :, None] == ids[:, None, :]).any(-1)
    return jnp.concatenate([ids, jnp.where(known, NOTHING, also)], axis=1)


def coarsened(logprobs: Float[Array, "t V"], ids: Int[Array, "t K"]) -> Float[Array, "t K+1"]:
    """The logprobs of the candidates, and of the rest, differentiable.

    The rest is summed up relative to its own largest, because 1 less the candidates' sum has no digits left where the
    rest is small.
    """
    count, vocab = logprobs.shape
    # Places without a token lie beyond the vocabulary, each elsewhere, where nothing is read or written.
    places = jnp.where(ids == NOTHING, vocab + jnp.arange(ids.shape[1]), ids)
    named = logprobs.at[jnp.arange(count)[:, None], places]
    own = named.get(mode="fill", fill_value=-jnp.inf, unique_indices=True)
    others = named.set(-jnp.inf, mode="drop", unique_indices=True)
    high = jax.lax.stop_gradient(others.max(-1))
    possible = high > -jnp.inf
    high = jnp.where(possible, high, 0.0)
    mass = jnp.where(possible, row_sum(exp(others - high[:, None])), 1.0)
    rest = jnp.where(possible, high + jnp.log(mass), -jnp.inf)
    return jnp.concatenate([own, rest[:, None]], axis=1)
