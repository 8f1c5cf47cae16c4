"""The jitted steps, pure functions of (params, cache, inputs). The cache is donated."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.device import kv_cache
from jaxengine.device.head_and_draw import next_tokens
from jaxengine.device.kv_cache import Cache
from jaxengine.device.needs import Needs
from jaxengine.device.packed import Packed
from jaxengine.device.step_inputs import RowOutputs, Rows, Slots
from jaxengine.models import decoder
from jaxengine.models.params import Decoder, specs
from jaxengine.ops.kernels import Kernels
from jaxengine.ops.query_blocks import QueryBlocks
from jaxengine.ops.tiles import Tile
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

    Drawn tokens are appended to the history. A sequence that decodes may ride along, as a block of one token.
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
    cache, hidden = _run_blocks(model_config, kernels, params, cache, tables, blocks, tile, rows.indices.shape[0])
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
    size: int = 0,
) -> tuple[Cache, Float[Array, "R D"]]:
    """The history's tokens of the blocks through the layers: the cache with their keys and values, and their hidden
    states. `size` is the number of rows where the blocks have `first_rows`.
    """
    offsets = jnp.arange(tile.tokens, dtype=jnp.int32)
    positions = jnp.minimum(blocks.starts[:, None] + offsets, cache.history.shape[1] - 1)
    tokens = cache.history[blocks.slots[:, None], positions]
    if blocks.first_rows is None:
        tokens = tokens.reshape(-1)
    else:
        rows = jnp.where(offsets < blocks.counts[:, None], blocks.first_rows[:, None] + offsets, size)
        tokens = jnp.zeros(size, tokens.dtype).at[rows].set(tokens, mode="drop")
    keys, values, hidden = decoder.forward(
        model_config, kernels, params, cache.keys, cache.values, tables, blocks, tokens, tile
    )
    return dataclasses.replace(cache, keys=keys, values=values), hidden


def _append(cache: Cache, rows: Rows, out: RowOutputs, drawn: Bool[Array, " R"]) -> Cache:
    """Write the tokens of the rows that drew one after the positions that they follow."""
    slots = jnp.where(drawn, rows.slots, cache.history.shape[0])
    return dataclasses.replace(cache, history=cache.history.at[slots, rows.positions + 1].set(out.tokens, mode="drop"))
