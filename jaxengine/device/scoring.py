"""Scoring: the float32 logprobs of given tokens, in the meaning that sampling gives the word, with the bits that
`generate` reported.

The head and the sampler's distribution run in a pinned region over the rows that are asked for alone, wherever they
stand.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxengine.base.pytree import pytree
from jaxengine.config import KV_TILE, ModelConfig
from jaxengine.device import sampler
from jaxengine.device.candidates import coarsened, with_likeliest
from jaxengine.device.grammar_mask import GrammarMask, allowed_words
from jaxengine.device.row_shares import on_shares
from jaxengine.device.sampling_arrays import distinct_rules, empty_sampling, write_sampling
from jaxengine.device.sampling_mask import SamplingMask, is_kept, packed
from jaxengine.device.step_inputs import SamplingArrays, TokenRules
from jaxengine.device.trunk import hidden_states
from jaxengine.models import decoder, plain
from jaxengine.models.params import TABLE_AXES, Decoder, initialise, specs
from jaxengine.ops.kernels import Kernels
from jaxengine.ops.regions import no_gradient, over_tiles
from jaxengine.ops.tiles import ScoringTiles
from jaxengine.sampling_params import SamplingParams, check_token_ids, stop_token_ids
from pallas_kernels.numbers import cdiv, ceil_to, power_of_two
from pallas_kernels.tiles import is_float, unknown_zero
from sharding.mesh import WHOLE
from sharding.rules import spec_of

BATCH_TOKENS = 8192  # that one call scores, padding included, where a caller has more


@pytree
class SequenceArrays:
    """The sampling parameters of each of B sequences."""

    sampling: SamplingArrays
    min_tokens: Int[Array, " B"]
    kept: SamplingMask | None = None  # in the place of what top-k, top-p and min-p would keep
    grammar: GrammarMask | None = None  # of sequences that have structured_outputs


@pytree
class ScoringArrays:
    """The sampling parameters of B sequences, as scoring takes them."""

    each: SequenceArrays
    rules: TokenRules  # the distinct ones among them


def sampling_arrays_of(
    params: Sequence[SamplingParams],
    model_config: ModelConfig,
    kept: SamplingMask | None = None,
    grammar: GrammarMask | None = None,
) -> ScoringArrays:
    """Sampling parameters of B sequences, as numpy arrays.

    Raises ValueError for tokens outside the vocabulary, for bad words that are not token ids yet, and for structured
    outputs without a grammar mask.
    """
    for i, each in enumerate(params):
        check_token_ids(each, model_config.vocab_size, f"sampling_params[{i}]")
        if each.structured_outputs is not None and grammar is None:
            raise ValueError(
                f"sampling_params[{i}] has structured_outputs: give the grammar_mask that jaxengine.grammar_mask finds"
            )
    arrays = empty_sampling(len(params))
    rows, rules = distinct_rules(params, model_config.padded_vocab_size)
    for i, each in enumerate(params):
        write_sampling(arrays, i, each, stop_token_ids(each, model_config.eos_token_ids), rows[i])
    min_tokens: Any = np.array([each.min_tokens for each in params], np.int32)
    return ScoringArrays(SequenceArrays(arrays, min_tokens, kept, grammar), rules)


@functools.partial(jax.jit, static_argnames=("model_config", "kernels", "entropy", "kept_words", "tiles"))
def token_logprobs(
    params: Decoder,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    arrays: ScoringArrays,
    *,
    model_config: ModelConfig,
    kernels: Kernels,
    tiles: ScoringTiles,
    entropy: bool = False,
    kept_words: bool = False,
) -> tuple[Float[Array, "B T"], Array | None]:
    """(logprobs, entropies if asked) of the tokens under `mask`, each at its own position, 0 elsewhere. Differentiable
    in params. With `kept_words`, which tokens each could have been (sampling_mask.packed) in the place of entropies.

    A run of tokens under the mask is a completion, and everything before it is its prompt. Tokens after the last one
    under the mask are never read; nothing predicts the first token, which is 0 too.
    Replicas share the sequences (row_shares.py).
    """

    def of_rows(kernels: Kernels, weights: tuple, rows: tuple) -> tuple[Array, Array | None]:
        (params, rules), (tokens, mask, each) = weights, rows
        how: dict[str, Any] = dict(model_config=model_config, kernels=kernels, tiles=tiles)
        x, tokens = trunk(params, tokens, mask, **how)
        arrays, asked = ScoringArrays(each, rules), dict(entropy=entropy, kept_words=kept_words)
        found = head_logprobs(params, x, tokens, mask, arrays, **asked, **how)
        return found.logprobs, found.kept_words if kept_words else found.entropies

    weights, rows = (params, arrays.rules), (tokens, mask, arrays.each)
    return on_shares(kernels, of_rows, (specs(model_config), WHOLE), weights, rows)


def trunk(
    params: Decoder,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    model_config: ModelConfig,
    kernels: Kernels,
    tiles: ScoringTiles,
) -> tuple[Float[Array, "B T D"], Int[Array, "B T"]]:
    """(residual stream after the last layer, wherever it predicts a token under `mask`; tokens, with 0 for ids outside
    the vocabulary).
    """
    tokens = jnp.where((tokens >= 0) & (tokens < model_config.vocab_size), tokens, 0).astype(jnp.int32)
    wanted = mask.at[:, 0].set(False)
    # The last token is predicted, and needs no forward pass of its own.
    lengths = jnp.where(wanted, jnp.arange(tokens.shape[1]), 0).max(-1)
    return hidden_states(model_config, kernels, params, tokens, lengths, tiles.layers), tokens


class _Weights(NamedTuple):
    """What all tiles of the region read."""

    norm: Float[Array, " D"]
    head: Float[Array, "leaf V D"]
    arrays: ScoringArrays
    tokens: Int[Array, "B T"]


_HEAD: Any = spec_of(TABLE_AXES)
_WHOLE: Any = WHOLE
_WEIGHT_SPECS = _Weights(_WHOLE, _HEAD, _WHOLE, _WHOLE)


class _RowInputs(NamedTuple):
    """What one tile of the region reads: of each row."""

    x: Float[Array, "t D"]  # the stream that predicts the token
    sequences: Int[Array, " t"]
    positions: Int[Array, " t"]
    prompts: Int[Array, " t"]  # where the completion begins that the token belongs to
    candidates: Int[Array, "t K"] | None


class Scores(NamedTuple):
    """Of each token, `[B, T]` or of one tile's rows `[t]`; None where not asked for."""

    logprobs: Array
    entropies: Array | None = None
    kept_words: Array | None = None
    candidates: Array | None = None  # logprobs of the candidates, and of the rest: [..., K + 1]
    candidate_ids: Array | None = None  # where the likeliest were looked for: [..., K]


