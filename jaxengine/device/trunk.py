"""The trainer's forward pass: the engine's pinned regions over whole sequences, differentiable in the parameters.

A sequence is cut into query blocks of QUERY_BLOCK tokens, and a block is a page: attention reads keys and values of whole sequences through
block tables, as it does in the engine. Blocks that nothing asks for are sorted to the end, where the regions' loops do not come.

Reverse mode keeps the residual stream in front of each layer and computes the rest again, a layer at a time.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxengine.base.pytree import pytree
from jaxengine.config import KV_TILE, QUERY_BLOCK, ModelConfig
from jaxengine.device.step_inputs import QueryBlocks
from jaxengine.models import decoder
from jaxengine.models.decoder import Tile
from jaxengine.models.params import Decoder, Layer
from jaxengine.ops.kernels import Kernels
from jaxengine.ops.regions import over_tiles
from jaxengine.ops.xla import ATTENTION_TILE
from pallas_kernels.tiles import unknown_zero

WIDE = Tile(QUERY_BLOCK, 8)  # rows to a tile, as in the widest prefill step


@pytree
class Plan:
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
    tile: Tile = WIDE,
) -> Float[Array, "B T D"]:
    """The residual stream behind the last layer, of the first `lengths[b]` tokens of each sequence; undefined behind them."""
    batch, length = tokens.shape
    plan = plan_blocks(params, tokens, lengths)
    count, num_blocks = plan.count * (QUERY_BLOCK // tile.tokens), plan.tokens.shape[0]
    parts = lambda x: jnp.repeat(x, QUERY_BLOCK // tile.tokens, axis=0)
    starts = parts(plan.starts) + jnp.tile(jnp.arange(0, QUERY_BLOCK, tile.tokens), num_blocks)
    embed = functools.partial(decoder.embed, model_config, kernels)
    x = over_tiles(embed, tile.blocks, params.embed, plan.tokens.reshape(-1, tile.tokens), count)
    tables = parts(plan.tables)
    for layer in params.layers:
        x = _layer(model_config, kernels, tile, layer, x, starts, tables, count)
    whole = x.reshape(-1, QUERY_BLOCK, x.shape[-1])[plan.places]
    return whole.reshape(batch, -1, x.shape[-1])[:, :length]


def plan_blocks(params: Decoder, tokens: Int[Array, "B T"], lengths: Int[Array, " B"]) -> Plan:
    """Cut sequences into blocks, those with tokens before `lengths` first."""
    batch, length = tokens.shape
    tokens = jnp.pad(tokens, ((0, 0), (0, -length % QUERY_BLOCK)))
    blocks = tokens.shape[1] // QUERY_BLOCK
    starts = jnp.tile(jnp.arange(blocks, dtype=jnp.int32) * QUERY_BLOCK, batch)
    wanted = starts < jnp.repeat(lengths, blocks)
    order = jnp.argsort(~wanted, stable=True)
    places = jnp.argsort(order).reshape(batch, blocks).astype(jnp.int32)
    tables = jnp.pad(places, ((0, 0), (0, -blocks % (KV_TILE // QUERY_BLOCK))))[order // blocks]
    rest = -(batch * blocks) % ATTENTION_TILE
    pad = lambda x: jnp.pad(x, ((0, rest), *((0, 0),) * (x.ndim - 1)))
    return Plan(
        pad(tokens.reshape(-1, QUERY_BLOCK)[order]),
        pad(starts[order]),
        pad(tables),
        places,
        wanted.sum(dtype=jnp.int32) + unknown_zero(params.norm, tokens),
    )


def _layer_of_regions(
    model_config: ModelConfig,
    kernels: Kernels,
    tile: Tile,
    layer: Layer,
    x: Array,
    starts: Array,
    tables: Array,
    count: Array,
) -> Array:
    q, k, v = over_tiles(
        functools.partial(decoder.project, model_config, kernels), tile.blocks, layer, (x, starts), count
    )
    attended = _attention(model_config, kernels, q, k, v, tables, starts, count)
    return over_tiles(functools.partial(decoder.mix, model_config, kernels), tile.blocks, layer, (x, attended), count)


_layer = jax.custom_vjp(_layer_of_regions, nondiff_argnums=(0, 1, 2))


def _layer_forward(model_config, kernels, tile, layer, x, *where):
    return _layer(model_config, kernels, tile, layer, x, *where), (layer, x, where)


def _layer_backward(model_config, kernels, tile, saved, cotangent):
    (layer, x, where), cotangent = jax.lax.optimization_barrier((saved, cotangent))
    # The trip counts follow from the cotangent, so that no layer is computed again before its turn, and kept. (jax.checkpoint ties a
    # layer to its turn with a barrier, which XLA on CPU drops before it schedules.)
    starts, tables, count = where
    count += unknown_zero(cotangent)
    _, pullback = jax.vjp(
        lambda layer, x: _layer_of_regions(model_config, kernels, tile, layer, x, starts, tables, count), layer, x
    )
    return *pullback(cotangent), *_no_gradients(where)


_layer.defvjp(_layer_forward, _layer_backward)


def _no_gradients(integers: Iterable[Array]) -> list[np.ndarray]:
    """The cotangents that JAX wants for integer inputs."""
    return [np.zeros(x.shape, jax.dtypes.float0) for x in integers]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    model_config: ModelConfig,
    kernels: Kernels,
    q: Array,
    k: Array,
    v: Array,
    tables: Array,
    starts: Array,
    count: Array,
) -> Array:
    """The engine's paged attention. q `[NB, r, H, h]`, k and v `[NB, r, K, h]`; returns `[NB, r, Hh]`."""
    each, r = jnp.arange(q.shape[0], dtype=jnp.int32), q.shape[1]
    blocks = QueryBlocks(each, starts, jnp.where(each < count, r, 0), count)  # every block brings its own table
    return kernels.attend(model_config, *kernels.as_pages(_whole_blocks(k), _whole_blocks(v)), q, tables, blocks)


