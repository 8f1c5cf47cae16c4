"""The distribution that tokens are drawn from and scored by: here the meaning of "logprob" is written.

The logprob of a token is the float32 log-softmax of the distribution it was drawn from: logit bias, penalties and temperature applied,
cut to top-k, then top-p, then min-p, and renormalised over what is kept. At temperature 0 it is that of the model's own distribution,
and the token is the likeliest after bias and penalties.

The draw is a function of (processed distribution, key): the vocabulary is cut into blocks of VOCAB_BLOCK ids; a first uniform picks a block
by inverse CDF over the blocks' masses, a second an id by inverse CDF within the block. Two uniforms instead of V Gumbels: drawing
150,000 Gumbels a token costs more than a decode step on a CPU. And two instead of one: each then has its own 24 bits, so the rounding of
one CDF over the whole vocabulary does not swallow its tail.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxengine.base.keys import key_of
from jaxengine.device.step_inputs import SamplingArrays
from pallas_kernels.draw_reference import log_softmax
from pallas_kernels.pinned_math import exp, row_sum

ONE = np.float32(1).view(np.uint32)  # the bits of 1.0


def fold_keys(key: UInt32[Array, "t 2"], folds: Int[Array, "t 2"], positions: Int[Array, " t"]) -> Array:
    """The key of each row's token: fold_in(fold_in(fold_in(key, prompt_index), sample_index), position); a fold of -1 is left out."""

    def one(data, indices):
        fold = lambda key, index: (jax.lax.select(index >= 0, jax.random.fold_in(key, index), key), None)
        return jax.lax.scan(fold, key_of(data), indices)[0]  # a loop: threefry compiles for long

    return jax.vmap(one)(key, jnp.column_stack([folds, positions]))


def process(
    logits: Float[Array, "t V"],
    row: SamplingArrays,
    history: Int[Array, "slots max_len"],
    slots: Int[Array, " t"],
    positions: Int[Array, " t"],
) -> tuple[Float[Array, "t V"], Float[Array, "t V"]]:
    """(logits after bias and penalties, logits of the processed distribution) for tokens at `positions`; what is cut off is -inf.

    `row` holds the parameters of each row's slot. Work that no row of the tile asks for is skipped; a row that does not ask for it
    has the same bits either way.
    """
    batch, vocab = logits.shape
    each = jnp.arange(batch)[:, None]

    def biased(logits):
        drop = lambda ids: jnp.where(ids >= 0, ids, vocab)  # behind the end: dropped by the scatter
        logits = logits.at[each, drop(row.bias_ids)].add(row.bias_values, mode="drop")
        early = (positions < row.first_stop)[:, None]
        return logits.at[each, drop(jnp.where(early, row.stop_ids, -1))].set(-jnp.inf, mode="drop")

    def penalised(logits):
        tokens, where = history[slots], jnp.arange(history.shape[1])
        count = lambda use: (
            jnp.zeros((batch, vocab), jnp.int32).at[each, tokens].add(use.astype(jnp.int32), mode="drop")
        )
        generated = count((where >= row.prompt_length[:, None]) & (where < positions[:, None]))
        seen = generated + count(where < jnp.minimum(row.prompt_length, positions)[:, None]) > 0
        penalty = row.repetition_penalty[:, None]
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
        return logits - row.frequency_penalty[:, None] * generated - row.presence_penalty[:, None] * (generated > 0)

    wants_bias = (row.bias_ids >= 0).any() | (positions < row.first_stop).any()
    logits = jax.lax.cond(wants_bias, biased, lambda x: x, logits)
    wants_penalty = ((row.repetition_penalty != 1) | (row.presence_penalty != 0) | (row.frequency_penalty != 0)).any()
    logits = jax.lax.cond(wants_penalty, penalised, lambda x: x, logits)
    scaled = logits / jnp.where(row.temperature > 0, row.temperature, 1.0)[:, None]
    cuts = (row.top_k > 0) | (row.top_p < 1) | (row.min_p > 0)
    return logits, jax.lax.cond(
        (cuts & (row.temperature > 0)).any(),
        lambda x: truncate(x, row.top_k, row.top_p, row.min_p),
        lambda x: x,
        scaled,
    )


def distribution(
    logits: Float[Array, "t V"],
    row: SamplingArrays,
    history: Int[Array, "slots max_len"],
    slots: Int[Array, " t"],
    positions: Int[Array, " t"],
    raw: Bool[Array, " t"],
) -> tuple[Float[Array, "t V"], Float[Array, "t V"]]:
    """(logits after bias and penalties, logits of the distribution that tokens at `positions` are drawn from).

    Of rows that are `raw`, or at temperature 0, the latter are the model's own.
    """
    penalised, processed = process(logits, row, history, slots, positions)
    raw |= row.temperature == 0
    return penalised, jnp.where(raw[:, None], logits, processed)


