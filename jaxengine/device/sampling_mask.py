"""Sampling masks: of each drawn token, what top-k, top-p and min-p kept of the vocabulary.

With it a policy that has moved is scored over the tokens that the draw could have given, so that no drawn token falls
out and no ratio of probabilities becomes 0: "Keep Sampling Mask", DeepSeek-V3.2, arXiv:2512.02556, section 3.1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxengine.base.pytree import pytree
from jaxengine.device.sampling_arrays import WORD
from pallas_kernels.numbers import cdiv

IDS_AT_ONCE = 128


@pytree
class SamplingMask:
    """The kept tokens of B sequences, numpy's arrays or JAX's.

    A token takes 4 bytes and 4 more for each token that was kept: 84 with top-k 20, and with top-p what it keeps. Rows
    are as long as the longest, rounded up to a power of two.
    """

    counts: Int[Any, "B T"]  # how many were kept where the token was drawn; 0: the whole vocabulary
    ids: Int[Any, "B N"]  # those of a row's tokens, one after another; -1 after the last


def is_kept(own: SamplingMask, positions: Int[Array, " t"], vocab: int) -> Bool[Array, "t V"]:
    """What was kept at one position of each of t sequences."""
    rows = jnp.arange(positions.shape[0])
    counts = own.counts[rows, positions]
    starts = (jnp.cumsum(own.counts, axis=1) - own.counts)[rows, positions]

    def step(i: Array, kept: Bool[Array, "t V"]) -> Bool[Array, "t V"]:
        offsets = i * IDS_AT_ONCE + jnp.arange(IDS_AT_ONCE)
        places = jnp.minimum(starts[:, None] + offsets, own.ids.shape[1] - 1)
        ids = jnp.where(offsets < counts[:, None], own.ids[rows[:, None], places], vocab)  # which the scatter drops
        return kept.at[rows[:, None], ids].set(True, mode="drop")

    whole = jnp.broadcast_to(counts[:, None] == 0, (positions.shape[0], vocab))
    return jax.lax.fori_loop(0, cdiv(counts.max(), IDS_AT_ONCE), step, whole)


def packed(logits: Float[Array, "t V"]) -> UInt32[Array, "t words"]:
    """A bit for each token, 1 where it can be drawn. V is a multiple of WORD."""
    bits = (logits > -jnp.inf).reshape(logits.shape[0], -1, WORD).astype(jnp.uint32)
    return (bits << jnp.arange(WORD, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)


def unpacked(words: UInt32[np.ndarray, "n words"]) -> Bool[np.ndarray, "n V"]:
    return np.unpackbits(words.astype("<u4").view(np.uint8), axis=-1, bitorder="little").astype(bool)
