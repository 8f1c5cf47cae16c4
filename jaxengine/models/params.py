"""A decoder's parameters: frozen dataclasses of arrays, each declared once (models/parameter.py)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxengine.base.pytree import pytree
from jaxengine.config import ModelConfig
from jaxengine.models import attention_block, experts_block, mlp_block, own_heads
from jaxengine.models.attention_block import Attention
from jaxengine.models.mlp_block import Mlp
from jaxengine.models.parameter import Parameter, norm_scale
from jaxengine.ops.experts import Experts
from sharding.mesh import Split
from sharding.rules import spec_of

TABLE_AXES = "leaf", "vocab", None  # of the embedding and the head


@pytree
class Layer:
    """An attention block and an MLP block or experts, each with the norm that it reads the residual stream through."""

    input_norm: Array  # [D]
    attention: Attention
    post_norm: Array  # [D]
    mlp: Mlp | Experts


@pytree
class Decoder:
    """All of a model's arrays."""

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
    leaves, width = model_config.reduction_leaves, model_config.hidden_size
    vocabulary = leaves, model_config.padded_vocab_size // leaves, width
    table: Any = Parameter(vocabulary, model_config.dtype, TABLE_AXES)
    norm: Any = norm_scale(model_config, width)
    mlp = (experts_block if model_config.num_experts else mlp_block).declare(model_config)
    layer = Layer(norm, attention_block.declare(model_config), norm, mlp)
    head = None if model_config.tie_word_embeddings else table
    return Decoder(table, (layer,) * model_config.num_hidden_layers, norm, head)


def map_declared(function: Callable[[str, Parameter], Any], model_config: ModelConfig) -> Any:
    """The declared tree with `function(path, parameter)` at each leaf; a path reads "layers.3.attention.qkv"."""

    def named(path: Any, parameter: Parameter) -> Any:
        return function(path_name(path), parameter)

    return jax.tree_util.tree_map_with_path(named, declare(model_config), is_leaf=_is_parameter)


def _is_parameter(node: Any) -> bool:
    return isinstance(node, Parameter)


def path_name(path: Any) -> str:
    """A leaf's path in JAX's keys as text, "layers.3.attention.qkv"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def by_path(tree: Any) -> dict[str, Any]:
    """A tree's leaves by their paths, Parameter declarations among them."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_parameter)
    return {path_name(path): leaf for path, leaf in leaves}


def specs(model_config: ModelConfig) -> Any:
    """How each parameter lies on a mesh (sharding/rules.py)."""
    return map_declared(lambda _, parameter: spec_of(parameter.axes), model_config)


def layer_specs(model_config: ModelConfig) -> Any:
    """`specs` of one layer, which all are alike."""
    return specs(dataclasses.replace(model_config, num_hidden_layers=1)).layers[0]


def shardings(model_config: ModelConfig, split: Split) -> Any:
    """Where each parameter lies on the devices of a mesh."""
    return jax.tree.map(split.sharding, specs(model_config))


def abstract(model_config: ModelConfig) -> Decoder:
    """Shapes and dtypes, nothing allocated."""
    return map_declared(lambda _, p: jax.ShapeDtypeStruct(p.shape, jnp.dtype(p.dtype)), model_config)


def initialise(model_config: ModelConfig, key: Array, scale: float = 0.02) -> Decoder:
    """Random parameters: normal with deviation `scale`, ones for norms, zeros for biases and padded vocabulary rows.

    Copies of a key-value head are equal.
    """
    places = {path: place for place, path in enumerate(by_path(declare(model_config)))}

    def array(path: str, parameter: Parameter) -> Array:
        if parameter.init != "normal":
            return (jnp.ones if parameter.init == "ones" else jnp.zeros)(parameter.shape, parameter.dtype)
        values = scale * jax.random.normal(jax.random.fold_in(key, places[path]), parameter.shape)
        if parameter.axes[1] == "vocab":
            values = _without_padding(values, model_config.vocab_size)
        return values.astype(parameter.dtype)

    drawn = map_declared(array, model_config)
    return own_heads.with_copies(model_config, own_heads.weights_once(model_config, drawn))


def _without_padding(table: Float[Array, "leaf N D"], vocab_size: int) -> Float[Array, "leaf N D"]:
    """The table with zeros in the rows after the vocabulary."""
    leaves, rows, _ = table.shape
    inside = jnp.arange(leaves * rows) < vocab_size
    return jnp.where(inside.reshape(leaves, rows, 1), table, 0)
