"""What the host hands to a step, as pytrees of small arrays.

`B` query blocks, `R` rows that want a token or its logprob.
"""

from typing import Any

from jaxtyping import Bool, Float, Int, UInt32

from jaxengine.base.pytree import pytree

Array = Any  # numpy on the host, jax.Array inside a step


@pytree
class Rows:
    """Positions with a next token to draw, or to score where `scored`: row `indices[i]` of the flattened blocks, for
    `slots[i]`.

    Several rows may share an index: the samples of a group draw their first tokens from one hidden state.
    """

    indices: Int[Array, " R"]
    slots: Int[Array, " R"]
    positions: Int[Array, " R"]
    scored: Bool[Array, " R"]  # the next token is the history's own, nothing is drawn
    num_rows: Int[Array, ""]


@pytree
class Copies:
    """Pages to copy after a prefill."""

    sources: Int[Array, " C"]
    targets: Int[Array, " C"]
    num_copies: Int[Array, ""]


@pytree
class SamplingArrays:
    """How each slot's distribution is processed: SamplingParams as arrays, the same for a request's whole life."""

    temperature: Float[Array, " slots"]  # 0 means greedy
    top_p: Float[Array, " slots"]
    min_p: Float[Array, " slots"]
    repetition_penalty: Float[Array, " slots"]
    presence_penalty: Float[Array, " slots"]
    frequency_penalty: Float[Array, " slots"]
    top_k: Int[Array, " slots"]  # 0 means off
    stop_ids: Int[Array, "slots stops"]  # padded with -1
    rules: Int[Array, " slots"]  # the row of TokenRules that holds for the slot; -1 means none


@pytree
class TokenRules:
    """Rules about single tokens, a row for each request that brings some.

    Wide and seldom asked for: a row is uploaded when such a request is admitted, and stays on the device.
    """

    bias_ids: Int[Array, "M biases"]  # padded with -1
    bias_values: Float[Array, "M biases"]
    allowed: UInt32[Array, "M words"]  # a bit for each token, beginning with the lowest bit of the first word
    bad_words: Int[Array, "M bad length"]  # token ids of each, padded with -1 in front


@pytree
class RequestArrays:
    """The request in each slot: where it begins and ends, its key, what it wants to be told. A few numbers a slot.

    What a step needs of a slot beyond its distribution belongs here (an adapter's index).
    """

    prompt_length: Int[Array, " slots"]
    first_stop: Int[Array, " slots"]  # stop tokens are ruled out at positions before this one (min_tokens)
    limit: Int[Array, " slots"]  # the first position at which no token is generated
    key: UInt32[Array, "slots 2"]
    key_folds: Int[Array, "slots 2"]  # prompt and sample index to fold in; -1 means no fold
    likeliest: Bool[Array, " slots"]  # likeliest tokens, rank, or logprobs of named tokens asked for
    named_ids: Int[Array, "slots named"]  # tokens whose logprobs are asked for; padded with -1
    details: Bool[Array, " slots"]  # entropy or raw logprob asked for


@pytree
class Slots:
    """What steps know of the sequence in each slot; changes when a slot is given away, not from step to step."""

    sampling: SamplingArrays
    request: RequestArrays


@pytree
class RowOutputs:
    """A step's answer for each row."""

    tokens: Int[Array, " R"]  # -1 where every token is ruled out
    logprobs: Float[Array, " R"]  # of the distribution the token was drawn from (scored rows: of the model's own)
    raw_logprobs: Float[Array, " R"]  # of the model's own distribution; 0 where not asked for
    entropies: Float[Array, " R"]  # in nats; 0 where not asked for
    ranks: Int[Array, " R"]  # 1 is the likeliest; 0 where not asked for
    top_ids: Int[Array, "R n"]
    top_logprobs: Float[Array, "R n"]
    named_logprobs: Float[Array, "R named"]  # of the slot's named_ids; no column where the step tells of none
    finite: Bool[Array, " R"]  # all logits were finite, and a token could be drawn
