"""The decoder that all families share, as pure functions of arrays.

The forward pass is a chain of pinned regions (ops/regions.py); between two regions only copying happens. Every region works on query
blocks: `[B, r, …]`, r consecutive tokens of one sequence. Decoding is r = 1. The residual stream is float32.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine import kv_cache
from jaxengine.config import KV_TILE, ModelConfig
from jaxengine.kv_cache import Cache
from jaxengine.models.params import Decoder, Layer
from jaxengine.ops.linear import split_outputs, sum_inputs
from jaxengine.ops.norm import rms_norm
from jaxengine.ops.regions import over_tiles
from jaxengine.ops.rope import cos_sin, rotate
from jaxengine.step_inputs import Blocks
from pallas_kernels.pinned_math import silu
from pallas_kernels.reference import paged_attention

# Query blocks that attention takes together, in every step: more do not stay in a CPU's cache, and with fewer XLA compiles
# the exponentials of so small an array to other bits.
ATTENTION_TILE = 8


@dataclasses.dataclass(frozen=True)
class Tile:
    """The shape of a step: `tokens` of one sequence to a block, `blocks` to a tile."""

    tokens: int
    blocks: int

    @property
    def rows(self) -> int:
        return self.tokens * self.blocks


def forward(config: ModelConfig, params: Decoder, cache: Cache, tables: Int[Array, "slots n"], blocks: Blocks, tile: Tile,
            tokens: Int[Array, "B r"] | None = None) -> tuple[Cache, Float[Array, "B r D"]]:
    """Run the blocks' tokens (the history's, unless given) through the layers: writes their keys and values, returns hidden states.

    Within one call a sequence's blocks see each other's keys, causally.
    """
    if tokens is None:
        tokens = gather_tokens(cache.history, blocks, tile.tokens)
    own_tables = tables[blocks.slots]
    count = blocks.num_blocks
    x = over_tiles(functools.partial(embed, config), tile.blocks, params.embed, tokens, count)
    keys, values = [], []
    for layer, old_keys, old_values in zip(params.layers, cache.keys, cache.values, strict=True):
        q, k, v = over_tiles(functools.partial(project, config), tile.blocks, layer, (x, blocks.starts), count)
        new_keys, new_values = kv_cache.write(old_keys, old_values, k, v, own_tables, blocks)
        attended = over_tiles(functools.partial(attend, config), ATTENTION_TILE, (new_keys, new_values),
                              (q, own_tables, blocks.starts), count)
        x = over_tiles(functools.partial(mix, config), tile.blocks, layer, (x, attended), count)
        keys.append(new_keys)
        values.append(new_values)
    return dataclasses.replace(cache, keys=tuple(keys), values=tuple(values)), x


def gather_tokens(history: Int[Array, "slots max_len"], blocks: Blocks, r: int) -> Int[Array, "B r"]:
    positions = jnp.minimum(blocks.starts[:, None] + jnp.arange(r), history.shape[1] - 1)
    return history[blocks.slots[:, None], positions]


def embed(config: ModelConfig, table: Float[Array, "leaf V D"], tokens: Int[Array, "B r"]) -> Float[Array, "B r D"]:
    """Rows of the embedding, one slice a token: a gather would make XLA on CPU widen the whole table first."""
    flat = table.reshape(-1, config.hidden_size)
    ids = tokens.reshape(-1)
    put = lambda i, out: jax.lax.dynamic_update_slice_in_dim(out, slice_widened(flat, ids[i], 1, 0, i), i, 0)
    rows = jax.lax.fori_loop(0, ids.shape[0], put, jnp.zeros((ids.shape[0], config.hidden_size), jnp.float32))
    return rows.reshape(*tokens.shape, config.hidden_size)


def slice_widened(x: Array, start: Array, size: int, axis: int, step: Array) -> Array:
    """`x[start : start + size]` along axis in float32, inside a loop at iteration `step`.

    XLA on CPU slices 16-bit floats by widening them first, and moves the widening of the whole array out of the loop.
    Tied to the loop's counter it has to stay, and is fused into the slice.
    """
    x, _ = jax.lax.optimization_barrier((x, step))
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis).astype(jnp.float32)


def project(config: ModelConfig, layer: Layer, rows: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """Queries (float32), keys and values (model dtype) of the blocks' tokens, `[B, r, heads, h]`."""
    x, starts = rows
    batch, r, width = x.shape
    attention, h = layer.attention, config.head_dim
    y = rms_norm(x.reshape(batch * r, width), layer.input_norm, config.rms_norm_eps)
    packed = split_outputs(y, attention.qkv)
    if attention.qkv_bias is not None:
        packed = packed + attention.qkv_bias.astype(jnp.float32)[:, None]
    queries, keys = (heads * h // config.reduction_leaves for heads in (config.num_attention_heads, config.num_key_value_heads))
    q, k, v = (_join_heads(part, h) for part in jnp.split(packed, [queries, queries + keys], axis=-1))
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = rms_norm(q, attention.q_norm, config.rms_norm_eps), rms_norm(k, attention.k_norm, config.rms_norm_eps)
    cos, sin = cos_sin((starts[:, None] + jnp.arange(r)).reshape(-1), config.rope, h)
    back = lambda y, dtype: y.reshape(batch, r, -1, h).astype(dtype)
    return back(rotate(q, cos, sin), jnp.float32), back(rotate(k, cos, sin), config.dtype), back(v, config.dtype)


def _join_heads(x: Float[Array, "leaf t _"], h: int) -> Float[Array, "t heads h"]:
    leaves, t, _ = x.shape
    return x.reshape(leaves, t, -1, h).transpose(1, 0, 2, 3).reshape(t, -1, h)


def attend(config: ModelConfig, pages: tuple[Array, Array], rows: tuple[Array, Array, Array]) -> Float[Array, "B r Hh"]:
    """Attention of the blocks over their sequences' pages."""
    q, tables, starts = rows
    out = paged_attention(q, *pages, tables, starts, scale=config.head_dim**-0.5, kv_tile=KV_TILE, dtype=jnp.dtype(config.dtype))
    return out.reshape(*out.shape[:2], -1).astype(config.dtype)


def mix(config: ModelConfig, layer: Layer, rows: tuple[Array, Array]) -> Float[Array, "B r D"]:
    """The residual stream after attention's output projection and the MLP."""
    x, attended = rows
    shape, leaves = x.shape, config.reduction_leaves
    x, attended = x.reshape(-1, shape[-1]), attended.reshape(-1, leaves, attended.shape[-1] // leaves)
    x = x + sum_inputs(attended.swapaxes(0, 1), layer.attention.out)
    if layer.attention.out_bias is not None:
        x = x + layer.attention.out_bias.astype(jnp.float32)
    gate, up = jnp.split(split_outputs(rms_norm(x, layer.post_norm, config.rms_norm_eps), layer.mlp.gate_up), 2, axis=-1)
    return (x + sum_inputs(silu(gate) * up, layer.mlp.down)).reshape(shape)


def logits(config: ModelConfig, norm: Array, head: Float[Array, "leaf V D"], x: Float[Array, "t D"]) -> Float[Array, "t V"]:
    """The output head in float32, whatever the weights' dtype. Rows behind the vocabulary are -inf.

    The hidden state is not rounded. For bfloat16 weights it is cut into three bfloat16 parts whose sum is the float32 number; their
    products with the weights are exact and are added in float32. So the head is read once, as it is stored, and never kept widened.
    """
    y = rms_norm(x, norm, config.rms_norm_eps)
    if head.dtype == jnp.bfloat16:
        high, middle, low = jnp.split(split_outputs(jnp.concatenate(_bfloat16_parts(y)), head), 3, axis=1)
        out = high + (middle + low)
    else:
        out = split_outputs(y, head.astype(jnp.float32))
    out = out.swapaxes(0, 1).reshape(x.shape[0], -1)
    return jnp.where(jnp.arange(out.shape[1]) < config.vocab_size, out, -jnp.inf)


def _bfloat16_parts(x: Float[Array, "t D"]) -> list[Array]:
    """Three bfloat16 arrays whose exact sum is x: each takes the next eight bits. Kept as float32 in between, so that nothing is folded."""
    parts = []
    for _ in range(3):
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts
