"""The end of a step: from the rows' hidden states to their tokens, with what else was asked for."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.device import sampler
from jaxengine.device.kv_cache import Cache
from jaxengine.device.needs import Needs
from jaxengine.device.step_inputs import RequestArrays, RowOutputs, Rows, SamplingArrays, Slots, TokenRules
from jaxengine.models import decoder
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import Kernels
from pallas_kernels.draw_reference import Draw
from pallas_kernels.wanted import DRAWN, LIKELIEST, Wanted


class _Weights(NamedTuple):
    """What all tiles of the region read."""

    norm: Float[Array, " D"]
    head: Float[Array, "leaf V D"]
    slots: Slots
    history: Int[Array, "slots max_len"]
    rules: TokenRules


class _RowInputs(NamedTuple):
    """What one tile of the region reads: of each row."""

    x: Float[Array, "t D"]
    slots: Int[Array, " t"]
    positions: Int[Array, " t"]
    scored: Bool[Array, " t"]
    fresh: Bool[Array, " t"] | None  # as in `Products.logits`
    live: Bool[Array, " t"]  # no padding


def next_tokens(
    model_config: ModelConfig,
    kernels: Kernels,
    params: Decoder,
    cache: Cache,
    slots: Slots,
    x: Float[Array, "R D"],
    rows: Rows,
    tile: int,
    needs: Needs,
    max_logprobs: int,
) -> RowOutputs:
    """Head and sampler over the rows, which ask for no more than `needs`, as one pinned region."""
    padding = -x.shape[0] % tile

    def pad(a: Array) -> Array:
        return jnp.pad(a, ((0, padding), *((0, 0),) * (a.ndim - 1)))

    body = functools.partial(next_token, model_config, kernels, needs, max_logprobs)
    weights = _Weights(params.norm, params.output_head, slots, cache.history, cache.rules)
    live = jnp.arange(x.shape[0]) < rows.num_rows
    fresh = _fresh(rows) if kernels.skips_repeated else None
    inputs = jax.tree.map(pad, _RowInputs(x, rows.slots, rows.positions, rows.scored, fresh, live))
    out = kernels.over_rows(body, tile, weights, inputs, rows.num_rows)
    return jax.tree.map(lambda a: a[: x.shape[0]], out)


def _fresh(rows: Rows) -> Bool[Array, " R"]:
    """Rows that are no padding, and whose hidden state is not that of the row before, as a group's samples' is."""
    is_new = rows.indices != jnp.roll(rows.indices, 1)
    return is_new & (jnp.arange(rows.indices.shape[0]) < rows.num_rows)


class _Asked(NamedTuple):
    """What a tile's rows ask for, with a batch axis `t`."""

    sampling: SamplingArrays  # nothing, where a row is scored
    request: RequestArrays
    context: sampler.Context
    scored: Bool[Array, " t"]
    given: Int[Array, " t"]  # the next token, where a row is scored
    uniforms: Float[Array, "t 2"]


def _asked(weights: _Weights, rows: _RowInputs) -> _Asked:
    slots: Slots = jax.tree.map(lambda a: a[rows.slots], weights.slots)
    request, history, position = slots.request, weights.history, rows.positions + 1
    context = sampler.Context(history, rows.slots, position, request.prompt_length, request.first_stop, weights.rules)
    follows = history[rows.slots, jnp.minimum(position, history.shape[1] - 1)]
    uniforms = sampler.uniforms(sampler.fold_keys(request.key, request.key_folds, position))
    sampling = sampler.asking_nothing(slots.sampling, rows.scored)
    return _Asked(sampling, request, context, rows.scored, follows, uniforms)


def next_token(
    model_config: ModelConfig, kernels: Kernels, needs: Needs, max_logprobs: int, weights: _Weights, rows: _RowInputs
) -> RowOutputs:
    """One tile of rows: logits, processed distribution, token, logprob and what else was asked for.

    Kernels may do all that most rows ask for in one op. On a mesh devices share the rows from the logits on.
    """

    def by_ops() -> RowOutputs:
        return _by_ops(model_config, kernels, needs, max_logprobs, weights, rows)

    if kernels.head_and_draw is None:
        return by_ops()
    asked = _asked(weights, rows)

    def in_one_op() -> RowOutputs:
        return _in_one_op(model_config, kernels, needs, max_logprobs, weights, rows, asked)

    if needs < Needs.ALL:
        return in_one_op()
    only_cuts = rows.scored | sampler.asks_only_for_cuts(asked.sampling, asked.context)
    wants_more = ~only_cuts | asked.request.details | asked.request.likeliest
    return kernels.when((wants_more & rows.live).any(), by_ops, in_one_op)


