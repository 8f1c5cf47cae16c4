"""Grammar masks: of each token, which tokens a grammar let stand in its place.

A step has them among its token rules (TokenRules.allowed), written anew for each of its tokens. Scoring takes those of
whole sequences, so that a token is scored over the tokens that could have been drawn.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from jaxengine.base.pytree import pytree
from jaxengine.config import ModelConfig
from jaxengine.device.sampling_arrays import ALL as EVERY
from jaxengine.device.sampling_arrays import WORD, words_of_tokens
from jaxengine.sampling_params import SamplingParams, stop_token_ids
from jaxengine.text.grammar import Allowed, Grammar
from jaxengine.text.tokenizer import Tokenizer
from pallas_kernels.numbers import cdiv, power_of_two

ANY = -1


@pytree
class GrammarMask:
    """What the grammars of B sequences allow, numpy's arrays or JAX's.

    V / 8 bytes for each row of words; a sequence's tokens share those that are equal, so that M, a power of two, is
    seldom large.
    """

    rows: Int[Any, "B T"]  # the row of words that holds for the token at this position; -1: all tokens are allowed
    words: UInt32[Any, "B M words"]  # as TokenRules.allowed


def allowed_words(own: GrammarMask, sequences: Int[Array, " t"], positions: Int[Array, " t"]) -> UInt32[Array, "t W"]:
    """What is allowed at one position of each of t sequences."""
    rows = own.rows[sequences, positions]
    return jnp.where((rows == ANY)[:, None], jnp.uint32(EVERY), own.words[sequences, rows])


def words_of(allowed: Allowed, sampling: SamplingParams, stops: Sequence[int], num_words: int) -> np.ndarray:
    """The words, uint32 `[num_words]`, of what a grammar, the end tokens and allowed_token_ids let follow."""
    words = np.zeros(num_words * 4, np.uint8)
    bits = np.frombuffer(allowed.bits, np.uint8)[: len(words)]
    words[: len(bits)] = bits
    words = words.view("<u4")
    if allowed.may_end:
        words |= words_of_tokens(stops, num_words)
    if sampling.allowed_token_ids is not None:
        words &= words_of_tokens(sampling.allowed_token_ids, num_words)
    return words


def find_grammar_mask(
    tokens: Int[np.ndarray, "B T"],
    mask: Bool[np.ndarray, "B T"],
    samplings: Sequence[SamplingParams],
    tokenizer: Tokenizer | None,
    model_config: ModelConfig,
) -> GrammarMask | None:
    """The grammar mask of sequences, as `score` takes them; None where no sampling parameters have a grammar.

    It follows from tokens and grammars alone, whatever the weights. Raises ValueError for a token that its grammar does
    not allow there, and where there is a grammar and no tokenizer.
    """
    if all(sampling.structured_outputs is None for sampling in samplings):
        return None
    num_words = cdiv(model_config.padded_vocab_size, WORD)
    rows, distinct = np.full(tokens.shape, ANY, np.int32), []
    for index, sampling in enumerate(samplings):
        found: dict[bytes, int] = {}
        if sampling.structure is not None:
            if tokenizer is None:
                raise ValueError(f"sampling_params[{index}] has structured_outputs, which takes a tokenizer")
            grammar, stops = tokenizer.grammars.compiled(sampling.structure), _stops(sampling, model_config)
            for position, allowed in _along(tokens[index], mask[index], grammar):
                words = words_of(allowed, sampling, stops, num_words)
                _check_allowed(index, position, int(tokens[index, position]), words)
                rows[index, position] = found.setdefault(words.tobytes(), len(found))
        distinct.append(np.frombuffer(b"".join(found), "<u4").reshape(len(found), num_words))
    most = power_of_two(max(1, max(map(len, distinct))))
    words = np.zeros((len(samplings), most, num_words), np.uint32)
    for own, each in zip(words, distinct, strict=True):
        own[: len(each)] = each
    return GrammarMask(rows, words)


def _stops(sampling: SamplingParams, model_config: ModelConfig) -> list[int]:
    return sorted(stop_token_ids(sampling, model_config.eos_token_ids))


def _along(
    tokens: Int[np.ndarray, " T"], mask: Bool[np.ndarray, " T"], grammar: Grammar
) -> Iterator[tuple[int, Allowed]]:
    """(position, what the grammar allows there) of each token under the mask; each run of them is a completion."""
    places = np.flatnonzero(mask)
    for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1):
        matcher, drawn = grammar.matcher(), []
        for position in run.tolist():
            yield position, matcher.after(drawn)
            drawn.append(int(tokens[position]))


def _check_allowed(row: int, position: int, token: int, words: np.ndarray) -> None:
    if not words[token // WORD] >> (token % WORD) & 1:
        raise ValueError(
            f"tokens[{row}, {position}] is {token}, which structured_outputs do not allow there: give the sampling "
            "parameters that drew it"
        )
