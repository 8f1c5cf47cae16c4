"""The engine once more, written to be read: one sequence, one token at a time, the whole sequence so far for each.

Logits are models/plain.py's. What is drawn from them follows what device/sampler.py says, not its code: sorting instead
of bisection, float64 instead of pinned sums. Every choice says by how little it was made, so that rounding can be told
from a mistake.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxengine import SamplingParams
from jaxengine.config import VOCAB_BLOCK, ModelConfig
from jaxengine.models import plain
from jaxengine.models.params import Decoder

LENGTH = 128  # sequences are padded to it: what comes after a token cannot change it, and a model compiles once


@dataclasses.dataclass(frozen=True)
class Choice:
    """A token and the distribution it was drawn from."""

    token: int
    logprobs: np.ndarray  # float64 [V], as `token_logprobs` means it
    raw: np.ndarray  # float64 [V], of the model's own distribution
    margin: float  # how far the closest of its comparisons was from falling the other way, in nats or in probability


@functools.partial(jax.jit, static_argnames="config")
def _logits(config: ModelConfig, params: Decoder, tokens, last):
    return plain.logits(config, params, tokens)[last]


def next_logits(config: ModelConfig, params: Decoder, tokens: list[int]) -> np.ndarray:
    """Logits of the token after `tokens`, float64 [V]."""
    padded = jnp.array(tokens + [0] * (LENGTH - len(tokens)))
    return np.asarray(_logits(config, params, padded, len(tokens) - 1), np.float64)


def choose(
    logits: np.ndarray, params: SamplingParams, stops: frozenset[int], prompt: list[int], generated: list[int], key
) -> Choice:
    """The token after prompt + generated. `key` is the sample's, before the position is folded in."""
    raw = log_softmax(logits)
    ruled = biased(ruled_out(logits, params, generated), params, stops, len(generated))
    adjusted = penalised(ruled, params, prompt, generated)
    if params.temperature == 0:
        first, second = (np.sort(adjusted)[::-1].tolist() + [-math.inf])[:2]
        return Choice(int(adjusted.argmax()), raw, raw, first - second)
    kept, cut_margin = support(adjusted / params.temperature, params)
    logprobs = log_softmax(np.where(kept, adjusted / params.temperature, -np.inf))
    token, draw_margin = draw(np.exp(logprobs), jax.random.fold_in(key, len(prompt) + len(generated)))
    return Choice(token, logprobs, raw, min(cut_margin, draw_margin))


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max()
    return shifted - math.log(np.exp(shifted).sum())


def ruled_out(logits: np.ndarray, params: SamplingParams, generated: list[int]) -> np.ndarray:
    """Only what is allowed, and no token that would complete a bad word."""
    logits = logits.copy()
    if params.allowed_token_ids is not None:
        others = set(range(len(logits))) - set(params.allowed_token_ids)
        logits[list(others)] = -np.inf
    for *begin, last in params.bad_words_token_ids:
        if generated[max(len(generated) - len(begin), 0) :] == begin:
            logits[last] = -np.inf
    return logits


def biased(logits: np.ndarray, params: SamplingParams, stops: frozenset[int], num_generated: int) -> np.ndarray:
    """The caller's bias added, and no end before min_tokens."""
    logits = logits.copy()
    for token, value in params.biases:
        logits[token] += value
    if num_generated < params.min_tokens:
        logits[list(stops)] = -np.inf
    return logits


def penalised(logits: np.ndarray, params: SamplingParams, prompt: list[int], generated: list[int]) -> np.ndarray:
    """The repetition penalty falls on tokens of prompt and completion, the others on those of the completion alone."""
    logits = logits.copy()
    for token in set(prompt + generated):
        logits[token] *= 1 / params.repetition_penalty if logits[token] > 0 else params.repetition_penalty
    for token in set(generated):
        logits[token] -= params.presence_penalty + params.frequency_penalty * generated.count(token)
    return logits


def support(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, float]:
    """(what top-k, then top-p, then min-p keep, margin). Ties go to the lower id."""
    ids, margins = np.argsort(-logits, kind="stable"), [math.inf]
    if 0 < params.top_k < len(ids):
        last, next_one = logits[ids[params.top_k - 1 : params.top_k + 1]]
        margins.append(last - next_one if next_one > -math.inf else math.inf)
        ids = ids[: params.top_k]
    p = np.exp(log_softmax(logits[ids]))
    ratios = p / p[0]
    if params.top_p < 1:
        mass = np.cumsum(p)
        margins.append(np.abs(mass[:-1] - params.top_p).min(initial=math.inf))
        ids = ids[: 1 + int((mass < params.top_p).sum())]
    if params.min_p > 0:
        margins.append(np.abs(ratios[1:] - params.min_p).min(initial=math.inf))
        ids = ids[ratios[: len(ids)] >= params.min_p]
    kept = np.zeros(len(logits), bool)
    kept[ids] = True
    return kept, min(margins)


def draw(probs: np.ndarray, key) -> tuple[int, float]:
    """(token, margin). One uniform picks a block of the vocabulary, the next a token within it, both by inverse CDF."""
    first, second = np.asarray(jax.random.uniform(key, (2,)), np.float64)
    blocks = np.pad(probs, (0, -len(probs) % VOCAB_BLOCK)).reshape(-1, VOCAB_BLOCK)
    block, block_margin = inverse_cdf(blocks.sum(1), first)
    token, token_margin = inverse_cdf(blocks[block], second)
    return block * VOCAB_BLOCK + token, min(block_margin, token_margin)


def inverse_cdf(weights: np.ndarray, u: float) -> tuple[int, float]:
    """(the first index whose cumulative share exceeds u, how far u is from the nearest share)."""
    shares = np.cumsum(weights) / weights.sum()
    return int((shares <= u).sum()), float(np.abs(shares - u).min())


def sample_key(key, prompt_index: int, params: SamplingParams, sample_index: int):
    """One sample's key: the call's, or the request's own, which takes the place of both folds where n is 1."""
    if params.seed is None:
        return jax.random.fold_in(jax.random.fold_in(key, prompt_index), sample_index)
    own = jax.random.key(params.seed)
    return own if params.n == 1 else jax.random.fold_in(own, sample_index)


def ending(params: SamplingParams, stops: frozenset[int], prompt: list[int], generated: list[int]) -> str | None:
    """Why a sample ends after its last token, or None."""
    if generated[-1] in stops and len(generated) >= params.min_tokens:
        return "stop"
    return "length" if len(generated) == params.max_tokens or len(prompt + generated) == LENGTH else None
