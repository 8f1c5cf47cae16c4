"""Slots as host arrays, numpy: SamplingParams and requests in the form in which a step, or the trainer, takes them."""

from collections.abc import Iterable, Sequence

import numpy as np

from jaxengine.device.step_inputs import RequestArrays, SamplingArrays, Slots, TokenRules
from jaxengine.sampling_params import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROB_TOKEN_IDS,
    MAX_STOPS,
    SamplingParams,
)
from pallas_kernels.numbers import cdiv, power_of_two

MAX_TOP_K = 2**31 - 1  # more than any vocabulary, and an int32
NO_RULES = -1
WORD = 32  # bits of a word of TokenRules.allowed
ALL = 2**WORD - 1  # a word that allows all of its tokens


def empty_slots(n: int) -> Slots:
    """n slots that change, cut and ask for nothing."""
    return Slots(empty_sampling(n), empty_requests(n))


def empty_sampling(n: int) -> SamplingArrays:
    """Parameters that leave n distributions as they are."""
    return SamplingArrays(
        temperature=np.ones(n, np.float32),
        top_p=np.ones(n, np.float32),
        min_p=np.zeros(n, np.float32),
        repetition_penalty=np.ones(n, np.float32),
        presence_penalty=np.zeros(n, np.float32),
        frequency_penalty=np.zeros(n, np.float32),
        top_k=np.zeros(n, np.int32),
        stop_ids=_nothing(n, MAX_STOPS),
        rules=np.full(n, NO_RULES, np.int32),
    )


def empty_requests(n: int) -> RequestArrays:
    """n requests of no tokens."""
    return RequestArrays(
        prompt_length=np.zeros(n, np.int32),
        first_stop=np.zeros(n, np.int32),
        limit=np.zeros(n, np.int32),
        key=np.zeros((n, 2), np.uint32),
        key_folds=_nothing(n, 2),
        likeliest=np.zeros(n, bool),
        named_ids=_nothing(n, MAX_LOGPROB_TOKEN_IDS),
        details=np.zeros(n, bool),
    )


def _nothing(*shape: int) -> np.ndarray:
    return np.full(shape, -1, np.int32)


def write_sampling(
    arrays: SamplingArrays, i: int, sampling: SamplingParams, stop_token_ids: Iterable[int], rules: int = NO_RULES
) -> None:
    """Put a request's parameters into slot i.

    `stop_token_ids` are its own and the model's, `rules` is the row of TokenRules that holds its token rules.
    """
    assert rules != NO_RULES or not sampling.has_token_rules
    arrays.temperature[i] = 0.0 if sampling.greedy else sampling.temperature
    arrays.top_k[i] = min(sampling.top_k, MAX_TOP_K)
    for name in ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        getattr(arrays, name)[i] = getattr(sampling, name)
    arrays.stop_ids[i] = _padded(sorted(stop_token_ids), MAX_STOPS, -1)
    arrays.rules[i] = rules


def token_rules(samplings: Sequence[SamplingParams], vocab_size: int) -> TokenRules:
    """A row of rules for each of the parameters, bad words as token ids."""
    n = len(samplings)
    rules = TokenRules(
        bias_ids=_nothing(n, MAX_LOGIT_BIAS),
        bias_values=np.zeros((n, MAX_LOGIT_BIAS), np.float32),
        allowed=np.full((n, cdiv(vocab_size, WORD)), ALL, np.uint32),
        bad_words=_nothing(n, MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS),
    )
    for i, sampling in enumerate(samplings):
        rules.bias_ids[i] = _padded([token for token, _ in sampling.biases], MAX_LOGIT_BIAS, -1)
        rules.bias_values[i] = _padded([value for _, value in sampling.biases], MAX_LOGIT_BIAS, 0)
        if sampling.allowed_token_ids is not None:
            rules.allowed[i] = words_of_tokens(sampling.allowed_token_ids, rules.allowed.shape[1])
        for word, token_ids in zip(rules.bad_words[i], sampling.bad_words_token_ids, strict=False):
            word[-len(token_ids) :] = token_ids
    return rules


def distinct_rules(samplings: Sequence[SamplingParams], vocab_size: int) -> tuple[list[int], TokenRules]:
    """(the row of each one's rules or NO_RULES, rows of the rules that differ).

    The number of rows is a power of two, so that few shapes are ever compiled.
    """
    distinct = {sampling.token_rules: sampling for sampling in samplings if sampling.has_token_rules}
    rows = {rules: row for row, rules in enumerate(distinct)}
    padding = power_of_two(max(len(rows), 1)) - len(rows)
    rules = token_rules([*distinct.values(), *[SamplingParams()] * padding], vocab_size)
    return [rows.get(sampling.token_rules, NO_RULES) for sampling in samplings], rules


def words_of_tokens(token_ids: Iterable[int], num_words: int) -> np.ndarray:
    """Words in which the bits of these tokens are set."""
    is_set = np.zeros(num_words * WORD, bool)
    is_set[list(token_ids)] = True
    return np.packbits(is_set, bitorder="little").view("<u4")


def named_ids(sampling: SamplingParams) -> list[float]:
    """RequestArrays.named_ids of a request with these parameters."""
    return _padded(sampling.logprob_token_ids, MAX_LOGPROB_TOKEN_IDS, -1)


def write_request(arrays: RequestArrays, i: int, **values: object) -> None:
    """Put the named values into slot i."""
    for name, value in values.items():
        getattr(arrays, name)[i] = value


def _padded(values: Sequence[float], size: int, fill: int) -> list[float]:
    return [*values, *[fill] * (size - len(values))]
