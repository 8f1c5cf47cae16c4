"""The distribution that tokens are drawn from and scored by: here the meaning of "logprob" is written.

The logprob of a token is the float32 log-softmax of the distribution it was drawn from: token rules, penalties
(adjustments.py) and temperature applied, cut to top-k, then top-p, then min-p, and renormalised over what is kept. At
temperature 0 it is that of the model's own distribution, and the token is the likeliest after rules and penalties.

The draw is a function of (processed distribution, key): the vocabulary is cut into blocks of VOCAB_BLOCK ids; a first
uniform picks a block by inverse CDF over the blocks' masses, a second an id by inverse CDF within the block. Two
uniforms instead of V Gumbels, because drawing 150,000 Gumbels a token costs more than a decode step on a CPU. And two
instead of one, because each then has its own 24 bits, and the rounding of one CDF over the whole vocabulary does not
swallow its tail.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxengine.base.keys import key_of
from jaxengine.device.adjustments import Context, When, adjusted, has_rules, wants_penalty
from jaxengine.device.needs import Needs
from jaxengine.device.sampling_arrays import NO_RULES
from jaxengine.device.step_inputs import SamplingArrays
from pallas_kernels.pinned_math import exp, row_quotient, row_sum
from pallas_kernels.truncation_reference import kept_reference

ONE = np.float32(1).view(np.uint32)  # the bits of 1.0
# (logits [t, V], top-k, top-p and min-p of each row) -> bool [t, V], as ops/kernels.DrawKernel.kept
Kept = Callable[[Array, Array, Array, Array], Array]


def fold_keys(key: UInt32[Array, "t 2"], folds: Int[Array, "t 2"], positions: Int[Array, " t"]) -> Array:
    """The key of each row's token: fold_in(fold_in(fold_in(key, prompt_index), sample_index), position).

    A fold of -1 is left out.
    """

    def fold(key, index):
        return jax.lax.select(index >= 0, jax.random.fold_in(key, index), key), None

    def one(data, indices):
        return jax.lax.scan(fold, key_of(data), indices)[0]  # a loop, because threefry takes long to compile

    return jax.vmap(one)(key, jnp.column_stack([folds, positions]))


def process(
    logits: Float[Array, "t V"],
    row: SamplingArrays,
    context: Context,
    kept: Kept = kept_reference,
    needs: Needs = Needs.ALL,
    when: When = jax.lax.cond,
) -> tuple[Float[Array, "t V"], Float[Array, "t V"]]:
    """(logits after rules and penalties, logits of the processed distribution), both float32 `[t, V]`.

    `row` holds the parameters of each row's slot: `[t, …]`. What is ruled out or cut off is -inf; `kept` says what
    top-k, top-p and min-p keep. No row asks for more than `needs`, and `when` may skip what no row of the tile asks
    for; a row that does not ask for it has the same bits either way.
    """
    penalised = adjusted(logits, row, context, when) if needs >= Needs.ALL else logits
    scaled = row_quotient(penalised, jnp.where(row.temperature > 0, row.temperature, 1.0))
    if needs < Needs.CUT:
        return penalised, scaled
    cuts = (row.top_k > 0) | (row.top_p < 1) | (row.min_p > 0)
    wants_cut = (cuts & (row.temperature > 0)).any()

    def cut() -> Float[Array, "t V"]:
        return truncate(scaled, row.top_k, row.top_p, row.min_p, kept)

    return penalised, when(wants_cut, cut, lambda: scaled)


def distribution(
    logits: Float[Array, "t V"],
    row: SamplingArrays,
    context: Context,
    raw: Bool[Array, " t"],
    kept: Kept = kept_reference,
    needs: Needs = Needs.ALL,
    when: When = jax.lax.cond,
) -> tuple[Float[Array, "t V"], Float[Array, "t V"]]:
    """(logits after rules and penalties, logits of the distribution that tokens are drawn from), both float32 `[t, V]`.

    Of rows at temperature 0 the latter are the model's own; of rows that are `raw` both. The rest is as in `process`.
    """
    penalised, processed = process(logits, asking_nothing(row, raw), context, kept, needs, when)
    raw |= row.temperature == 0
    return penalised, jnp.where(raw[:, None], logits, processed)


def asks_only_for_cuts(row: SamplingArrays, context: Context) -> Bool[Array, " t"]:
    """Rows whose distribution is the model's own, divided by a temperature, and cut to top-k, top-p or min-p."""
    return ~(has_rules(row, context) | wants_penalty(row))


def asking_nothing(row: SamplingArrays, raw: Bool[Array, " t"]) -> SamplingArrays:
    """The parameters, without what costs time, of rows that are `raw`: their processed logits are never read."""
    return dataclasses.replace(
        row,
        temperature=jnp.where(raw, 0.0, row.temperature),
        repetition_penalty=jnp.where(raw, 1.0, row.repetition_penalty),
        presence_penalty=jnp.where(raw, 0.0, row.presence_penalty),
        frequency_penalty=jnp.where(raw, 0.0, row.frequency_penalty),
        rules=jnp.where(raw, NO_RULES, row.rules),
    )


def truncate(
    logits: Float[Array, "t V"],
    top_k: Int[Array, " t"],
    top_p: Float[Array, " t"],
    min_p: Float[Array, " t"],
    kept: Kept = kept_reference,
) -> Float[Array, "t V"]:
    """logits with everything outside top-k, then top-p, then min-p at -inf."""
    return jnp.where(kept(jax.lax.stop_gradient(logits), top_k, top_p, min_p), logits, -jnp.inf)


def uniforms(keys: Array) -> Float[Array, "t 2"]:
    """Two uniforms for each row's token: jax.random.uniform(key, (2,)), whatever the process's settings.

    Written out, because jax.random follows jax_threefry_partitionable, which is always on here, and jax_enable_x64.
    """

    def one(key):
        counts = jnp.array([0, 0, 0, 1], jnp.uint32)  # 0 and 1, as 64 bits each: the high words, then the low ones
        first, second = threefry_2x32(jax.random.key_data(key), counts).reshape(2, 2)
        mantissas = (first ^ second) >> (32 - jnp.finfo(jnp.float32).nmant)
        return jax.lax.bitcast_convert_type(mantissas | ONE, jnp.float32) - 1

    return jax.vmap(one)(keys)


def entropy(logprobs: Float[Array, "t V"]) -> Float[Array, " t"]:
    """-Σ p log p in nats."""
    possible = logprobs > -jnp.inf
    logprobs = jnp.where(possible, logprobs, 0)  # or the gradient would be NaN where p is 0
    return -row_sum(jnp.where(possible, exp(logprobs) * logprobs, 0))