def head_logprobs(
    params: Decoder,
    x: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    arrays: ScoringArrays,
    *,
    model_config: ModelConfig,
    kernels: Kernels,
    tiles: ScoringTiles,
    entropy: bool = False,
    kept_words: bool = False,
    candidates: Int[Array, "B T k"] | None = None,
    top_k: int = 0,
) -> Scores:
    """token_logprobs from what `trunk` gives: a critic shares the trunk (rl/critic.py).

    Of each position also the logprobs of `candidates` (candidates.py), which with `top_k` are the likeliest tokens and
    those; with `top_k` it has no gradient.
    """
    batch, length = tokens.shape
    where, wanted = jnp.arange(length), mask.at[:, 0].set(False)
    begins = mask & ~jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))
    prompts = jax.lax.cummax(jnp.where(begins, where, 0), axis=1)

    order = jnp.argsort(~wanted.reshape(-1), stable=True)
    order = jnp.pad(order, (0, -order.shape[0] % tiles.head_rows))
    sequences, positions = order // length, order % length
    ranks = jnp.arange(order.shape[0])
    # Of rows that nothing asks for, a place after the last: no two are equal, so the gradient adds nothing twice.
    places = jnp.where(ranks < wanted.sum(), order - 1, order.shape[0] + ranks)
    predicting = x.reshape(-1, x.shape[-1]).at[places].get(mode="fill", fill_value=0, unique_indices=True)
    named = None if candidates is None else candidates.reshape(batch * length, candidates.shape[-1])[order]
    rows = _RowInputs(predicting, sequences, positions, prompts.reshape(-1)[order], named)
    weights = _Weights(params.norm, params.output_head, _opaque(arrays, params, tokens), tokens)
    how = _HowRows(model_config, kernels, tiles.head_rows, entropy, kept_words, top_k)
    count = wanted.sum(dtype=jnp.int32) + unknown_zero(params.norm, tokens)
    found = _scored(how, weights, rows, count)

    def placed(scores: Array) -> Array:
        found = scores.at[jnp.argsort(order[: batch * length])].get(unique_indices=True)
        found = found.reshape(batch, length, *scores.shape[1:])
        return jnp.where(jnp.expand_dims(wanted, range(2, found.ndim)), found, 0)

    return jax.tree.map(placed, found)