def _whole_blocks(x: Array) -> Array:
    return x.reshape(-1, QUERY_BLOCK, *x.shape[2:])


def _attention_forward(model_config, kernels, q, k, v, tables, starts, count):
    return _attention(model_config, kernels, q, k, v, tables, starts, count), (q, k, v, tables, starts, count)


def _attention_backward(model_config, kernels, saved, cotangent):
    """Gradient of plain attention in float32, a block of queries at a time: nothing of size T × T is kept."""
    q, k, v, tables, starts, count = jax.lax.optimization_barrier(saved)
    keys, values = (_whole_blocks(x).astype(jnp.float32) for x in (k, v))
    context = lambda pages, table: pages[table].reshape(-1, *pages.shape[2:])

    def step(i, gradients):
        of_q, of_k, of_v = gradients
        table = tables[i]
        plain = functools.partial(_plain_attention, model_config, start=starts[i])
        _, pullback = jax.vjp(plain, q[i], context(keys, table), context(values, table))
        dq, dk, dv = pullback(cotangent[i].astype(jnp.float32))
        put = lambda total, part: total.at[table].add(part.reshape(-1, *total.shape[1:]))
        return of_q.at[i].set(dq), put(of_k, dk), put(of_v, dv)

    zero = unknown_zero(cotangent)
    start = tuple(jnp.full(x.shape, zero, x.dtype) for x in (q, keys, values))
    of_q, of_k, of_v = jax.lax.fori_loop(0, count, step, start)
    return (
        of_q,
        of_k.reshape(k.shape).astype(k.dtype),
        of_v.reshape(v.shape).astype(v.dtype),
        *_no_gradients((tables, starts, count)),
    )


def _plain_attention(
    model_config: ModelConfig, q: Float[Array, "r H h"], k: Float[Array, "S K h"], v: Float[Array, "S K h"], start: Any
) -> Float[Array, "r Hh"]:
    """Causal attention of r queries from position `start` on, written for its gradient."""
    r = q.shape[0]
    grouped = q.reshape(r, -1, model_config.group_size, model_config.head_dim)
    scores = jnp.einsum("tkgh,skh->kgts", grouped, k, precision="highest") * model_config.head_dim**-0.5
    causal = (start + jnp.arange(r))[:, None] >= jnp.arange(k.shape[0])
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    return jnp.einsum("kgts,skh->tkgh", weights, v, precision="highest").reshape(r, -1)


_attention.defvjp(_attention_forward, _attention_backward)
