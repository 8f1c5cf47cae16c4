"""The trainer's forward pass: the engine's pinned regions over whole sequences, differentiable in the parameters."""
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine import kv_cache
from jaxengine.config import KV_TILE, QUERY_BLOCK, ModelConfig
from jaxengine.models import decoder
from jaxengine.models.decoder import ATTENTION_TILE
from jaxengine.models.params import Decoder
from jaxengine.ops.regions import over_tiles
from jaxengine.ops.softmax import log_softmax

TILE = ATTENTION_TILE  # query blocks to a tile, as in the widest prefill step


def token_logprobs(config: ModelConfig, params: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """float32 logprob of each token under the model's own distribution, 0 at the first position and where tokens are below 0.

    Tokens stand from position 0; padding, on the right, is any negative id. Differentiable in params: reverse mode saves each region's
    inputs and recomputes the rest.
    """
    batch, length = tokens.shape
    padded = jnp.pad(tokens, ((0, -batch % (TILE * QUERY_BLOCK // KV_TILE)), (0, -length % KV_TILE)), constant_values=-1)
    x = hidden_states(config, params, jnp.maximum(padded, 0))
    targets = jnp.pad(padded[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    head = params.embed if params.head is None else params.head
    rows = (x.reshape(-1, x.shape[-1]), jnp.maximum(targets, 0).reshape(-1))
    body = functools.partial(_row_logprobs, config)
    logprobs = over_tiles(body, TILE * QUERY_BLOCK, (params.norm, head), rows, _runtime(padded.size, padded)).reshape(padded.shape)
    shifted = jnp.pad(jnp.where(targets >= 0, logprobs, 0.0)[:, :-1], ((0, 0), (1, 0)))
    return shifted[:batch, :length]


def _row_logprobs(config: ModelConfig, weights: tuple, rows: tuple) -> Float[Array, " t"]:
    (norm, head), (x, targets) = weights, rows
    logprobs = log_softmax(decoder.logits(config, norm, head, x))
    return jnp.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0]


def hidden_states(config: ModelConfig, params: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The residual stream behind the last layer. T is a multiple of KV_TILE, B·T of 128."""
    batch, length = tokens.shape
    blocks = tokens.reshape(-1, QUERY_BLOCK)
    starts = jnp.tile(jnp.arange(0, length, QUERY_BLOCK), batch)
    count = _runtime(blocks.shape[0], tokens)
    x = over_tiles(functools.partial(decoder.embed, config), TILE, params.embed, blocks, count)
    for layer in params.layers:
        q, k, v = over_tiles(functools.partial(decoder.project, config), TILE, layer, (x, starts), count)
        attended = _attention(config, batch, q, k, v, count)
        x = over_tiles(functools.partial(decoder.mix, config), TILE, layer, (x, attended), count)
    return x.reshape(batch, length, -1)


def _runtime(size: int, tokens: Array) -> Array:
    """`size`, as a number that the compiler cannot know: a region's trip count must not be a constant (ops/regions.py)."""
    return jnp.where(tokens.max() >= 0, jnp.int32(size), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(config: ModelConfig, batch: int, q: Array, k: Array, v: Array, count: Array) -> Array:
    """The engine's paged attention, over pages made of whole sequences. `[NB, r, heads, h]` in, `[NB, r, Hh]` out."""
    whole = lambda x: x.reshape(-1, KV_TILE, *x.shape[2:])
    num_pages = k.shape[0] * QUERY_BLOCK // KV_TILE
    tables = jnp.arange(num_pages).reshape(batch, -1)
    per_sequence = q.shape[0] // batch
    starts = jnp.tile(jnp.arange(per_sequence) * QUERY_BLOCK, batch)
    weights = kv_cache.as_pages(whole(k), whole(v))
    rows = (q, jnp.repeat(tables, per_sequence, axis=0), starts)
    return over_tiles(functools.partial(decoder.attend, config), ATTENTION_TILE, weights, rows, count)


def _attention_forward(config, batch, q, k, v, count):
    return _attention(config, batch, q, k, v, count), (q, k, v, count)


def _attention_backward(config, batch, saved, cotangent):
    """Gradient of plain attention in float32, one sequence at a time."""
    q, k, v, count = jax.lax.optimization_barrier(saved)
    split = lambda x: x.reshape(batch, -1, *x.shape[2:])

    def one(parts):
        q, k, v, g = parts
        _, pullback = jax.vjp(functools.partial(_plain_attention, config), q, k, v)
        return pullback(g)

    grads = jax.lax.map(one, tuple(map(split, (q, k, v, cotangent.astype(jnp.float32)))))
    no_count = jax.custom_derivatives.zero_from_primal(count, symbolic_zeros=False)
    return (*(g.reshape(x.shape).astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), no_count)


def _plain_attention(config: ModelConfig, q: Float[Array, "T H h"], k: Float[Array, "T K h"], v: Float[Array, "T K h"]) -> Array:
    length, group = q.shape[0], config.group_size
    q = q.reshape(length, -1, group, config.head_dim)
    scores = jnp.einsum("tkgh,skh->kgts", q, k.astype(jnp.float32), precision="highest") * config.head_dim**-0.5
    causal = jnp.arange(length)[:, None] >= jnp.arange(length)
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    return jnp.einsum("kgts,skh->tkgh", weights, v.astype(jnp.float32), precision="highest").reshape(length, -1)


_attention.defvjp(_attention_forward, _attention_backward)
