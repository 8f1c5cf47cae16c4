"""The jitted steps, pure functions of (params, cache, inputs). The cache is donated."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.device import kv_cache, sampler
from jaxengine.device.kv_cache import Cache
from jaxengine.device.needs import Needs
from jaxengine.device.packed import Packed
from jaxengine.device.step_inputs import RequestArrays, RowOutputs, Rows, Slots, TokenRules
from jaxengine.models import decoder
from jaxengine.models.params import Decoder, specs
from jaxengine.ops.kernels import Kernels
from jaxengine.ops.query_blocks import QueryBlocks
from jaxengine.ops.tiles import Tile
from pallas_kernels.draw_reference import Draw
from pallas_kernels.tiles import unknown_zero
from sharding.mesh import WHOLE

STATIC = ("model_config", "kernels", "tile", "needs", "max_logprobs", "num_steps")
# What XLA may put into a GPU's command buffers: all that it knows. Left alone it keeps loops outside, steers each from
# the host, and so cuts a step into dozens of pieces.
ON_A_GPU = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,WHILE"}


def _jit_step(step: Callable, **how: Any) -> Any:
    static = [name for name in STATIC if name in inspect.signature(step).parameters]
    return jax.jit(step, static_argnames=static, donate_argnames="cache", **how)


@_jit_step
def prefill_step(
    params: Decoder,
    cache: Cache,
    tables: Int[Array, "slots n"],
    slots: Slots,
    inputs: Packed,
    *,
    model_config: ModelConfig,
    kernels: Kernels,
    tile: Tile,
    needs: Needs,
    max_logprobs: int,
) -> tuple[Cache, RowOutputs]:
    """Run prompt chunks and draw (or score) the token after each of the rows; `inputs` are (QueryBlocks, Rows, Copies).

    Drawn tokens are appended to the history.
    """
    step = functools.partial(_prefill, kernels.share(model_config), tile, needs, max_logprobs)
    return _on_each(kernels, model_config, step)(params, cache, tables, slots, inputs)


def _prefill(
    model_config: ModelConfig,
    tile: Tile,
    needs: Needs,
    max_logprobs: int,
    kernels: Kernels,
    params: Decoder,
    cache: Cache,
    tables: Int[Array, "slots n"],
    slots: Slots,
    inputs: Packed,
) -> tuple[Cache, RowOutputs]:
    blocks, rows, copies = inputs.unpack()
    cache, hidden = _run_blocks(model_config, kernels, params, cache, tables, blocks, tile)
    # Depends on `hidden`, so that the copies wait for the attention that reads the pools which they change: XLA on CPU
    # would otherwise copy all pools.
    cache = kv_cache.copy_pages(cache, copies.sources, copies.targets, copies.num_copies + unknown_zero(hidden))
    x = hidden[rows.indices]
    out = next_tokens(model_config, kernels, params, cache, slots, x, rows, kernels.head_tile, needs, max_logprobs)
    drawn = ~rows.scored & (jnp.arange(rows.slots.shape[0]) < rows.num_rows)
    return _append(cache, rows, out, drawn), out


@_jit_step
def decode_step(
    params: Decoder,
    cache: Cache,
    tables: Int[Array, "slots n"],
    slots: Slots,
    inputs: Packed,
    *,
    model_config: ModelConfig,
    kernels: Kernels,
    tile: Tile,
    needs: Needs,
    max_logprobs: int,
    num_steps: int,
) -> tuple[Cache, RowOutputs]:
    """`num_steps` tokens for each of the Rows in `inputs`, outputs `[num_steps, R]`.

    A row that reaches its limit is idle from there on.
    """
    step = functools.partial(_decode, kernels.share(model_config), tile, needs, max_logprobs, num_steps)
    return _on_each(kernels, model_config, step)(params, cache, tables, slots, inputs)


def _decode(
    model_config: ModelConfig,
    tile: Tile,
    needs: Needs,
    max_logprobs: int,
    num_steps: int,
    kernels: Kernels,
    params: Decoder,
    cache: Cache,
    tables: Int[Array, "slots n"],
    slots: Slots,
    inputs: Packed,
) -> tuple[Cache, RowOutputs]:
    rows: Rows = inputs.unpack()

    def one(cache: Cache, rows: Rows) -> tuple[Cache, RowOutputs]:
        # Position `limit` is the end of the sequence: the token before it is the last, and needs no successor.
        live = jnp.arange(rows.slots.shape[0]) < rows.num_rows
        live &= rows.positions + 1 < slots.request.limit[rows.slots]
        blocks = QueryBlocks(rows.slots, jnp.where(live, rows.positions, 0), live.astype(jnp.int32), rows.num_rows)
        cache, hidden = _run_blocks(model_config, kernels, params, cache, tables, blocks, tile)
        out = next_tokens(model_config, kernels, params, cache, slots, hidden, rows, tile.rows, needs, max_logprobs)
        return _append(cache, rows, out, ~rows.scored & live), out

    def step(cache: Cache, i: Array) -> tuple[Cache, RowOutputs]:
        return one(cache, dataclasses.replace(rows, positions=rows.positions + i))

    if num_steps == 1:
        cache, out = one(cache, rows)
        return cache, jax.tree.map(lambda x: x[None], out)
    return jax.lax.scan(step, cache, jnp.arange(num_steps, dtype=jnp.int32))


def _on_each(kernels: Kernels, model_config: ModelConfig, step: Callable) -> Callable:
    """The step on every device of a mesh. Each has its part of the weights and the pages, and all else whole."""
    inputs = specs(model_config), kv_cache.SPECS, WHOLE, WHOLE, WHOLE
    return kernels.on_each(step, *inputs, outputs=(kv_cache.SPECS, WHOLE))


@functools.cache
def captured(step: Any) -> Any:
    """The jitted step for a GPU: the same program, as one command buffer that the device steers by itself."""
    return _jit_step(step.__wrapped__, compiler_options=ON_A_GPU)


@jax.jit
def read_pages(cache: Cache, pages: Int[Array, " A"]) -> Cache:
    """The given pages of every layer."""

    def take(pool: Array) -> Array:
        return jnp.stack([jax.lax.dynamic_index_in_dim(pool, page, keepdims=False) for page in pages])

    return dataclasses.replace(cache, keys=tuple(map(take, cache.keys)), values=tuple(map(take, cache.values)))


@jax.jit
def all_finite(params: Decoder) -> Decoder:
    """For each leaf, whether all of it is finite."""
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), params)


def _run_blocks(
    model_config: ModelConfig,
    kernels: Kernels,
    params: Decoder,
    cache: Cache,
    tables: Int[Array, "slots n"],
    blocks: QueryBlocks,
    tile: Tile,
) -> tuple[Cache, Float[Array, "B*r D"]]:
    """The history's tokens of the blocks through the layers: the cache with their keys and values, and their hidden
    states.
    """
    positions = jnp.minimum(blocks.starts[:, None] + jnp.arange(tile.tokens), cache.history.shape[1] - 1)
    tokens = cache.history[blocks.slots[:, None], positions]
    keys, values, hidden = decoder.forward(
        model_config, kernels, params, cache.keys, cache.values, tables, blocks, tokens, tile
    )
    return dataclasses.replace(cache, keys=keys, values=values), hidden


def _append(cache: Cache, rows: Rows, out: RowOutputs, drawn: Bool[Array, " R"]) -> Cache:
    """Write the tokens of the rows that drew one after the positions that they follow."""
    slots = jnp.where(drawn, rows.slots, cache.history.shape[0])
    return dataclasses.replace(cache, history=cache.history.at[slots, rows.positions + 1].set(out.tokens, mode="drop"))


# -- head and sampler --------------------------------------------------------------------------------------------------


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
    fresh = _fresh(rows) if kernels.skips_repeated else None
    inputs = jax.tree.map(pad, _RowInputs(x, rows.slots, rows.positions, rows.scored, fresh))
    out = kernels.over_rows(body, tile, weights, inputs, rows.num_rows)
    return jax.tree.map(lambda a: a[: x.shape[0]], out)


def _fresh(rows: Rows) -> Bool[Array, " R"]:
    """Rows that are no padding, and whose hidden state is not that of the row before, as a group's samples' is."""
    is_new = rows.indices != jnp.roll(rows.indices, 1)
    return is_new & (jnp.arange(rows.indices.shape[0]) < rows.num_rows)


def next_token(
    model_config: ModelConfig, kernels: Kernels, needs: Needs, max_logprobs: int, weights: _Weights, rows: _RowInputs
) -> RowOutputs:
    """One tile of rows: logits, processed distribution, token, logprob and what else was asked for.

    On a mesh devices share the rows from the logits on.
    """
    leaves = kernels.products.leaves.sharing_rows(rows.x.shape[0])
    logits = decoder.logits(model_config, kernels.with_leaves(leaves), weights.norm, weights.head, rows.x, rows.fresh)
    rows = leaves.own_rows(rows)
    row: Slots = jax.tree.map(lambda a: a[rows.slots], weights.slots)
    request, history, position = row.request, weights.history, rows.positions + 1
    finite = (jnp.isfinite(logits) | (jnp.arange(logits.shape[1]) >= model_config.vocab_size)).all(-1)
    context = sampler.Context(history, rows.slots, position, request.prompt_length, request.first_stop, weights.rules)
    penalised, drawn_from = sampler.distribution(
        logits, row.sampling, context, rows.scored, kernels.draw.kept, needs, kernels.when
    )
    best = jnp.argmax(penalised, axis=-1).astype(jnp.int32)
    dead_end = finite & ~rows.scored & (jnp.take_along_axis(penalised, best[:, None], axis=-1)[:, 0] == -jnp.inf)
    follows = history[rows.slots, jnp.minimum(position, history.shape[1] - 1)]
    given = jnp.where(rows.scored, follows, jnp.where(row.sampling.temperature == 0, best, -1))
    uniforms = sampler.uniforms(sampler.fold_keys(request.key, request.key_folds, position))
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
    batch = out.logprobs.shape[0]
    named = request.named_ids if needs >= Needs.ALL else request.named_ids[:, :0]

    def asked() -> tuple[Array, Array, Array, Array]:
        logprobs = out.all_logprobs(drawn_from)
        values, ids = jax.lax.top_k(logprobs, n)
        ranks = (logprobs > out.logprobs[:, None]).sum(-1).astype(jnp.int32) + 1
        return ranks, ids, values, jnp.take_along_axis(logprobs, jnp.maximum(named, 0), axis=1)

    def not_asked() -> tuple[Array, Array, Array, Array]:
        nothing = jnp.zeros((batch, n), jnp.float32)
        return jnp.zeros(batch, jnp.int32), nothing.astype(jnp.int32), nothing, jnp.zeros(named.shape, jnp.float32)

    return kernels.when(request.likeliest.any(), asked, not_asked) if needs >= Needs.ALL else not_asked()
