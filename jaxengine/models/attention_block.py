"""Multi-head attention with grouped keys and values. Ainslie et al. 2023, arXiv:2305.13245."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Array, Float

from jaxengine.base.pytree import pytree
from jaxengine.config import ModelConfig
from jaxengine.models.parameter import Parameter, norm_scale, split_by_inputs, split_by_outputs
from jaxengine.ops.heads import PackedHeads
from jaxengine.ops.kernels import Products, Stream
from jaxengine.ops.live import Live


@pytree
class Attention:
    """H query heads and K key-value heads of width h; K counts every copy that a leaf holds."""

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
    packed = queries + 2 * model_config.held_key_value_heads * model_config.head_dim
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


# The projection -> (what was attended `[R, Hh]`, what else the caller wants back)
Attend = Callable[[PackedHeads], tuple[Array, Any]]


def add_attention(
    model_config: ModelConfig,
    products: Products,
    attention: Attention,
    norm: Float[Array, " D"],
    x: Stream,
    live: Live,
    attend: Attend,
) -> tuple[Stream, Any]:
    """The residual stream after the block, and what `attend` gives back beside what was attended."""
    x, packed = products.project(x, norm, model_config.rms_norm_eps, attention.qkv, attention.qkv_bias, live)
    attended, rest = attend(PackedHeads(packed, attention.q_norm, attention.k_norm))
    return products.add(x, attended, attention.out, attention.out_bias, live), rest
