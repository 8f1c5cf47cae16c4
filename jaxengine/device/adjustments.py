"""What is done to a row's logits before its temperature, in vLLM's order: allowed tokens, bad words, logit bias, stop
tokens before min_tokens, penalties.

All that reads the tokens before a row reads as many as there are, whatever the context's size: blocks of the history up
to the longest row that asks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxengine.device.sampling_arrays import NO_RULES, WORD
from jaxengine.device.step_inputs import SamplingArrays, TokenRules
from jaxengine.ops.tiles import HISTORY_BLOCK
from pallas_kernels.numbers import cdiv
from pallas_kernels.pinned_math import rounded, row_quotient

# (whether a row of the tile wants it, what does it, what leaves it) -> the result of one of the two
When = Callable[[Bool[Array, ""], Callable[[], Any], Callable[[], Any]], Any]
OUTSIDE = -2  # in the place of a token that no bad word may begin with; -1 is padding


class Context(NamedTuple):
    """Where each row's token stands, the tokens before it, and the rules that rows refer to."""

    history: Int[Array, "slots max_len"]
    slots: Int[Array, " t"]
    positions: Int[Array, " t"]
    prompt_length: Int[Array, " t"]
    first_stop: Int[Array, " t"]  # stop tokens are ruled out at positions before this one
    rules: TokenRules
    allowed: UInt32[Array, "t words"] | None = None  # what each row's grammar allows, where its rules do not have it


def adjusted(logits: Float[Array, "t V"], row: SamplingArrays, context: Context, when: When) -> Float[Array, "t V"]:
    """The logits `[t, V]` that temperature divides; what is ruled out is -inf.

    `when` may skip what no row of the tile asks for; a row that does not ask for it has the same bits either way.
    """
    if context.allowed is not None:
        logits = jnp.where(_is_allowed(context.allowed, logits.shape[1]), logits, -jnp.inf)
    ruled = when(has_rules(row, context).any(), lambda: _ruled(row, context, logits, when), lambda: logits)
    penalised = wants_penalty(row)
    return when(penalised.any(), lambda: _penalised(row, context, penalised, ruled), lambda: ruled)


def has_rules(row: SamplingArrays, context: Context) -> Bool[Array, " t"]:
    """Rows some of whose tokens are ruled out, or biased."""
    return (row.rules != NO_RULES) | (context.positions < context.first_stop)


def wants_penalty(row: SamplingArrays) -> Bool[Array, " t"]:
    """Rows whose logits depend on the tokens so far."""
    return (row.repetition_penalty != 1) | (row.presence_penalty != 0) | (row.frequency_penalty != 0)


# -- rules -------------------------------------------------------------------------------------------------------------


def _ruled(row: SamplingArrays, context: Context, logits: Float[Array, "t V"], when: When) -> Float[Array, "t V"]:
    """Logits under the token rules, and -inf for stop tokens that come too early."""
    by_rules = (row.rules != NO_RULES).any()
    ruled = when(by_rules, lambda: _by_token_rules(row, context, logits), lambda: logits)
    early = (context.positions < context.first_stop)[:, None]
    return _without(ruled, jnp.where(early, row.stop_ids, -1))


def _by_token_rules(row: SamplingArrays, context: Context, logits: Float[Array, "t V"]) -> Float[Array, "t V"]:
    has_rules = (row.rules != NO_RULES)[:, None]

    def row_of(table: Array) -> Array:
        return jax.lax.stop_gradient(table[jnp.maximum(row.rules, 0)])

    rules: TokenRules = jax.tree.map(row_of, context.rules)
    logits = jnp.where(_is_allowed(rules.allowed, logits.shape[1]) | ~has_rules, logits, -jnp.inf)
    logits = _without(logits, _once(jnp.where(has_rules, _completing(rules.bad_words, context), -1)))
    biased = _places(logits, jnp.where(has_rules, rules.bias_ids, -1))
    return logits.at[biased].add(rules.bias_values, mode="drop", unique_indices=True)


