"""Metrics: how far the policy that learns has moved from the one that sampled. On-policy the distance is exactly 0."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxengine.rl.losses import Objective, is_clipped, ratios


def mismatch(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    advantages: Float[Array, " B"] | Float[Array, "B T"],
    objective: Objective,
) -> dict[str, Float[Array, ""]]:
    """Scalars over the tokens under `mask`: ratio_mean and ratio_max of the objective's ratio, clip_rate (the share of
    tokens that the clip leaves without a gradient), kl (of π_old from π_new, in nats a token) and max_delta (the
    largest |Δlogprob|).

    The KL is estimator k3 of losses.kl_penalty with r = π_new / π_old at tokens drawn from π_old. It is infinite, as
    max_delta is, where π_new gives probability 0 to a token that π_old drew.
    """
    advantages = jnp.broadcast_to(advantages[:, None] if advantages.ndim == 1 else advantages, mask.shape)
    rho, delta = ratios(logprobs, old_logprobs, mask, objective), jnp.where(mask, logprobs - old_logprobs, 0.0)
    clipped = is_clipped(rho, jnp.where(mask, advantages, 0.0), objective)
    return {
        "ratio_mean": 1 + mean_over(rho - 1, mask),
        "ratio_max": jnp.where(mask, rho, 0.0).max(),
        "clip_rate": mean_over(clipped, mask),
        "kl": mean_over(jnp.expm1(delta) - delta, mask),
        "max_delta": jnp.abs(delta).max(),
    }


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
