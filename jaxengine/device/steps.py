"""The jitted steps, pure functions of (params, cache, inputs). The only jax.jit of the engine is in here; the cache is donated."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

from jaxengine.config import ModelConfig
from jaxengine.device import kv_cache, sampler
from jaxengine.device.kv_cache import Cache
from jaxengine.device.step_inputs import Copies, QueryBlocks, RowOutputs, Rows, SamplingArrays
from jaxengine.models import decoder
from jaxengine.models.decoder import Tile
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import Kernels
from jaxengine.ops.regions import over_tiles
from pallas_kernels.draw_reference import Draw
from pallas_kernels.tiles import unknown_zero

HEAD_TILE = 8  # rows of the head in a prefill, where few of many rows draw


@functools.partial(
    jax.jit, static_argnames=("model_config", "kernels", "tile", "max_logprobs"), donate_argnames="cache"
)
def prefill_step(
    params: Decoder,
    cache: Cache,
    tables: Array,
    slots: SamplingArrays,
    blocks: QueryBlocks,
    rows: Rows,
    copies: Copies,
    *,
    model_config: ModelConfig,
    kernels: Kernels,
    tile: Tile,
    max_logprobs: int,
) -> tuple[Cache, RowOutputs]:
    """Run prompt chunks and draw (or score) the token after each of `rows`. Drawn tokens are appended to the history."""
    cache, hidden = decoder.forward(model_config, kernels, params, cache, tables, blocks, tile)
    # Copies wait for the attention that reads the pools they change: XLA on CPU would rather copy all pools than see to the order.
    cache = kv_cache.copy_pages(cache, copies.sources, copies.targets, copies.num_copies + unknown_zero(hidden))
    x = hidden.reshape(-1, hidden.shape[-1])[rows.indices]
    out = next_tokens(model_config, kernels, params, cache, slots, x, rows, HEAD_TILE, max_logprobs)
    return append(cache, rows, out), out


@functools.partial(
    jax.jit, static_argnames=("model_config", "kernels", "tile", "max_logprobs", "num_steps"), donate_argnames="cache"
)
def decode_step(
    params: Decoder,
    cache: Cache,
    tables: Array,
    slots: SamplingArrays,
    rows: Rows,
    *,
    model_config: ModelConfig,
    kernels: Kernels,
    tile: Tile,
    max_logprobs: int,
    num_steps: int,
) -> tuple[Cache, RowOutputs]:
    """`num_steps` tokens for each of `rows`, outputs `[num_steps, R]`. A row that reaches its limit is idle from there on."""
    lane = jnp.arange(rows.slots.shape[0])

    def one(cache: Cache, rows: Rows) -> tuple[Cache, RowOutputs]:
        # Position `limit` is the end of the sequence: the token before it is the last, and needs no successor.
        live = (lane < rows.num_rows) & (rows.positions + 1 < slots.limit[rows.slots])
        blocks = QueryBlocks(rows.slots, jnp.where(live, rows.positions, 0), live.astype(jnp.int32), rows.num_rows)
        cache, hidden = decoder.forward(model_config, kernels, params, cache, tables, blocks, tile)
        out = next_tokens(model_config, kernels, params, cache, slots, hidden[:, 0], rows, tile.rows, max_logprobs)
        return append(cache, rows, out, live), out

    def step(cache: Cache, i: Array) -> tuple[Cache, RowOutputs]:
        return one(cache, dataclasses.replace(rows, positions=rows.positions + i))

    if num_steps == 1:
        cache, out = one(cache, rows)
        return cache, jax.tree.map(lambda x: x[None], out)
    return jax.lax.scan(step, cache, jnp.arange(num_steps, dtype=jnp.int32))


@functools.partial(jax.jit, donate_argnames="cache")
def write_history(cache: Cache, slots: Int[Array, " A"], tokens: Int[Array, "A max_len"]) -> Cache:
    """Put whole sequences into their slots; a slot behind the last one is padding."""
    return dataclasses.replace(cache, history=cache.history.at[slots].set(tokens, mode="drop"))


@jax.jit
def read_pages(cache: Cache, pages: Int[Array, " A"]) -> Cache:
    """The given pages of every layer."""
    take = lambda pool: jnp.stack([jax.lax.dynamic_index_in_dim(pool, page, keepdims=False) for page in pages])
    return dataclasses.replace(cache, keys=tuple(map(take, cache.keys)), values=tuple(map(take, cache.values)))


token_sums = jax.jit(kv_cache.token_sums, static_argnames="kernels")


@jax.jit
def word_sums(x: Array) -> UInt32[Array, " 2"]:
    """Two checksums of an array's words, each of which is stirred with its place first: any single word that changes, changes both.

    Sums of integers are the same in any order, and so on any mesh. Other words have the same sums with a chance of about 2**-64.
    """
    rows = x.reshape(-1, x.shape[-1])
    words = rows.view(f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = lambda axis: jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    stirred = (words ^ ((place(0) * np.uint32(words.shape[1]) + place(1)) * np.uint32(0x9E3779B1))) * np.uint32(
        0x85EBCA6B
    )
    stirred = (stirred ^ (stirred >> 15)) * np.uint32(0xC2B2AE35)
    columns = (stirred ^ (stirred >> 13)).sum(0, dtype=jnp.uint32)
    odd = 2 * jnp.arange(columns.shape[0], dtype=jnp.uint32) + 1
    return jnp.stack([columns.sum(dtype=jnp.uint32), (columns * odd).sum(dtype=jnp.uint32)])


@jax.jit
def all_finite(params: Decoder) -> Decoder:
    """For each leaf, whether all of it is finite."""
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), params)


def append(cache: Cache, rows: Rows, out: RowOutputs, live: Array | None = None) -> Cache:
    """Write drawn tokens behind the positions they follow."""
    drawn = ~rows.scored & (jnp.arange(rows.slots.shape[0]) < rows.num_rows)
    drawn = drawn if live is None else drawn & live
    slots = jnp.where(drawn, rows.slots, cache.history.shape[0])
    return dataclasses.replace(cache, history=cache.history.at[slots, rows.positions + 1].set(out.tokens, mode="drop"))


def next_tokens(
    model_config: ModelConfig,
    kernels: Kernels,
    params: Decoder,
    cache: Cache,
    slots: SamplingArrays,
    x: Array,
    rows: Rows,
    tile: int,
    max_logprobs: int,
) -> RowOutputs:
    """Head and sampler over the rows, as one pinned region."""
    padding = -x.shape[0] % tile
    pad = lambda a: jnp.pad(a, ((0, padding), *((0, 0),) * (a.ndim - 1)))
    body = functools.partial(next_token, model_config, kernels, max_logprobs)
    weights = (params.norm, params.output_head, slots, cache.history)
    inputs = jax.tree.map(pad, (x, rows.slots, rows.positions, rows.scored))
    out = over_tiles(body, tile, weights, inputs, rows.num_rows)
    return jax.tree.map(lambda a: a[: x.shape[0]], out)


def next_token(
    model_config: ModelConfig, kernels: Kernels, max_logprobs: int, weights: tuple, inputs: tuple
) -> RowOutputs:
    """One tile of rows: logits, processed distribution, token, logprob and what else was asked for."""
    norm, head, slots, history = weights
    x, slot, position, scored = inputs
    row: SamplingArrays = jax.tree.map(lambda a: a[slot], slots)
    logits = decoder.logits(model_config, kernels, norm, head, x)
    finite = (jnp.isfinite(logits) | (jnp.arange(logits.shape[1]) >= model_config.vocab_size)).all(-1)
    penalised, drawn_from = sampler.distribution(logits, row, history, slot, position + 1, scored)
    best = jnp.argmax(penalised, axis=-1).astype(jnp.int32)
    dead_end = finite & ~scored & (jnp.take_along_axis(penalised, best[:, None], axis=-1)[:, 0] == -jnp.inf)
    follows = history[slot, jnp.minimum(position + 1, history.shape[1] - 1)]
    given = jnp.where(scored, follows, jnp.where(row.temperature == 0, best, -1))
    uniforms = sampler.uniforms(sampler.fold_keys(row.key, row.key_folds, position + 1))
    out = kernels.draw_and_score(drawn_from, given, uniforms)
    finite &= ~dead_end & ~jnp.isnan(out.logprobs)  # logits may be finite, and overflow when a temperature divides them
    raw, entropies = _details(kernels, logits, drawn_from, out, row)
    ranks, top_ids, top_logprobs = _likeliest(drawn_from, out, row, max_logprobs)
    return RowOutputs(
        jnp.where(dead_end, -1, out.tokens), out.logprobs, raw, entropies, ranks, top_ids, top_logprobs, finite
    )


def _details(kernels: Kernels, logits: Array, drawn_from: Array, out: Draw, row: SamplingArrays) -> tuple[Array, Array]:
    """(raw logprobs, entropies), zeros where no row asked."""
    asked = lambda: (kernels.draw_and_score(logits, out.tokens).logprobs, sampler.entropy(out.all_logprobs(drawn_from)))
    nothing = jnp.zeros(out.tokens.shape, jnp.float32)
    return jax.lax.cond(row.details.any(), asked, lambda: (nothing, nothing))


def _likeliest(drawn_from: Array, out: Draw, row: SamplingArrays, n: int) -> tuple[Array, Array, Array]:
    """(rank of the chosen token, likeliest ids, their logprobs), zeros where no row asked. Ties go to the lower id."""

    def asked():
        logprobs = out.all_logprobs(drawn_from)
        values, ids = jax.lax.top_k(logprobs, n)
        return (logprobs > out.logprobs[:, None]).sum(-1).astype(jnp.int32) + 1, ids, values

    batch = out.logprobs.shape[0]
    return jax.lax.cond(
        (row.num_logprobs > 0).any(),
        asked,
        lambda: (jnp.zeros(batch, jnp.int32), jnp.zeros((batch, n), jnp.int32), jnp.zeros((batch, n), jnp.float32)),
    )