def _in_one_op(
    model_config: ModelConfig,
    kernels: Kernels,
    needs: Needs,
    max_logprobs: int,
    weights: _Weights,
    rows: _RowInputs,
    asked: _Asked,
) -> RowOutputs:
    """Of rows that ask for no more than a token of the model's distribution, or of the likeliest part of it."""
    sampling, is_greedy = asked.sampling, asked.sampling.temperature == 0
    wanted = Wanted(
        rows.fresh,
        rows.live,
        jnp.where(is_greedy, 1.0, sampling.temperature),
        jnp.where(is_greedy, 0, sampling.top_k),
        jnp.where(is_greedy, 1.0, sampling.top_p),
        jnp.where(is_greedy, 0.0, sampling.min_p),
        jnp.where(asked.scored, asked.given, jnp.where(is_greedy, LIKELIEST, DRAWN)),
        asked.uniforms,
    )
    assert kernels.head_and_draw is not None
    tokens, logprobs, finite = kernels.head_and_draw(
        rows.x, weights.norm, model_config.rms_norm_eps, weights.head, wanted, model_config.vocab_size
    )
    nothing = jnp.zeros_like(logprobs)
    ranks, top_ids, top_logprobs, named = _nothing_likely(asked.request, needs, max_logprobs)
    return RowOutputs(tokens, logprobs, nothing, nothing, ranks, top_ids, top_logprobs, named, finite)


def _by_ops(
    model_config: ModelConfig, kernels: Kernels, needs: Needs, max_logprobs: int, weights: _Weights, rows: _RowInputs
) -> RowOutputs:
    leaves = kernels.products.leaves.sharing_rows(rows.x.shape[0])
    logits = decoder.logits(model_config, kernels.with_leaves(leaves), weights.norm, weights.head, rows.x, rows.fresh)
    rows = leaves.own_rows(rows)
    sampling, request, context, scored, follows, uniforms = _asked(weights, rows)
    finite = (jnp.isfinite(logits) | (jnp.arange(logits.shape[1]) >= model_config.vocab_size)).all(-1)
    penalised, drawn_from = sampler.distribution(
        logits, sampling, context, scored, kernels.draw.kept, needs, kernels.when
    )
    best = jnp.argmax(penalised, axis=-1).astype(jnp.int32)
    dead_end = finite & ~scored & (jnp.take_along_axis(penalised, best[:, None], axis=-1)[:, 0] == -jnp.inf)
    given = jnp.where(scored, follows, jnp.where(sampling.temperature == 0, best, -1))
    out = kernels.draw.draw_and_score(drawn_from, given, uniforms)
    finite &= ~dead_end & ~jnp.isnan(out.logprobs)  # logits may be finite, and overflow when a temperature divides them
    raw_logprobs, entropies = _details(kernels, logits, drawn_from, out, request, needs)
    ranks, top_ids, top_logprobs, named = _likeliest(kernels, drawn_from, out, request, needs, max_logprobs)
    answers = RowOutputs(
        tokens=jnp.where(dead_end, -1, out.tokens),
        logprobs=out.logprobs,
        raw_logprobs=raw_logprobs,
        entropies=entropies,
        ranks=ranks,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        named_logprobs=named,
        finite=finite,
    )
    return leaves.all_rows(answers)


def _details(
    kernels: Kernels,
    logits: Float[Array, "t V"],
    drawn_from: Float[Array, "t V"],
    out: Draw,
    request: RequestArrays,
    needs: Needs,
) -> tuple[Float[Array, " t"], Float[Array, " t"]]:
    """(raw logprobs, entropies), zeros where no row asked."""

    def asked() -> tuple[Array, Array]:
        raw = kernels.draw.draw_and_score(logits, out.tokens)
        return raw.logprobs, sampler.entropy(out.all_logprobs(drawn_from))

    def not_asked() -> tuple[Array, Array]:
        nothing = jnp.zeros(out.tokens.shape, jnp.float32)
        return nothing, nothing

    return kernels.when(request.details.any(), asked, not_asked) if needs >= Needs.ALL else not_asked()


def _likeliest(
    kernels: Kernels, drawn_from: Float[Array, "t V"], out: Draw, request: RequestArrays, needs: Needs, n: int
) -> tuple[Int[Array, " t"], Int[Array, "t n"], Float[Array, "t n"], Float[Array, "t m"]]:
    """(rank of the chosen token, likeliest ids, their logprobs, those of the named ids), zeros where no row asked. Ties
    go to the lower id.
    """
    named = request.named_ids

    def asked() -> tuple[Array, Array, Array, Array]:
        logprobs = out.all_logprobs(drawn_from)
        values, ids = jax.lax.top_k(logprobs, n)
        ranks = (logprobs > out.logprobs[:, None]).sum(-1).astype(jnp.int32) + 1
        return ranks, ids, values, jnp.take_along_axis(logprobs, jnp.maximum(named, 0), axis=1)

    def not_asked() -> tuple[Array, Array, Array, Array]:
        return _nothing_likely(request, needs, n)

    return kernels.when(request.likeliest.any(), asked, not_asked) if needs >= Needs.ALL else not_asked()


def _nothing_likely(
    request: RequestArrays, needs: Needs, n: int
) -> tuple[Int[Array, " t"], Int[Array, "t n"], Float[Array, "t n"], Float[Array, "t m"]]:
    """_likeliest's zeros; no named ids where a step tells of none."""
    batch, named = request.named_ids.shape
    nothing = jnp.zeros((batch, n), jnp.float32)
    of_named = jnp.zeros((batch, named if needs >= Needs.ALL else 0), jnp.float32)
    return jnp.zeros(batch, jnp.int32), nothing.astype(jnp.int32), nothing, of_named
