"""The decoder that all families share, as pure functions of arrays.

The forward pass is a chain of pinned regions (ops/regions.py); between two regions only copying happens. Every region works on query
blocks: `[B, r, …]`, r consecutive tokens of one sequence. Decoding is r = 1. The residual stream is float32.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.device.kv_cache import Cache
from jaxengine.device.step_inputs import QueryBlocks
from jaxengine.models.params import Decoder, Layer
from jaxengine.ops.kernels import Kernels
from jaxengine.ops.norm import rms_norm
from jaxengine.ops.regions import over_tiles
from jaxengine.ops.rope import cos_sin, rotate


@dataclasses.dataclass(frozen=True)
class Tile:
    """The shape of a step: `tokens` of one sequence to a block, `blocks` to a tile."""

    tokens: int
    blocks: int

    @property
    def rows(self) -> int:
        return self.tokens * self.blocks


def forward(
    model_config: ModelConfig,
    kernels: Kernels,
    params: Decoder,
    cache: Cache,
    tables: Int[Array, "slots n"],
    blocks: QueryBlocks,
    tile: Tile,
    tokens: Int[Array, "B r"] | None = None,
) -> tuple[Cache, Float[Array, "B r D"]]:
    """Run the blocks' tokens (the history's, unless given) through the layers: writes their keys and values, returns hidden states.

    Within one call a sequence's blocks see each other's keys, causally.
    """
    if tokens is None:
        tokens = gather_tokens(cache.history, blocks, tile.tokens)
    tables = kernels.tables(tables, blocks)
    count = blocks.num_blocks
    x = over_tiles(functools.partial(embed, model_config, kernels), tile.blocks, params.embed, tokens, count)
    keys, values = [], []
    for layer, old_keys, old_values in zip(params.layers, cache.keys, cache.values, strict=True):
        q, k, v = over_tiles(
            functools.partial(project, model_config, kernels), tile.blocks, layer, (x, blocks.starts), count
        )
        new_keys, new_values = kernels.write(old_keys, old_values, k, v, tables, blocks)
        attended = kernels.attend(model_config, new_keys, new_values, q, tables, blocks)
        x = over_tiles(functools.partial(mix, model_config, kernels), tile.blocks, layer, (x, attended), count)
        keys.append(new_keys)
        values.append(new_values)
    return dataclasses.replace(cache, keys=tuple(keys), values=tuple(values)), x


def gather_tokens(history: Int[Array, "slots max_len"], blocks: QueryBlocks, r: int) -> Int[Array, "B r"]:
    positions = jnp.minimum(blocks.starts[:, None] + jnp.arange(r), history.shape[1] - 1)
    return history[blocks.slots[:, None], positions]


def embed(
    model_config: ModelConfig, kernels: Kernels, table: Float[Array, "leaf V D"], tokens: Int[Array, "B r"]
) -> Float[Array, "B r D"]:
    return kernels.embed(table, tokens.reshape(-1)).reshape(*tokens.shape, model_config.hidden_size)


def project(
    model_config: ModelConfig, kernels: Kernels, layer: Layer, rows: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    """Queries (float32), keys and values (model dtype) of the blocks' tokens, `[B, r, heads, h]`."""
    x, starts = rows
    batch, r, width = x.shape
    attention, h = layer.attention, model_config.head_dim
    y = rms_norm(x.reshape(batch * r, width), layer.input_norm, model_config.rms_norm_eps)
    packed = kernels.outputs(y, attention.qkv)
    if attention.qkv_bias is not None:
        packed = packed + attention.qkv_bias.astype(jnp.float32)[:, None]
    queries, keys = (
        heads * h // model_config.reduction_leaves
        for heads in (model_config.num_attention_heads, model_config.num_key_value_heads)
    )
    q, k, v = (_join_heads(part, h) for part in jnp.split(packed, [queries, queries + keys], axis=-1))
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = (
            rms_norm(q, attention.q_norm, model_config.rms_norm_eps),
            rms_norm(k, attention.k_norm, model_config.rms_norm_eps),
        )
    cos, sin = cos_sin((starts[:, None] + jnp.arange(r)).reshape(-1), model_config.rope, h)
    back = lambda y, dtype: y.reshape(batch, r, -1, h).astype(dtype)
    return (
        back(rotate(q, cos, sin), jnp.float32),
        back(rotate(k, cos, sin), model_config.dtype),
        back(v, model_config.dtype),
    )


def _join_heads(x: Float[Array, "leaf t _"], h: int) -> Float[Array, "t heads h"]:
    leaves, t, _ = x.shape
    return x.reshape(leaves, t, -1, h).transpose(1, 0, 2, 3).reshape(t, -1, h)


def mix(model_config: ModelConfig, kernels: Kernels, layer: Layer, rows: tuple[Array, Array]) -> Float[Array, "B r D"]:
    """The residual stream after attention's output projection and the MLP."""
    x, attended = rows
    shape, leaves = x.shape, model_config.reduction_leaves
    x, attended = x.reshape(-1, shape[-1]), attended.reshape(-1, leaves, attended.shape[-1] // leaves)
    x = x + kernels.summed(attended.swapaxes(0, 1), layer.attention.out)
    if layer.attention.out_bias is not None:
        x = x + layer.attention.out_bias.astype(jnp.float32)
    y = kernels.gated(rms_norm(x, layer.post_norm, model_config.rms_norm_eps), layer.mlp.gate_up)
    return (x + kernels.summed(y, layer.mlp.down)).reshape(shape)


def logits(
    model_config: ModelConfig, kernels: Kernels, norm: Array, head: Float[Array, "leaf V D"], x: Float[Array, "t D"]
) -> Float[Array, "t V"]:
    """The output head in float32, whatever the weights' dtype. Rows behind the vocabulary are -inf.

    The hidden state is not rounded. For bfloat16 weights it is cut into three bfloat16 parts whose sum is the float32 number; their
    products with the weights are exact and are added in float32. So the head is read once, as it is stored, and never kept widened.
    """
    y = rms_norm(x, norm, model_config.rms_norm_eps)
    if head.dtype == jnp.bfloat16:
        high, middle, low = jnp.split(kernels.outputs(jnp.concatenate(_bfloat16_parts(y)), head), 3, axis=1)
        out = high + (middle + low)
    else:
        out = kernels.outputs(y, head.astype(jnp.float32))
    out = out.swapaxes(0, 1).reshape(x.shape[0], -1)
    return jnp.where(jnp.arange(out.shape[1]) < model_config.vocab_size, out, -jnp.inf)


def _bfloat16_parts(x: Float[Array, "t D"]) -> list[Array]:
    """Three bfloat16 arrays whose exact sum is x: each takes the next eight bits. Kept as float32 in between, so that nothing is folded."""
    parts = []
    for _ in range(3):
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts
