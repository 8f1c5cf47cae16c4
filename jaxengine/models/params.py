"""A decoder's parameters: frozen dataclasses of arrays, each declared once.

Every matrix carries the leaf axis first (sharding/leaves.py) and its outputs before its inputs: `[leaf, N, K]`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxengine.base.pytree import pytree
from jaxengine.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Parameter:
    """The declaration of one array: shape, logical axes (for sharding) and initialiser."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"


@pytree
class Attention:
    qkv: Array  # [leaf, (H + 2K)h / leaf, D]: queries, keys, values of the leaf's heads
    qkv_bias: Array | None  # [leaf, (H + 2K)h / leaf]
    q_norm: Array | None  # [h]
    k_norm: Array | None  # [h]
    out: Array  # [leaf, D, Hh / leaf]
    out_bias: Array | None  # [D]


@pytree
class Mlp:
    gate_up: Array  # [leaf, 2F / leaf, D]: gates, then ups
    down: Array  # [leaf, D, F / leaf]


@pytree
class Layer:
    input_norm: Array  # [D]
    attention: Attention
    post_norm: Array  # [D]
    mlp: Mlp


@pytree
class Decoder:
    embed: Array  # [leaf, V / leaf, D], V padded to whole blocks
    layers: tuple[Layer, ...]
    norm: Array  # [D]
    head: Array | None  # [leaf, V / leaf, D]; None where the embedding is the head

    @property
    def output_head(self) -> Array:
        """What the logits are computed with."""
        return self.embed if self.head is None else self.head


def declare(model_config: ModelConfig) -> Any:
    """The tree of Parameter declarations, in the shape of the parameters themselves."""
    leaves, width, h = model_config.reduction_leaves, model_config.hidden_size, model_config.head_dim
    query, key_value = model_config.num_attention_heads * h, model_config.num_key_value_heads * h
    norm: Any = Parameter((width,), (None,), "ones")
    head_norm: Any = Parameter((h,), (None,), "ones") if model_config.qk_norm else None
    table: Any = Parameter((leaves, model_config.padded_vocab_size // leaves, width), ("leaf", "vocab", None))

    def outputs(size: int) -> Any:
        return Parameter((leaves, size // leaves, width), ("leaf", "out", None))

    def inputs(size: int) -> Any:
        return Parameter((leaves, width, size // leaves), ("leaf", None, "in"))

    def layer() -> Any:
        packed = query + 2 * key_value
        bias: Any = Parameter((leaves, packed // leaves), ("leaf", "out"), "zeros") if model_config.qkv_bias else None
        out_bias: Any = Parameter((width,), (None,), "zeros") if model_config.out_bias else None
        attention = Attention(outputs(packed), bias, head_norm, head_norm, inputs(query), out_bias)
        return Layer(
            norm,
            attention,
            norm,
            Mlp(outputs(2 * model_config.intermediate_size), inputs(model_config.intermediate_size)),
        )

    layers = tuple(layer() for _ in range(model_config.num_hidden_layers))
    return Decoder(table, layers, norm, None if model_config.tie_word_embeddings else table)


def map_declared(function: Callable[[str, Parameter], Any], model_config: ModelConfig) -> Any:
    """The declared tree with `function(path, parameter)` at each leaf; a path reads "layers.3.attention.qkv"."""
    named = lambda path, parameter: function(jax.tree_util.keystr(path, simple=True, separator="."), parameter)
    return jax.tree_util.tree_map_with_path(named, declare(model_config), is_leaf=lambda x: isinstance(x, Parameter))


def abstract(model_config: ModelConfig) -> Decoder:
    """Shapes and dtypes, nothing allocated."""
    return map_declared(lambda _, p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(model_config.dtype)), model_config)


def initialise(model_config: ModelConfig, key: Array, scale: float = 0.02) -> Decoder:
    """Random parameters: normal with deviation `scale`, ones for norms, zeros for biases and for padded vocabulary rows."""
    paths = {}
    map_declared(lambda path, _: paths.setdefault(path, len(paths)), model_config)

    def array(path: str, parameter: Parameter) -> Array:
        if parameter.init != "normal":
            return (jnp.ones if parameter.init == "ones" else jnp.zeros)(parameter.shape, model_config.dtype)
        values = scale * jax.random.normal(jax.random.fold_in(key, paths[path]), parameter.shape)
        if parameter.axes[1] == "vocab":
            values = jnp.where(
                (jnp.arange(values.shape[0] * values.shape[1]) < model_config.vocab_size).reshape(*values.shape[:2], 1),
                values,
                0,
            )
        return values.astype(model_config.dtype)

    return map_declared(array, model_config)