def truncate(
    logits: Float[Array, "t V"], top_k: Int[Array, " t"], top_p: Float[Array, " t"], min_p: Float[Array, " t"]
) -> Float[Array, "t V"]:
    """logits with everything outside top-k, then top-p, then min-p at -inf. Ties in the sorted order are broken by token id.

    No sort: the threshold is found by bisection over the bits of float32, whose order is that of integers.
    """
    keep = jax.lax.stop_gradient(_support(jax.lax.stop_gradient(logits), top_k, top_p, min_p))
    return jnp.where(keep, logits, -jnp.inf)


def _support(
    logits: Float[Array, "t V"], top_k: Int[Array, " t"], top_p: Float[Array, " t"], min_p: Float[Array, " t"]
) -> Bool[Array, "t V"]:
    vocab = logits.shape[-1]
    order = _order(logits)
    k = jnp.where((top_k > 0) & (top_k < vocab), top_k, vocab)[:, None]
    edge = _largest(lambda t: (order >= t).sum(-1, keepdims=True) >= k, order.shape[0])
    missing = k - (order > edge).sum(-1, keepdims=True)
    keep = _above(order, edge, missing)

    probs = exp(log_softmax(jnp.where(keep, logits, -jnp.inf)))
    p = jnp.maximum(top_p, jnp.finfo(jnp.float32).tiny)[:, None]  # a p that rounds to 0 still keeps the likeliest
    edge = _largest(lambda t: row_sum(jnp.where(order >= t, probs, 0))[:, None] >= p, order.shape[0])
    inside = row_sum(jnp.where(order > edge, probs, 0))[:, None]
    each = jnp.max(
        jnp.where(order == edge, probs, 0), -1, keepdims=True
    )  # ids that share the edge have one probability
    missing = jnp.ceil((p - inside) / jnp.maximum(each, jnp.finfo(jnp.float32).tiny))
    keep &= jnp.where(p < 1, _above(order, edge, jnp.clip(missing, 1, vocab).astype(jnp.int32)), True)

    return keep & (probs >= min_p[:, None] * probs.max(-1, keepdims=True))


def _order(x: Float[Array, "t V"]) -> UInt32[Array, "t V"]:
    """float32 as unsigned integers in the same order; -0 and +0 are one number."""
    bits, sign = jax.lax.bitcast_convert_type(x, jnp.uint32), jnp.uint32(1 << 31)
    bits = jnp.where(bits == sign, 0, bits)  # adding 0.0 would do, but the compiler takes that out
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest(enough, rows: int) -> UInt32[Array, "t 1"]:
    """The largest threshold for which `enough(threshold)` holds, bit by bit; enough is true at 0 and falls once."""

    def step(i, found):
        candidate = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(candidate), candidate, found)

    return jax.lax.fori_loop(0, 32, step, jnp.zeros((rows, 1), jnp.uint32))


def _above(order: UInt32[Array, "t V"], edge: UInt32[Array, "t 1"], missing: Int[Array, "t 1"]) -> Bool[Array, "t V"]:
    """What lies above the edge, and the `missing` lowest ids of those that lie on it."""
    on_edge = order == edge
    return (order > edge) | (on_edge & (jnp.cumsum(on_edge, axis=-1) <= missing))


def uniforms(keys: Array) -> Float[Array, "t 2"]:
    """What each row's token is drawn with: jax.random.uniform(key, (2,)), written out, for that one follows the process's settings.

    jax_threefry_partitionable is such a setting, and here always on; jax_enable_x64 another.
    """

    def one(key):
        words = threefry_2x32(jax.random.key_data(key), jnp.array([0, 0, 0, 1], jnp.uint32)).reshape(
            2, 2
        )  # of the counts 0 and 1
        mantissas = (words[0] ^ words[1]) >> (32 - jnp.finfo(jnp.float32).nmant)
        return jax.lax.bitcast_convert_type(mantissas | ONE, jnp.float32) - 1

    return jax.vmap(one)(keys)


def entropy(logprobs: Float[Array, "t V"]) -> Float[Array, " t"]:
    """-Σ p log p in nats."""
    return -row_sum(jnp.where(logprobs > -jnp.inf, exp(logprobs) * logprobs, 0))
