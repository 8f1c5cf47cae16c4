"""Key-value heads that several leaves hold (config.py): each of them once, and with its copies again.

What is trained has each head once, so that an optimiser, its moments and a norm count it once, and copies stay equal.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from jaxengine.base.pytree import pytree
from jaxengine.config import ModelConfig
from sharding.leaves import tree_sum


@pytree
class OwnHeads:
    """A packed projection, or its bias, with each key-value head once."""

    queries: Array  # [leaf, Hh / leaf, …]
    keys_values: Array  # [K, 2h, …]: of each head its keys, then its values


def weights_once(model_config: ModelConfig, params: Any) -> Any:
    """A Decoder of weights with OwnHeads in the place of packed projections, made of the first copy of each head.

    Where no head has copies, it is given back as it is.
    """

    def first(packed: Float[Array, "leaf N ..."]) -> OwnHeads:
        queries, copies = _apart(model_config, packed)
        return OwnHeads(queries, copies[0])

    return _mapped(model_config, first, params)


def gradient_once(model_config: ModelConfig, gradient: Any, whole: NamedSharding | None = None) -> Any:
    """A Decoder of gradients in the shape of `weights_once`: a head's is the sum of its copies', by the tree.

    `whole` is where an array lies that every device of a mesh has.
    """

    def added(packed: Float[Array, "leaf N ..."]) -> OwnHeads:
        queries, copies = _apart(model_config, packed)
        if whole is not None:
            copies = jax.lax.with_sharding_constraint(copies, whole)
        return OwnHeads(queries, tree_sum(copies))

    return _mapped(model_config, added, gradient)


def homes_once(model_config: ModelConfig, homes: Any, whole: Any) -> Any:
    """Where `weights_once` lie, of weights with these shardings: every device has all heads, which are few."""
    return _mapped(model_config, lambda home: OwnHeads(home, whole), homes)


def with_copies(model_config: ModelConfig, params: Any) -> Any:
    """The inverse of `weights_once`."""

    def packed(own: OwnHeads) -> Float[Array, "leaf N ..."]:
        copies = jnp.repeat(own.keys_values, model_config.key_value_copies, axis=0)
        return jnp.concatenate([own.queries, copies], axis=1)

    return _mapped(model_config, packed, params)


def check_copies(model_config: ModelConfig, params: Any) -> None:
    """Raises ValueError where copies of a head differ by a bit."""

    def check(packed: Float[Array, "leaf N ..."]) -> None:
        _, copies = _apart(model_config, packed)
        words = copies.astype(jnp.float32).view(jnp.uint32)
        if not (words == words[:1]).all():
            raise ValueError(different_copies(model_config))

    _mapped(model_config, check, params)


def different_copies(model_config: ModelConfig) -> str:
    """What to say of copies that differ."""
    return (
        f"the {model_config.key_value_copies} copies of a key-value head differ (reduction_leaves="
        f"{model_config.reduction_leaves}, num_key_value_heads={model_config.num_key_value_heads}), so there is no one "
        "head: weights under Hugging Face's names get equal copies, and jaxengine.rl.trainer.Trainer keeps them equal"
    )


def _mapped(model_config: ModelConfig, function: Callable[[Any], Any], params: Any) -> Any:
    """A Decoder with the function of each packed projection and bias; the same one where no head has copies."""
    if model_config.key_value_copies == 1:
        return params

    def changed(layer: Any) -> Any:
        given = layer.attention
        bias = None if given.qkv_bias is None else function(given.qkv_bias)
        attention = dataclasses.replace(given, qkv=function(given.qkv), qkv_bias=bias)
        return dataclasses.replace(layer, attention=attention)

    return dataclasses.replace(params, layers=tuple(changed(layer) for layer in params.layers))


def _apart(model_config: ModelConfig, packed: Float[Array, "leaf N ..."]) -> tuple[Array, Float[Array, "c K 2h ..."]]:
    """The queries of a packed projection, and the copies of its keys and values."""
    first = model_config.num_attention_heads * model_config.head_dim // model_config.reduction_leaves
    held = packed[:, first:]
    shape = model_config.num_key_value_heads, model_config.key_value_copies, *held.shape[1:]
    return packed[:, :first], held.reshape(shape).swapaxes(0, 1)
