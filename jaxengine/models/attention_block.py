"""Multi-head attention with grouped keys and values: what stands before the paged attention of ops/kernels.py, and
after it.

Ainslie et al. 2023, arXiv:2305.13245.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxengine.base.pytree import pytree
from jaxengine.config import ModelConfig
from jaxengine.models.parameter import Parameter, norm_scale, split_by_inputs, split_by_outputs
from jaxengine.ops.kernels import Kernels
from jaxengine.ops.norm import rms_norm
from jaxengine.ops.rope import cos_sin, rotate


@pytree
class Attention:
    """H query heads and K key-value heads of width h."""

    qkv: Array  # [leaf, (H + 2K)h / leaf, D]: queries, keys, values of the leaf's heads
    qkv_bias: Array | None  # [leaf, (H + 2K)h / leaf]
    q_norm: Array | None  # [h]
    k_norm: Array | None  # [h]
    out: Array  # [leaf, D, Hh / leaf]
    out_bias: Array | None  # [D]


def declare(model_config: ModelConfig) -> Attention:
    """The declarations of its parameters, in its own shape."""
    leaves, width, dtype = model_config.reduction_leaves, model_config.hidden_size, model_config.dtype
    queries = model_config.num_attention_heads * model_config.head_dim
    packed = queries + 2 * model_config.num_key_value_heads * model_config.head_dim
    head_norm: Any = norm_scale(model_config, model_config.head_dim) if model_config.qk_norm else None
    qkv_bias: Any = None
    if model_config.qkv_bias:
        qkv_bias = Parameter((leaves, packed // leaves), dtype, ("leaf", "out"), "zeros")
    out_bias: Any = Parameter((width,), dtype, (None,), "zeros") if model_config.out_bias else None
    return Attention(
        qkv=split_by_outputs(model_config, packed),
        qkv_bias=qkv_bias,
        q_norm=head_norm,
        k_norm=head_norm,
        out=split_by_inputs(model_config, queries),
        out_bias=out_bias,
    )


def project(
    model_config: ModelConfig,
    kernels: Kernels,
    attention: Attention,
    norm: Float[Array, " D"],
    x: Float[Array, "B r D"],
    starts: Int[Array, " B"],
) -> tuple[Float[Array, "B r H h"], Float[Array, "B r K h"], Float[Array, "B r K h"]]:
    """Queries (float32), keys and values (the model's dtype) of the blocks' tokens; block b starts at position
    `starts[b]`.
    """
    batch, r, width = x.shape
    h, dtype = model_config.head_dim, model_config.dtype
    y = rms_norm(x.reshape(batch * r, width), norm, model_config.rms_norm_eps)
    packed = kernels.products.outputs(y, attention.qkv)
    if attention.qkv_bias is not None:
        packed = packed + attention.qkv_bias.astype(jnp.float32)[:, None]
    q, k, v = _heads(model_config, packed)
    if attention.q_norm is not None and attention.k_norm is not None:
        q = rms_norm(q, attention.q_norm, model_config.rms_norm_eps)
        k = rms_norm(k, attention.k_norm, model_config.rms_norm_eps)
    cos, sin = cos_sin((starts[:, None] + jnp.arange(r)).reshape(-1), model_config.rope, h)
    in_blocks = (batch, r, -1, h)
    return (
        rotate(q, cos, sin).reshape(in_blocks).astype(jnp.float32),
        rotate(k, cos, sin).reshape(in_blocks).astype(dtype),
        v.reshape(in_blocks).astype(dtype),
    )


def _heads(model_config: ModelConfig, packed: Float[Array, "leaf t _"]) -> list[Float[Array, "t heads h"]]:
    """Queries, keys and values of all leaves' heads."""
    h, leaves = model_config.head_dim, model_config.reduction_leaves
    queries = model_config.num_attention_heads * h // leaves
    keys = model_config.num_key_value_heads * h // leaves
    return [_join_heads(part, h) for part in jnp.split(packed, [queries, queries + keys], axis=-1)]


def _join_heads(x: Float[Array, "leaf t _"], h: int) -> Float[Array, "t heads h"]:
    leaves, t, _ = x.shape
    return x.reshape(leaves, t, -1, h).transpose(1, 0, 2, 3).reshape(t, -1, h)


def add_attended(
    model_config: ModelConfig,
    kernels: Kernels,
    attention: Attention,
    x: Float[Array, "t D"],
    attended: Float[Array, "t Hh"],
) -> Float[Array, "t D"]:
    """The residual stream after the output projection of what was attended."""
    leaves = model_config.reduction_leaves
    by_leaf = attended.reshape(-1, leaves, attended.shape[-1] // leaves).swapaxes(0, 1)
    x = x + kernels.products.summed(by_leaf, attention.out)
    return x if attention.out_bias is None else x + attention.out_bias.astype(jnp.float32)