class _HowRows(NamedTuple):
    """What the region is compiled for."""

    model_config: ModelConfig
    kernels: Kernels
    tile: int
    entropy: bool
    kept_words: bool
    top_k: int

    def region(self, kernels: Kernels, weights: _Weights, rows: _RowInputs, count: Array) -> Scores:
        """What `_row_scores` says of the first `count` rows, on one device."""
        body = functools.partial(_row_scores, self, kernels)
        return over_tiles(body, self.tile, weights, rows, count)


def _run_scored(how: _HowRows, weights: _Weights, rows: _RowInputs, count: Int[Array, ""]) -> Scores:
    """The region on every device."""
    return how.kernels.on_each(how.region, _WEIGHT_SPECS, WHOLE, WHOLE, outputs=WHOLE)(weights, rows, count)


_scored = jax.custom_vjp(_run_scored, nondiff_argnums=(0,))


def _scored_forward(how, weights, rows, count):
    return _scored(how, weights, rows, count), (weights, rows, count)


def _scored_backward(how, saved, cotangents):
    """On a mesh JAX would add up the cotangents of what lies on every device, and they are the same on every device."""
    weights, rows, count = saved

    def pull(kernels: Kernels, weights: _Weights, rows: _RowInputs, count: Array, cotangents: Any) -> Any:
        def apply(norm: Array, head: Array, x: Array) -> Any:
            given = weights._replace(norm=norm, head=head), rows._replace(x=x)
            return how.region(kernels, *given, count)

        _, pullback = jax.vjp(apply, weights.norm, weights.head, rows.x)
        return pullback(cotangents)

    each = how.kernels.on_each(pull, _WEIGHT_SPECS, *(WHOLE,) * 3, outputs=(WHOLE, _WEIGHT_SPECS.head, WHOLE))
    norm, head, x = each(weights, rows, count, cotangents)
    return (
        jax.tree.map(_zero_cotangent, weights)._replace(norm=norm, head=head),
        jax.tree.map(_zero_cotangent, rows)._replace(x=x),
        no_gradient(count),
    )


_scored.defvjp(_scored_forward, _scored_backward)


def _zero_cotangent(x: Array) -> Any:
    return jnp.zeros_like(x) if is_float(x) else no_gradient(x)


def _row_scores(how: _HowRows, kernels: Kernels, weights: _Weights, rows: _RowInputs) -> Scores:
    """One tile of rows. On a mesh devices share the rows from the logits on, as in head_and_draw.next_token."""
    leaves = kernels.products.leaves.sharing_rows(rows.x.shape[0])
    logits = decoder.logits(how.model_config, kernels.with_leaves(leaves), weights.norm, weights.head, rows.x)
    return leaves.all_rows(_scores_of(how, kernels, weights, leaves.own_rows(rows), logits))


