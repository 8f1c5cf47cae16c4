"""Metrics: how far the policy that learns has moved from the one that sampled. On-policy the distance is exactly 0."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxengine.rl.losses import clipped_sides, kl_penalty, ratios, sequence_shares, token_shares
from jaxengine.rl.objective import Objective


def mismatch(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    advantages: Float[Array, " B"] | Float[Array, "B T"],
    objective: Objective,
) -> dict[str, Float[Array, ""]]:
    """Scalars over the tokens under `mask`: ratio_mean and ratio_max of the objective's ratio, clip_low and clip_high
    (the shares that the clip bounds from below and from above) and their sum clip_rate, kl (of π_old from π_new, in
    nats a token) and max_delta (the largest |Δlogprob|). Ratios of sequences count once a sequence. Of no token the
    ratio is 1 and all else 0.

    The KL is estimator k3 of losses.kl_penalty with r = π_new / π_old at tokens drawn from π_old. It is infinite, as
    max_delta is, where π_new gives probability 0 to a token that π_old drew.
    """
    advantages = jnp.broadcast_to(advantages[:, None] if advantages.ndim == 1 else advantages, mask.shape)
    rho, delta = ratios(logprobs, old_logprobs, mask, objective), jnp.where(mask, logprobs - old_logprobs, 0.0)
    low, high = clipped_sides(rho, jnp.where(mask, advantages, 0.0), objective)
    shares = token_shares(mask) if objective.ratio == "token" else sequence_shares(mask)
    clip_low, clip_high = ((shares * side).sum() for side in (low, high))
    return {
        "ratio_mean": 1 + jnp.where(mask, shares * (rho - 1), 0.0).sum(),
        "ratio_max": jnp.where(mask.any(), jnp.where(mask, rho, -jnp.inf).max(), 1.0),
        "clip_low": clip_low,
        "clip_high": clip_high,
        "clip_rate": clip_low + clip_high,
        "kl": mean_over(jnp.expm1(delta) - delta, mask),
        "max_delta": jnp.abs(delta).max(),
    }


def kl_reference(
    logprobs: Float[Array, "B T"], reference: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """KL of the policy from the reference in nats a token, by k3 of losses.kl_penalty whatever the objective takes, so
    that runs compare."""
    return mean_over(kl_penalty(logprobs, reference, mask), mask)


def staleness(weight_versions: Int[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"], version: int) -> float:
    """By how many versions the weights that learn are ahead of those that drew a token: the mean under `mask`, 0 where
    there is none."""
    return float((version - weight_versions[mask]).mean(dtype=np.float64)) if mask.any() else 0.0


class RewardMetrics(NamedTuple):
    """Of the rewards that are finite, which are those that train. Without one, mean and deviation are NaN."""

    mean: float
    deviation: float  # with divisor B
    no_spread: float  # share of groups whose rewards are all equal; 0 without a group
    left_out: float  # share of samples without such a reward


def of_rewards(rewards: Float[np.ndarray, " B"], group: Int[np.ndarray, " B"]) -> RewardMetrics:
    """What a batch's rewards are like."""
    counts = np.isfinite(rewards)
    kept, of = rewards[counts].astype(np.float64), group[counts]
    equal = [not has_spread(kept[of == name]) for name in np.unique(of)]
    return RewardMetrics(
        mean=mean_reward(rewards),
        deviation=float(kept.std()) if len(kept) else math.nan,
        no_spread=float(np.mean(equal)) if equal else 0.0,
        left_out=float(1 - counts.mean()),
    )


def has_spread(rewards: Float[np.ndarray, " G"]) -> bool:
    """Whether the rewards of a group differ, of those that are finite."""
    kept = rewards[np.isfinite(rewards)]
    return len(kept) > 0 and bool(kept.max() > kept.min())


def mean_reward(rewards: Float[np.ndarray, " B"]) -> float:
    """The mean of the rewards that are finite; NaN without one."""
    kept = rewards[np.isfinite(rewards)]
    return float(kept.mean(dtype=np.float64)) if len(kept) else math.nan


def mean_over(x: Array, mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Mean of x over the tokens under `mask`; 0 where there is none."""
    return jnp.where(mask, x, 0).sum(dtype=jnp.float32) / jnp.maximum(mask.sum(), 1)


def explained_variance(
    values: Float[Array, "B T"], returns: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """1 - Var(returns - values) / Var(returns) over the tokens under `mask`: 1 for a perfect critic, 0 for the mean."""
    return 1 - _variance(returns - values, mask) / jnp.maximum(_variance(returns, mask), 1e-8)


def _variance(x: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    return mean_over((x - mean_over(x, mask)) ** 2, mask)
