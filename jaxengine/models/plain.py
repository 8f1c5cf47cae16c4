"""The decoder a second time, in plain float32 and nothing else: no pages, no tiles, no pinned regions, one sequence.

What drift is measured against, and what gradients and tokens are compared with. Only the declarations of the parameters
are shared.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.models.mlp_block import Mlp
from jaxengine.models.params import Decoder, Layer
from jaxengine.ops.rope import inverse_frequencies

QUERIES = 64  # that attention takes at once: at 40,000 positions their weights fit into memory, and nearly into a cache
dot = functools.partial(jnp.einsum, precision="highest")


def logits(model_config: ModelConfig, params: Decoder, tokens: Int[Array, " T"]) -> Float[Array, "T V"]:
    """Logits of the token after each position."""
    x = hidden_states(model_config, params, tokens)
    head = params.output_head
    return dot("td,vd->tv", x, _joined(head))[:, : model_config.vocab_size]


def hidden_states(model_config: ModelConfig, params: Decoder, tokens: Int[Array, " T"]) -> Float[Array, "T D"]:
    """The normalised residual stream that the head reads."""
    x = _joined(params.embed)[tokens]
    for layer in params.layers:
        x = x + _attention(model_config, layer, _norm(model_config, x, layer.input_norm))
        x = x + _inner(model_config, layer, _norm(model_config, x, layer.post_norm))
    return _norm(model_config, x, params.norm)


def _joined(w: Float[Array, "leaf N K"]) -> Float[Array, "leaf*N K"]:
    return w.astype(jnp.float32).reshape(-1, w.shape[-1])


def _norm(model_config: ModelConfig, x: Array, scale: Array) -> Array:
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + model_config.rms_norm_eps) * scale.astype(jnp.float32)


def _inner(model_config: ModelConfig, layer: Layer, y: Float[Array, "T D"]) -> Float[Array, "T D"]:
    """Of the MLP, or of the experts: every row through each of them, weighted with 0 where it was not chosen."""
    if isinstance(layer.mlp, Mlp):
        return _mlp(y, layer.mlp.gate_up, layer.mlp.down)
    scores = dot("td,ed->te", y, layer.mlp.router.astype(jnp.float32))
    weights, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), model_config.num_experts_per_tok)
    if model_config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdims=True)

    def add(total, expert):
        number, gate_up, down = expert
        return total + (weights * (chosen == number)).sum(-1)[:, None] * _mlp(y, gate_up, down), None

    by_expert = jnp.arange(model_config.num_experts), layer.mlp.gate_up.swapaxes(0, 1), layer.mlp.down.swapaxes(0, 1)
    return jax.lax.scan(add, jnp.zeros_like(y), by_expert)[0]


def _mlp(y: Float[Array, "T D"], gate_up: Float[Array, "leaf F2 D"], down: Float[Array, "leaf D F"]) -> Array:
    gate, up = jnp.split(dot("td,lnd->tln", y, gate_up.astype(jnp.float32)), 2, axis=-1)
    return dot("tlf,ldf->td", jax.nn.silu(gate) * up, down.astype(jnp.float32))


def _attention(model_config: ModelConfig, layer: Layer, y: Float[Array, "T D"]) -> Float[Array, "T D"]:
    attention, h, leaves, length = layer.attention, model_config.head_dim, model_config.reduction_leaves, y.shape[0]
    packed = dot("td,lnd->ltn", y, attention.qkv.astype(jnp.float32))
    if attention.qkv_bias is not None:
        packed += attention.qkv_bias.astype(jnp.float32)[:, None]
    heads = packed.reshape(leaves, length, -1, h)
    each = model_config.num_attention_heads // leaves, model_config.held_key_value_heads // leaves
    parts = jnp.split(heads, [each[0], sum(each)], axis=2)
    q, k, v = (part.transpose(1, 0, 2, 3).reshape(length, -1, h) for part in parts)
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = _norm(model_config, q, attention.q_norm), _norm(model_config, k, attention.k_norm)
    mixed = _causal(_rotated(model_config, q), _rotated(model_config, k), v)
    out = dot("tln,ldn->td", mixed.reshape(length, leaves, -1), attention.out.astype(jnp.float32))
    return out if attention.out_bias is None else out + attention.out_bias.astype(jnp.float32)


def _rotated(model_config: ModelConfig, x: Float[Array, "T heads h"]) -> Float[Array, "T heads h"]:
    rope, positions = model_config.rope, jnp.arange(x.shape[0], dtype=jnp.float32)
    angles = positions[:, None, None] * inverse_frequencies(rope, model_config.head_dim)
    cos, sin = jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _causal(q: Float[Array, "T H h"], k: Float[Array, "T K h"], v: Float[Array, "T K h"]) -> Float[Array, "T Hh"]:
    """Causal attention, some queries at a time."""
    length, heads, h = q.shape
    some = min(QUERIES, length)
    padded = jnp.pad(q, ((0, -length % some), (0, 0), (0, 0))).reshape(-1, some, k.shape[1], heads // k.shape[1], h)

    def attend(part):
        i, queries = part
        scores = dot("qkgh,skh->kgqs", queries, k) * h**-0.5
        visible = jnp.arange(length) <= (i * some + jnp.arange(some))[:, None]
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        return dot("kgqs,skh->qkgh", weights, v)

    out = jax.lax.map(attend, (jnp.arange(padded.shape[0]), padded))
    return out.reshape(-1, heads * h)[:length]
