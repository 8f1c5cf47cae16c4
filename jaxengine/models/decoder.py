"""The decoder that all families share, as pure functions of arrays: a straight chain of ops (ops/kernels.py).

Each op has one promise: a row's bits depend on that row and the weights alone. How it is kept is the implementation's
own affair; between two ops only copying happens. Rows are tokens, `[R, …]`; the residual stream is float32.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.models import attention_block, experts_block, mlp_block
from jaxengine.models.attention_block import Attend
from jaxengine.models.params import Decoder, Layer
from jaxengine.ops.experts import Experts
from jaxengine.ops.heads import PackedHeads
from jaxengine.ops.kernels import Kernels, Products, Stream
from jaxengine.ops.live import Live
from jaxengine.ops.pools import Pools
from jaxengine.ops.query_blocks import QueryBlocks
from jaxengine.ops.tiles import Tile

Layers = tuple[Array, ...]  # the pages of each layer


def forward(
    model_config: ModelConfig,
    kernels: Kernels,
    params: Decoder,
    keys: Layers,
    values: Layers,
    tables: Int[Array, "slots n"],
    blocks: QueryBlocks,
    tokens: Int[Array, " R"],
    tile: Tile,
) -> tuple[Layers, Layers, Float[Array, "R D"]]:
    """(keys, values, hidden states) after the blocks' tokens went through the layers, which write their keys and
    values.

    Within one call a sequence's blocks see each other's keys, causally. Those of `tokens` that are in no block may be
    anything.
    """
    live = Live(tile.rows, blocks.num_rows(tile.tokens))
    tables = kernels.attention.tables(tables, blocks)
    x = kernels.products.embed(params.embed, tokens, live)
    new_keys, new_values = [], []
    for layer, *pools in zip(params.layers, keys, values, strict=True):
        attend = functools.partial(_attend, model_config, kernels, Pools(*pools), tables, blocks, tile)
        x, written = add_layer(model_config, kernels.products, layer, x, live, attend)
        new_keys.append(written.keys)
        new_values.append(written.values)
    return tuple(new_keys), tuple(new_values), kernels.products.finish(x)


def _attend(
    model_config: ModelConfig,
    kernels: Kernels,
    pools: Pools,
    tables: Array,
    blocks: QueryBlocks,
    tile: Tile,
    packed: PackedHeads,
) -> tuple[Float[Array, "B*r Hh"], Pools]:
    """What the blocks attend to, their own tokens included, and the pools with those."""
    q, pools = kernels.attention.rotate_and_write(model_config, packed, pools, tables, blocks, tile.rows)
    return kernels.attention.attend(model_config, pools, q, tables, blocks), pools


def add_layer(
    model_config: ModelConfig, products: Products, layer: Layer, x: Stream, live: Live, attend: Attend
) -> tuple[Stream, Any]:
    """The residual stream after a layer, and what `attend` gives back beside what was attended."""
    x, rest = attention_block.add_attention(model_config, products, layer.attention, layer.input_norm, x, live, attend)
    if isinstance(layer.mlp, Experts):
        return experts_block.add_experts(model_config, products, layer.mlp, layer.post_norm, x, live), rest
    return mlp_block.add_mlp(model_config, products, layer.mlp, layer.post_norm, x, live), rest


# -- the head, inside a caller's region --------------------------------------------------------------------------------


def logits(
    model_config: ModelConfig,
    kernels: Kernels,
    norm: Array,
    head: Float[Array, "leaf V D"],
    x: Float[Array, "t D"],
    fresh: Bool[Array, " t"] | None = None,
) -> Float[Array, "t V"]:
    """The output head in float32, whatever the weights' dtype. Columns after the vocabulary are -inf.

    `fresh` as in `Products.logits`.
    """
    out = kernels.products.logits(x, norm, model_config.rms_norm_eps, head, fresh)
    return jnp.where(jnp.arange(out.shape[1]) < model_config.vocab_size, out, -jnp.inf)
