"""The trainer's forward pass: the engine's pinned regions over whole sequences, differentiable in the parameters.

A sequence is cut into query blocks of QUERY_BLOCK tokens, and a block is a page: attention reads keys and values of
whole sequences through block tables, as it does in the engine. Blocks that nothing asks for are sorted to the end,
which the regions' loops do not reach.

Reverse mode keeps the residual stream before each layer and computes the rest a second time, a layer at a time.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.base.pytree import pytree
from jaxengine.config import KV_TILE, QUERY_BLOCK, ModelConfig
from jaxengine.device.embedding import embed
from jaxengine.models import decoder
from jaxengine.models.params import Decoder, Layer, layer_specs
from jaxengine.ops.heads import PackedHeads, rotated_heads
from jaxengine.ops.kernels import Kernels
from jaxengine.ops.live import Live
from jaxengine.ops.pools import Pools
from jaxengine.ops.query_blocks import QueryBlocks
from jaxengine.ops.regions import no_gradient
from jaxengine.ops.tiles import ATTENTION_TILE, Tile
from pallas_kernels.pinned_math import exp, row_sum
from pallas_kernels.tiles import unknown_zero
from sharding.mesh import WHOLE


@pytree
class BlockLayout:
    """Where the blocks of sequences `[B, T]` are: block i holds tokens of one sequence from position `starts[i]` on."""

    tokens: Int[Array, "NB q"]
    starts: Int[Array, " NB"]
    tables: Int[Array, "NB n"]  # the blocks of the sequence that block i belongs to, in order: its pages
    places: Int[Array, "B n"]  # block j of sequence b is block places[b, j]
    count: Int[Array, ""]  # blocks that are asked for


def hidden_states(
    model_config: ModelConfig,
    kernels: Kernels,
    params: Decoder,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, " B"],
    tile: Tile,
) -> Float[Array, "B T D"]:
    """The residual stream after the last layer, of the first `lengths[b]` tokens of each sequence; the rest is
    undefined.
    """
    batch, length = tokens.shape
    layout, parts = lay_out(params, tokens, lengths), QUERY_BLOCK // tile.tokens
    starts, tables = jnp.repeat(layout.starts, parts, axis=0), jnp.repeat(layout.tables, parts, axis=0)
    starts += jnp.tile(jnp.arange(0, QUERY_BLOCK, tile.tokens, dtype=jnp.int32), layout.tokens.shape[0])
    count = layout.count * parts
    x = embed(kernels, tile, params.embed, layout.tokens.reshape(-1), count * tile.tokens)
    for layer in params.layers:
        x = _layer(model_config, kernels, tile, layer, x, starts, tables, count)
    whole = x.reshape(-1, QUERY_BLOCK, x.shape[-1]).at[layout.places].get(unique_indices=True)
    return whole.reshape(batch, -1, x.shape[-1])[:, :length]


def lay_out(params: Decoder, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> BlockLayout:
    """Cut sequences into blocks, those with tokens before `lengths` first."""
    batch, length = tokens.shape
    tokens = jnp.pad(tokens, ((0, 0), (0, -length % QUERY_BLOCK)))
    blocks = tokens.shape[1] // QUERY_BLOCK
    starts = jnp.tile(jnp.arange(blocks, dtype=jnp.int32) * QUERY_BLOCK, batch)
    wanted = starts < jnp.repeat(lengths, blocks)
    order = jnp.argsort(~wanted, stable=True)
    places = jnp.argsort(order).reshape(batch, blocks).astype(jnp.int32)
    tables = jnp.pad(places, ((0, 0), (0, -blocks % (KV_TILE // QUERY_BLOCK))))[order // blocks]

    def whole_tiles(x: Array) -> Array:
        return jnp.pad(x, ((0, -x.shape[0] % ATTENTION_TILE), *((0, 0),) * (x.ndim - 1)))

    return BlockLayout(
        tokens=whole_tiles(tokens.reshape(-1, QUERY_BLOCK)[order]),
        starts=whole_tiles(starts[order]),
        tables=whole_tiles(tables),
        places=places,
        count=wanted.sum(dtype=jnp.int32) + unknown_zero(params.norm, tokens),
    )


# -- a layer -----------------------------------------------------------------------------------------------------------


def _chain(
    model_config: ModelConfig,
    tile: Tile,
    kernels: Kernels,
    layer: Layer,
    x: Float[Array, "NB*r D"],
    starts: Int[Array, " NB"],
    tables: Int[Array, "NB n"],
    count: Int[Array, ""],
) -> Float[Array, "NB*r D"]:
    """A layer on one device, with its share of the model."""

    def attend(packed: PackedHeads) -> tuple[Any, None]:
        return _attention(model_config, kernels, tile, packed, tables, starts, count), None

    live = Live(tile.rows, count * tile.tokens)
    x, _ = decoder.add_layer(model_config, kernels.products, layer, kernels.products.stream(x), live, attend)
    return kernels.products.finish(x)


def _run_layer(
    model_config: ModelConfig, kernels: Kernels, tile: Tile, layer: Layer, x: Float[Array, "NB*r D"], *where: Array
) -> Float[Array, "NB*r D"]:
    """`_chain` on every device; `where` are its last three arguments."""
    chain = functools.partial(_chain, kernels.share(model_config), tile)
    each = kernels.on_each(chain, layer_specs(model_config), *(WHOLE,) * 4, outputs=WHOLE)
    return each(layer, x, *where)


_layer = jax.custom_vjp(_run_layer, nondiff_argnums=(0, 1, 2))


def _layer_forward(model_config, kernels, tile, layer, x, *where):
    return _layer(model_config, kernels, tile, layer, x, *where), (layer, x, where)


def _layer_backward(model_config, kernels, tile, saved, cotangent):
    (layer, x, where), cotangent = jax.lax.optimization_barrier((saved, cotangent))
    starts, tables, count = where
    # The trip count depends on the cotangent, so that XLA cannot compute a layer again before its turn and keep the
    # result. (jax.checkpoint ties a layer to its turn with a barrier, which XLA on CPU drops before it schedules.)
    count += unknown_zero(cotangent)
    pull = functools.partial(_pull_layer, kernels.share(model_config), tile)
    specs: Any = layer_specs(model_config)
    each = kernels.on_each(pull, specs, *(WHOLE,) * 3, outputs=(specs, WHOLE))
    return *each(layer, x, (starts, tables, count), cotangent), *map(no_gradient, where)


def _pull_layer(
    model_config: ModelConfig, tile: Tile, kernels: Kernels, layer: Layer, x: Array, where: tuple, cotangent: Array
) -> tuple[Layer, Array]:
    """The cotangents of a layer and of x, on one device."""

    def again(layer: Layer, x: Array) -> Array:
        return _chain(model_config, tile, kernels, layer, x, *where)

    _, pullback = jax.vjp(again, layer, x)
    return pullback(cotangent)


_layer.defvjp(_layer_forward, _layer_backward)


# -- attention ---------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(
    model_config: ModelConfig,
    kernels: Kernels,
    tile: Tile,
    packed: PackedHeads,
    tables: Int[Array, "NB n"],
    starts: Int[Array, " NB"],
    count: Int[Array, ""],
) -> Float[Array, "NB*r Hh"]:
    """The engine's paged attention, over pools that hold these sequences alone."""
    each, r = jnp.arange(starts.shape[0], dtype=jnp.int32), tile.tokens
    slots = tables[:, 0] * (QUERY_BLOCK // r)  # of a sequence's first block: every block brings the sequence's table
    blocks = QueryBlocks(slots, starts, jnp.where(each < count, r, 0), count)
    shapes = kernels.attention.pools(model_config, starts.shape[0] * tile.tokens // QUERY_BLOCK, QUERY_BLOCK)
    zero = unknown_zero(jax.tree.leaves(packed.rows)[0], count)  # so that XLA makes the pools at their turn
    pools = Pools(*(jnp.full(x.shape, zero, x.dtype, device=x.sharding) for x in shapes))
    tables = kernels.attention.tables(tables, blocks)
    q, pools = kernels.attention.rotate_and_write(model_config, packed, pools, tables, blocks, tile.rows)
    attended = kernels.attention.attend(model_config, pools, q, tables, blocks)
    # Padding's rows may hold anything, and are multiplied by a cotangent of 0, which only a finite number turns into 0.
    return jnp.where(jnp.arange(attended.shape[0])[:, None] < count * r, attended, 0)


def _attention_forward(model_config, kernels, tile, *given):
    return _attention(model_config, kernels, tile, *given), given


def _attention_backward(model_config, kernels, tile, saved, cotangent):
    """Gradient of plain attention in float32, a block of queries at a time: nothing of size T × T is kept."""
    packed, tables, starts, count = jax.lax.optimization_barrier(saved)
    r = tile.tokens
    positions = (starts[:, None] + jnp.arange(r, dtype=jnp.int32)).reshape(-1)

    def heads(packed):
        packed = packed._replace(rows=kernels.attention.rows_of(packed.rows))
        leaves, live = kernels.products.leaves, Live(tile.rows, count * r)
        rows = rotated_heads(model_config, leaves, packed, positions, live)
        return [x.reshape(-1, r, *x.shape[1:]) for x in rows]

    (q, k, v), pullback = jax.vjp(heads, packed)
    of_heads = _attention_gradient(model_config, q, k, v, tables, starts, count, cotangent.reshape(*q.shape[:2], -1))
    return *pullback(of_heads), *map(no_gradient, (tables, starts, count))


def _attention_gradient(
    model_config: ModelConfig,
    q: Float[Array, "NB r H h"],
    k: Float[Array, "NB r K h"],
    v: Float[Array, "NB r K h"],
    tables: Int[Array, "NB n"],
    starts: Int[Array, " NB"],
    count: Int[Array, ""],
    cotangent: Float[Array, "NB r Hh"],
) -> list[Array]:
    """The gradients of q, k and v, a block and a head of keys at a time: the order of no sum depends on how many heads
    there are here.
    """
    heads, group = k.shape[2], model_config.group_size

    def by_head(x: Array) -> Float[Array, "K NB g*r h"]:
        x = x.reshape(*q.shape[:2], heads, group, -1).transpose(2, 0, 3, 1, 4)
        return x.reshape(heads, q.shape[0], -1, q.shape[3])

    queries, upstream = by_head(q), by_head(cotangent.astype(jnp.float32))
    keys, values = (_by_head(x).astype(jnp.float32) for x in (k, v))
    pages = jnp.arange(tables.shape[1])

    def step(i, gradients):
        of_q, of_k, of_v = gradients
        block, head = i // heads, i % heads
        table = tables[block]
        own_keys, own_values = (x[head, table].reshape(-1, x.shape[-1]) for x in (keys, values))
        given = queries[head, block], own_keys, own_values, upstream[head, block]
        dq, dk, dv = _head_gradients(given, starts[block], group, model_config.head_dim**-0.5)
        places = jnp.where(pages * QUERY_BLOCK < starts[block] + q.shape[1], table, keys.shape[1] + pages)
        return of_q.at[head, block].set(dq), _add_pages(of_k, head, places, dk), _add_pages(of_v, head, places, dv)

    zero = unknown_zero(cotangent)
    start = tuple(jnp.full(x.shape, zero, x.dtype) for x in (queries, keys, values))
    of_q, of_k, of_v = jax.lax.fori_loop(0, count * heads, step, start)
    of_q = of_q.reshape(heads, q.shape[0], group, *q.shape[1::2]).transpose(1, 3, 0, 2, 4).reshape(q.shape)
    return [of_q, *(_by_token(x, k.shape).astype(k.dtype) for x in (of_k, of_v))]


def _by_head(x: Float[Array, "NB r K h"]) -> Float[Array, "K P q h"]:
    """Keys or values as pages of each head."""
    heads, width = x.shape[2:]
    return x.transpose(2, 0, 1, 3).reshape(heads, -1, QUERY_BLOCK, width)


def _by_token(x: Float[Array, "K P q h"], shape: tuple[int, ...]) -> Float[Array, "NB r K h"]:
    """The inverse of `_by_head`."""
    return x.reshape(x.shape[0], *shape[:2], x.shape[-1]).transpose(1, 2, 0, 3)


def _add_pages(
    total: Float[Array, "K P q h"], head: Array, places: Int[Array, " n"], part: Float[Array, "S h"]
) -> Array:
    """No two places are equal: a table ends in zeros, and what is after the queries is placed after the last page."""
    part = part.reshape(-1, *total.shape[2:])
    return total.at[head, places].add(part, mode="drop", unique_indices=True)


def _head_gradients(
    given: tuple[Float[Array, "g*r h"], Float[Array, "S h"], Float[Array, "S h"], Float[Array, "g*r h"]],
    start: Int[Array, ""],
    group: int,
    scale: float,
) -> tuple[Float[Array, "g*r h"], Float[Array, "S h"], Float[Array, "S h"]]:
    """The gradients of q, k and v, the first three given, where `group` heads of queries of r tokens from position
    `start` on attend causally to one head of keys; the fourth is the cotangent. Dao et al. 2022, arXiv:2205.14135, B.2.

    Written out, because XLA divides by a sum in another way where a program is cut for a mesh.
    """
    q, k, v, upstream = given
    positions = start + jnp.tile(jnp.arange(q.shape[0] // group), group)
    q = q * scale
    scores = jnp.where(positions[:, None] >= jnp.arange(k.shape[0]), _product(q, k.T), -jnp.inf)
    weights = exp(scores - scores.max(-1, keepdims=True))
    weights *= (1.0 / row_sum(weights))[:, None]
    of_weights = _product(upstream, v.T)
    of_scores = weights * (of_weights - row_sum(weights * of_weights)[:, None])
    return _product(of_scores, k) * scale, _product(of_scores.T, q), _product(weights.T, upstream)


def _product(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return jnp.matmul(a, b, precision="highest")


_attention.defvjp(_attention_forward, _attention_backward)