def _is_allowed(words: UInt32[Array, "t words"], vocab: int) -> Bool[Array, "t V"]:
    shifts = (jnp.arange(vocab) % WORD).astype(jnp.uint32)
    return (jnp.repeat(words, WORD, axis=1)[:, :vocab] >> shifts) & 1 == 1


def _completing(bad_words: Int[Array, "t bad length"], context: Context) -> Int[Array, "t bad"]:
    """The last token of each bad word whose other tokens are the completion's newest; of the other words -1."""
    back = jnp.arange(bad_words.shape[-1] - 1, 0, -1)
    where = context.positions[:, None] - back
    newest = context.history[context.slots[:, None], jnp.maximum(where, 0)]
    newest = jnp.where(where >= context.prompt_length[:, None], newest, OUTSIDE)
    begins, last = bad_words[:, :, :-1], bad_words[:, :, -1]
    return jnp.where(((begins == -1) | (begins == newest[:, None])).all(-1), last, -1)


def _without(logits: Float[Array, "t V"], token_ids: Int[Array, "t n"]) -> Float[Array, "t V"]:
    """The logits with -inf at the given tokens, of which a row has none twice; -1 is none."""
    return logits.at[_places(logits, token_ids)].set(-jnp.inf, mode="drop", unique_indices=True)


def _once(token_ids: Int[Array, "t n"]) -> Int[Array, "t n"]:
    """The ids with -1 for those that stand earlier in their row already."""
    repeated = jnp.tril(token_ids[:, :, None] == token_ids[:, None, :], -1).any(-1)
    return jnp.where(repeated, -1, token_ids)


def _places(logits: Float[Array, "t V"], token_ids: Int[Array, "t n"]) -> tuple[Array, Array]:
    """Indices of each row's tokens. Each -1 becomes another one after the last, which a scatter drops."""
    batch, vocab = logits.shape
    return jnp.arange(batch)[:, None], jnp.where(token_ids >= 0, token_ids, vocab + jnp.arange(token_ids.shape[1]))


# -- penalties ---------------------------------------------------------------------------------------------------------


def _penalised(
    row: SamplingArrays, context: Context, penalised: Bool[Array, " t"], logits: Float[Array, "t V"]
) -> Float[Array, "t V"]:
    """vLLM's order: the repetition penalty over all tokens so far, then frequency and presence over the completion."""
    prompt, generated = _token_counts(context, jnp.where(penalised, context.positions, 0), logits.shape[1])
    penalty = row.repetition_penalty
    seen = generated + prompt > 0
    repeated = jnp.where(logits > 0, row_quotient(logits, penalty), logits * penalty[:, None])
    logits = jnp.where(seen, repeated, logits)
    nothing = (context.positions < 0)[:, None].astype(jnp.uint32)
    frequency = rounded(row.frequency_penalty[:, None] * generated, nothing)
    return rounded(logits, nothing) - frequency - jnp.where(generated > 0, row.presence_penalty[:, None], 0.0)


def _token_counts(context: Context, lengths: Int[Array, " t"], vocab: int) -> Int[Array, "2 t V"]:
    """How often each token stands among a row's first `lengths` tokens: in its prompt, and after it.

    Counts are integers, so that their order does not matter.
    """
    rows, last = jnp.arange(lengths.shape[0])[:, None], context.history.shape[1] - 1

    def count_block(i: Array, counts: Int[Array, "2 t V"]) -> Int[Array, "2 t V"]:
        where = i * HISTORY_BLOCK + jnp.arange(HISTORY_BLOCK, dtype=jnp.int32)
        tokens = context.history[context.slots[:, None], jnp.minimum(where, last)]
        part = (where >= context.prompt_length[:, None]).astype(jnp.int32)
        return counts.at[part, rows, tokens].add((where < lengths[:, None]).astype(jnp.int32), mode="drop")

    nothing = jnp.zeros((2, lengths.shape[0], vocab), jnp.int32)
    return jax.lax.fori_loop(0, cdiv(lengths.max(), HISTORY_BLOCK), count_block, nothing)
