"""A critic on the policy's own trunk: one more row on the head, and nothing of its own below it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxengine.base.pytree import pytree
from jaxengine.config import ModelConfig
from jaxengine.device import scoring
from jaxengine.device.scoring import ScoringArrays
from jaxengine.models import own_heads
from jaxengine.models.params import Decoder, abstract
from jaxengine.ops.kernels import Kernels
from jaxengine.ops.norm import rms_norm
from jaxengine.ops.regions import over_tiles
from jaxengine.ops.tiles import ScoringTiles
from pallas_kernels.pinned_math import row_sum
from pallas_kernels.tiles import unknown_zero


@pytree
class Critic:
    """The value of a state is weight · norm(x) + bias, x the residual stream that the token's logits are made of, norm
    the policy's.
    """

    weight: Float[Array, " D"]
    bias: Float[Array, ""]


@pytree
class ActorCritic:
    """What is trained. Without a critic it is the policy alone."""

    policy: Decoder  # with each key-value head once, where it is a master copy or its gradient (models/own_heads.py)
    critic: Critic | None


@pytree
class Forward:
    """Of each token: its logprob, the value of the state that it was drawn in, its distribution's entropy in nats, and
    the logprobs of its candidates and the rest (device/candidates.py).

    Without a critic there are no values; without being asked for, no entropies and no candidates.
    """

    logprobs: Float[Array, "B T"]
    values: Float[Array, "B T"] | None
    entropies: Float[Array, "B T"] | None
    candidates: Float[Array, "B T K+1"] | None = None


def initialise(model_config: ModelConfig) -> Critic:
    """A critic with the value 0 everywhere.

    Its first gradients are not zero, because they are those of a linear function's weights.
    """
    return Critic(jnp.zeros(model_config.hidden_size, jnp.float32), jnp.zeros((), jnp.float32))


def forward(
    model: ActorCritic,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    arrays: ScoringArrays,
    *,
    model_config: ModelConfig,
    kernels: Kernels,
    tiles: ScoringTiles,
    entropy: bool = False,
    candidates: Int[Array, "B T K"] | None = None,
) -> Forward:
    """What one pass through the trunk says of the tokens under `mask`; 0 elsewhere. Differentiable in `model`.

    The logprobs are those of scoring.token_logprobs, by bits.
    """
    how: dict[str, Any] = dict(model_config=model_config, kernels=kernels, tiles=tiles)
    x, tokens = scoring.trunk(model.policy, tokens, mask, **how)
    asked: dict[str, Any] = dict(entropy=entropy, candidates=candidates)
    found = scoring.head_logprobs(model.policy, x, tokens, mask, arrays, **asked, **how)
    values = None
    if model.critic is not None:
        values = _values(model_config, model.critic, model.policy.norm, x, mask, tiles.head_rows)
    return Forward(found.logprobs, values, found.entropies, found.candidates)


def _values(
    model_config: ModelConfig,
    critic: Critic,
    norm: Float[Array, " D"],
    x: Float[Array, "B T D"],
    mask: Bool[Array, "B T"],
    tile: int,
) -> Float[Array, "B T"]:
    """In a pinned region in float32, as the logits are."""
    batch, length, width = x.shape
    rows = jnp.pad(x.reshape(-1, width), ((0, -batch * length % tile), (0, 0)))
    count = batch * length + unknown_zero(norm, mask)

    def body(weights: tuple[Array, Critic], rows: Float[Array, "t D"]) -> Float[Array, " t"]:
        norm, critic = weights
        return row_sum(rms_norm(rows, norm, model_config.rms_norm_eps) * critic.weight) + critic.bias

    found = over_tiles(body, tile, (norm, critic), rows, count)[: batch * length].reshape(batch, length)
    before = jnp.pad(found[:, :-1], ((0, 0), (1, 0)))  # the state before token t is the one after token t - 1
    return jnp.where(mask.at[:, 0].set(False), before, 0.0)


def cast(model: ActorCritic, model_config: ModelConfig) -> ActorCritic:
    """The float32 master copy as it runs: the policy in its parameters' dtypes, with all copies of its heads, and the
    critic in float32. Always a new copy.

    Rounded by reduce_precision, because XLA folds a plain conversion and the widening that a region begins with, and
    the region would read weights that were never rounded, which the engine does not have.
    """

    def rounded(x: Array, declared: jax.ShapeDtypeStruct) -> Array:
        numbers = jnp.finfo(declared.dtype)
        return jax.lax.reduce_precision(x, numbers.nexp, numbers.nmant).astype(declared.dtype)

    policy = jax.tree.map(rounded, own_heads.with_copies(model_config, model.policy), abstract(model_config))
    return ActorCritic(policy, jax.tree.map(jnp.copy, model.critic))
