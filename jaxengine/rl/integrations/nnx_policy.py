"""The policy as a flax nnx.Module: our parameters as nnx.Param, our forward pass as its call.

Values inside `nnx.value_and_grad` are the ones that `generate` reported; `nnx.Optimizer` and optax train it as any
other module.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.device.grammar_mask import GrammarMask
from jaxengine.device.sampling_mask import SamplingMask
from jaxengine.device.scoring_input import check_length
from jaxengine.device.trunk import hidden_states
from jaxengine.engine.scoring_proof import scoring_tiles
from jaxengine.engine.weights import check_fits
from jaxengine.functional import score
from jaxengine.models import decoder
from jaxengine.models.parameter import Parameter
from jaxengine.models.params import Decoder, declare
from jaxengine.ops.kernels import Kernels, choose_kernels
from jaxengine.ops.regions import over_tiles
from jaxengine.sampling_params import SamplingParams
from pallas_kernels.tiles import unknown_zero


class Policy(nnx.Module):
    """A decoder whose arrays are nnx.Param, at the paths that they have in our pytree:
    `policy.layers[0].attention.qkv`.

    Arrays go in and out as they are and are never copied: `policy.params` is what `LLM.update_params` and
    `jaxengine.generate` take, and `policy.set_params` takes it back. Raises ValueError where params do not fit config,
    and where config has more leaves than key-value heads, because an nnx.Optimizer would train the copies of a head
    apart.
    """

    def __init__(self, config: ModelConfig, params: Decoder, *, kernels: str = "auto") -> None:
        if config.key_value_copies > 1:
            raise ValueError(
                f"reduction_leaves={config.reduction_leaves} gives each of num_key_value_heads="
                f"{config.num_key_value_heads} several copies, which an nnx.Optimizer would train apart: take "
                "config.with_leaves() with weights of that, or jaxengine.rl.trainer.Trainer"
            )
        check_fits(params, config)
        self.config, self.kernels = config, choose_kernels(kernels, config)
        _spread(self, params)

    @property
    def params(self) -> Decoder:
        """The parameters as our pytree, of the arrays that the module holds now."""
        return _gathered(declare(self.config), self)

    def set_params(self, params: Decoder) -> None:
        """Hold other arrays. Raises ValueError where they do not fit the model."""
        check_fits(params, self.config)
        _put(params, self)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """float32 logits of the token after each of `tokens`. Differentiable by reverse mode, the same bits inside it
        and out.

        Their log-softmax is `score`'s at temperature 1, in bits where `policy.kernels.draw` takes it. All
        of [B, T, V] is kept: a loss on logprobs needs much less memory through `logprobs`. Raises ValueError where T is
        more than the model's context.
        """
        check_length(tokens.shape[1], self.config, "T, padding included")
        return all_logits(self.config, self.kernels, self.params, jnp.asarray(tokens))

    def logprobs(
        self,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        entropy: bool = False,
        sampling_mask: SamplingMask | None = None,
        grammar_mask: GrammarMask | None = None,
    ) -> Any:
        """`jaxengine.score` under these parameters: the logprobs that `generate` reported, bit for bit."""
        return score(
            self.params,
            tokens,
            mask,
            sampling_params,
            config=self.config,
            entropy=entropy,
            sampling_mask=sampling_mask,
            grammar_mask=grammar_mask,
            kernels=self.kernels.name,
        )


def all_logits(
    config: ModelConfig, kernels: Kernels, params: Decoder, tokens: Int[Array, "B T"]
) -> Float[Array, "B T V"]:
    """Logits of every position, in the pinned regions of the engine's steps."""
    (batch, length), tiles = tokens.shape, scoring_tiles(config, kernels)
    x = hidden_states(config, kernels, params, tokens, jnp.full(batch, length), tiles.layers)
    x = x.reshape(batch * length, -1)
    rows = jnp.pad(x, ((0, -x.shape[0] % tiles.head_rows), (0, 0)))
    weights = (params.norm, params.output_head)
    body = functools.partial(_head, config, kernels)
    logits = over_tiles(body, tiles.head_rows, weights, rows, batch * length + unknown_zero(params.norm, tokens))
    return logits[: batch * length, : config.vocab_size].reshape(batch, length, -1)


def _head(
    config: ModelConfig, kernels: Kernels, weights: tuple[Array, Array], x: Float[Array, "t D"]
) -> Float[Array, "t V"]:
    return decoder.logits(config, kernels, *weights, x)


# -- between our pytree and nnx ----------------------------------------------------------------------------------------


class _Part(nnx.Module):
    """One of our dataclasses of arrays."""

    def __init__(self, tree: Any) -> None:
        _spread(self, tree)


def _spread(module: nnx.Module, tree: Any) -> None:
    for field in dataclasses.fields(tree):
        setattr(module, field.name, _wrapped(getattr(tree, field.name)))


def _wrapped(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, tuple):
        return nnx.List([_wrapped(item) for item in value])
    return _Part(value) if dataclasses.is_dataclass(value) else nnx.Param(value)


def _gathered(declared: Any, held: Any) -> Any:
    """Our tree in the shape of `declared`, from what the module holds."""
    if declared is None:
        return None
    if isinstance(declared, Parameter):
        return held.get_value()
    if isinstance(declared, tuple):
        return tuple(_gathered(item, part) for item, part in zip(declared, held, strict=True))
    return type(declared)(
        **{
            field.name: _gathered(getattr(declared, field.name), getattr(held, field.name))
            for field in dataclasses.fields(declared)
        }
    )


def _put(tree: Any, held: Any) -> None:
    if isinstance(held, nnx.Param):
        held.set_value(tree)
    elif isinstance(tree, tuple):
        for item, part in zip(tree, held, strict=True):
            _put(item, part)
    elif tree is not None:
        for field in dataclasses.fields(tree):
            _put(getattr(tree, field.name), getattr(held, field.name))
