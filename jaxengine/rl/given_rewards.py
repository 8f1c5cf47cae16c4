"""Rewards as a trainer is given them: one a sample, `[B]`, or one a token, `[B, T]`.

One a token stand at those tokens of rollout.mask that they are for, and are 0 elsewhere. With a critic each goes to its
token, where a sample's one goes to its last. A group's advantages compare samples, whose reward is then their sum.

A sample of which a reward is not finite, NaN for one, has none and is left out.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxengine.rl.advantages import at_last_token

Given = Float[np.ndarray, " B"] | Float[np.ndarray, "B T"]


def check_rewards(rewards: Given, mask: Bool[np.ndarray, "B T"]) -> None:
    """Raises ValueError where rewards are neither one a sample nor one a token, and where one stands outside `mask`."""
    shape, (samples, width) = np.shape(rewards), mask.shape
    if shape not in ((samples,), (samples, width)):
        raise ValueError(
            f"rewards must be {[samples]}, one a sample, or {[samples, width]}, one a token, got {list(shape)}"
        )
    if len(shape) == 2:
        outside = np.isfinite(of_samples(rewards))[:, None] & ~mask & (np.asarray(rewards) != 0)
        for row, position in np.argwhere(outside)[:1]:
            raise ValueError(
                f"rewards[{row}, {position}] is {rewards[row][position]}, and the token there is none that was "
                "generated: outside the rollout's mask rewards must be 0"
            )


def of_samples(rewards: Given) -> Float[np.ndarray, " B"]:
    """The reward of each sample, in float32: of one a token their sum, infinite or NaN where one of them is not finite.

    Added up in order in float64, so that padding at the end changes no bit.
    """
    if np.ndim(rewards) == 1:
        return np.asarray(rewards, np.float32)
    with np.errstate(invalid="ignore"):  # infinities of both signs
        return np.cumsum(np.asarray(rewards, np.float32), axis=-1, dtype=np.float64)[:, -1].astype(np.float32)


class SampleAndTokenRewards(NamedTuple):
    """What advantages are made of; 0 where a sample is left out."""

    samples: Float[Array, " B"]
    tokens: Float[Array, "B T"]
    has_reward: Bool[np.ndarray, " B"]


def by_sample_and_token(rewards: Given, mask: Bool[np.ndarray, "B T"]) -> SampleAndTokenRewards:
    """Rewards that check_rewards lets pass, in both forms."""
    sums = of_samples(rewards)
    has_reward = np.isfinite(sums)
    samples = jnp.asarray(np.where(has_reward, sums, 0))
    if np.ndim(rewards) == 1:
        return SampleAndTokenRewards(samples, at_last_token(samples, jnp.asarray(mask)), has_reward)
    tokens = np.where(has_reward[:, None], np.asarray(rewards, np.float32), 0)
    return SampleAndTokenRewards(samples, jnp.asarray(tokens), has_reward)