def _scores_of(how: _HowRows, kernels: Kernels, weights: _Weights, rows: _RowInputs, logits: Array) -> Scores:
    grammar = weights.arrays.each.grammar
    allowed = None if grammar is None else allowed_words(grammar, rows.sequences, rows.positions)
    each = dataclasses.replace(weights.arrays.each, grammar=None)  # a row reads few of its words
    row: SequenceArrays = jax.lax.stop_gradient(jax.tree.map(operator.itemgetter(rows.sequences), each))
    first_stop = jnp.where(row.min_tokens > 0, rows.prompts + row.min_tokens, 0)
    context = sampler.Context(
        weights.tokens, rows.sequences, rows.positions, rows.prompts, first_stop, weights.arrays.rules, allowed
    )
    raw = jnp.zeros(rows.x.shape[0], bool)
    kept = kernels.draw.kept if row.kept is None else _as_drawn(is_kept(row.kept, rows.positions, logits.shape[1]))
    _, drawn_from = sampler.distribution(logits, row.sampling, context, raw, kept)
    out = kernels.draw.draw_and_score(drawn_from, weights.tokens[rows.sequences, rows.positions])
    scores = Scores(out.logprobs)
    if how.kept_words:
        scores = scores._replace(kept_words=packed(drawn_from))
    if how.entropy:
        scores = scores._replace(entropies=sampler.entropy(out.all_logprobs(drawn_from)))
    if rows.candidates is None:
        return scores
    logprobs = out.all_logprobs(drawn_from)
    if not how.top_k:
        return scores._replace(candidates=coarsened(logprobs, rows.candidates))
    ids = with_likeliest(logprobs, rows.candidates, how.top_k)
    return scores._replace(candidates=coarsened(logprobs, ids), candidate_ids=ids)


def _as_drawn(mask: Bool[Array, "t V"]) -> sampler.Kept:
    """What was kept when the tokens were drawn, in the place of what these logits would keep."""
    return lambda *_: mask


def _opaque(arrays: ScoringArrays, params: Decoder, tokens: Array) -> ScoringArrays:
    """The same numbers, as ones that XLA knows at run time only: it divides by a constant in another way than by an
    unknown number.
    """
    zero = unknown_zero(params.norm, tokens)
    return jax.tree.map(lambda x: jnp.where(zero == 0, x, jnp.zeros_like(x)), arrays)


def in_batches(
    params: Decoder, tokens: np.ndarray, mask: np.ndarray, arrays: ScoringArrays, *, kernels: Kernels, **how: Any
) -> tuple[np.ndarray, np.ndarray | None]:
    """token_logprobs over batches of a size that is bounded on each replica, as numpy arrays.

    Shapes are powers of two, so that few of them are ever compiled.
    """
    count, length = tokens.shape
    width = max(power_of_two(length), KV_TILE)
    own_rows = max(min(BATCH_TOKENS // width, power_of_two(cdiv(count, kernels.replicas))), 1)
    rows = own_rows * kernels.replicas
    tokens, mask, each = jax.tree.map(functools.partial(_padded, ceil_to(count, rows)), (tokens, mask, arrays.each))
    tokens, mask = (np.pad(x, ((0, 0), (0, width - length))) for x in (tokens, mask))
    found = []
    for first in range(0, count, rows):
        *batch, part = jax.tree.map(functools.partial(_cut, first, rows), (tokens, mask, each))
        found.append(token_logprobs(params, *batch, ScoringArrays(part, arrays.rules), kernels=kernels, **how))
    logprobs, entropies = zip(*found, strict=True)
    logprobs = np.concatenate([np.asarray(x) for x in logprobs])[:count, :length]
    if entropies[0] is None:
        return logprobs, None
    return logprobs, np.concatenate([np.asarray(x) for x in entropies])[:count, :length]


def _padded(rows: int, x: np.ndarray) -> np.ndarray:
    return np.pad(x, ((0, rows - x.shape[0]), *((0, 0),) * (x.ndim - 1)))


def _cut(first: int, rows: int, x: np.ndarray) -> np.ndarray:
    return x[first : first + rows]


# (model_config, key) -> parameters for a proof on this machine; compiled, so that no float32 copy of them is ever made.
random_params = jax.jit(initialise, static_argnums=0)


@functools.partial(jax.jit, static_argnames="model_config")
def plain_logprobs(params: Decoder, tokens: Int[Array, " T"], *, model_config: ModelConfig) -> Float[Array, " T"]:
    """Of each token, 0 for the first, under a plain float32 forward pass (models/plain.py): what drift is measured
    against.
    """
    logprobs = jax.nn.log_softmax(plain.logits(model_config, params, tokens[:-1]))
    return jnp.pad(jnp.take_along_axis(logprobs, tokens[1:, None], axis=-1)[:, 0], (1, 0))
