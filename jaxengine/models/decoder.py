"""The decoder that all families share, as pure functions of arrays.

The forward pass is a chain of pinned regions (ops/regions.py); between two regions only copying happens. Every region
works on query blocks: `[B, r, …]`, r consecutive tokens of one sequence. Decoding is r = 1. The residual stream is
float32.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.models import attention_block, mlp_block
from jaxengine.models.params import Decoder, Layer
from jaxengine.ops.kernels import Kernels
from jaxengine.ops.norm import rms_norm
from jaxengine.ops.query_blocks import QueryBlocks
from jaxengine.ops.regions import over_tiles
from jaxengine.ops.tiles import Tile

Pools = tuple[Array, ...]  # a layer's pages each, as `Kernels.attention` lays them out


def forward(
    model_config: ModelConfig,
    kernels: Kernels,
    params: Decoder,
    keys: Pools,
    values: Pools,
    tables: Int[Array, "slots n"],
    blocks: QueryBlocks,
    tokens: Int[Array, "B r"],
    tile: Tile,
) -> tuple[Pools, Pools, Float[Array, "B r D"]]:
    """(keys, values, hidden states) after the blocks' tokens went through the layers, which write their keys and
    values.

    Within one call a sequence's blocks see each other's keys, causally. `tokens` after a block's count may be anything.
    """
    tables, count = kernels.attention.tables(tables, blocks), blocks.num_blocks
    x = over_tiles(functools.partial(embed, model_config, kernels), tile.blocks, params.embed, tokens, count)
    before, after = functools.partial(project, model_config, kernels), functools.partial(mix, model_config, kernels)
    new_keys, new_values = [], []
    for layer, own_keys, own_values in zip(params.layers, keys, values, strict=True):
        q, k, v = over_tiles(before, tile.blocks, layer, (x, blocks.starts), count)
        own_keys, own_values = kernels.attention.write(own_keys, own_values, k, v, tables, blocks)
        attended = kernels.attention.attend(model_config, own_keys, own_values, q, tables, blocks)
        x = over_tiles(after, tile.blocks, layer, (x, attended), count)
        new_keys.append(own_keys)
        new_values.append(own_values)
    return tuple(new_keys), tuple(new_values), x


# -- bodies of regions: (weights, rows of one tile) -> rows ------------------------------------------------------------


def embed(
    model_config: ModelConfig, kernels: Kernels, table: Float[Array, "leaf V D"], tokens: Int[Array, "B r"]
) -> Float[Array, "B r D"]:
    """The tokens' rows of the embedding."""
    return kernels.products.embed(table, tokens.reshape(-1)).reshape(*tokens.shape, model_config.hidden_size)


def project(
    model_config: ModelConfig, kernels: Kernels, layer: Layer, rows: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    """Queries, keys and values `[B, r, heads, h]` from the residual stream `[B, r, D]` and the blocks' first positions
    `[B]`.
    """
    x, starts = rows
    return attention_block.project(model_config, kernels, layer.attention, layer.input_norm, x, starts)


def mix(model_config: ModelConfig, kernels: Kernels, layer: Layer, rows: tuple[Array, Array]) -> Float[Array, "B r D"]:
    """The residual stream `[B, r, D]` after the layer, from the stream and what was attended `[B, r, Hh]`."""
    x, attended = rows
    flat, attended = x.reshape(-1, x.shape[-1]), attended.reshape(-1, attended.shape[-1])
    flat = attention_block.add_attended(model_config, kernels, layer.attention, flat, attended)
    return mlp_block.add_mlp(model_config, kernels, layer.mlp, layer.post_norm, flat).reshape(x.shape)


# -- the head, inside a caller's region --------------------------------------------------------------------------------


def logits(
    model_config: ModelConfig, kernels: Kernels, norm: Array, head: Float[Array, "leaf V D"], x: Float[Array, "t D"]
) -> Float[Array, "t V"]:
    """The output head in float32, whatever the weights' dtype. Columns after the vocabulary are -inf.

    The hidden state is not rounded. For bfloat16 weights it is cut into three bfloat16 parts with the float32 number as
    their sum; the parts' products with the weights are exact and are added in float32. So the head is read once, as it
    is stored, and never widened.
    """
    y = rms_norm(x, norm, model_config.rms_norm_eps)
    if head.dtype == jnp.bfloat16:
        parts = kernels.products.outputs(jnp.concatenate(_bfloat16_parts(y)), head)
        high, middle, low = jnp.split(parts, 3, axis=1)
        out = high + (middle + low)
    else:
        out = kernels.products.outputs(y, head.astype(jnp.float32))
    out = out.swapaxes(0, 1).reshape(x.shape[0], -1)
    return jnp.where(jnp.arange(out.shape[1]) < model_config.vocab_size, out, -jnp.inf)


def _bfloat16_parts(x: Float[Array, "t D"]) -> list[Array]:
    """Three bfloat16 arrays with x as their exact sum: each takes the next eight bits.

    The remainder stays float32 and is rounded by reduce_precision, because XLA would fold a conversion and its inverse
    away.
    """
    parts = []
    for _ in range(3):
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts
