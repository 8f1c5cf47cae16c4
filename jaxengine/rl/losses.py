"""Losses on the logprobs of sampled tokens. One function, and an Objective that says which published algorithm it is.

All of them maximise min(ρ A, clip(ρ) A) with ρ = π_new / π_old; they differ in what the ratio is of (a token or a sequence), where it is
clipped, how tokens are averaged, and in the advantages that belong to them (advantages.py).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxengine.base.arguments import strict_keywords
from pallas_kernels.pinned_math import exp

Advantage = Literal["scaled", "centred", "leave-one-out", "generalized"]
Estimator = Literal["k1", "k2", "k3"]
CHOICES = {
    "advantage": ("scaled", "centred", "leave-one-out", "generalized"),
    "ratio": ("token", "sequence"),
    "average": ("sequence", "token", "constant"),
    "kl": ("k1", "k2", "k3"),
}


@strict_keywords
@dataclasses.dataclass(frozen=True)
class Objective:
    """Which loss. The clip keeps ρ within [1 - clip_low, 1 + clip_high] where leaving it would raise the objective.

    `average` "sequence": mean over a sample's tokens, then over samples; "token": mean over all tokens of the batch; "constant": a sum
    over a sample's tokens divided by `budget` tokens (None: the width T of the batch), then mean over samples.
    `kl_coefficient` weighs the KL penalty to a reference policy, found by the estimator `kl`. Raises ValueError naming the field.
    """

    advantage: Advantage = "scaled"
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    average: Literal["sequence", "token", "constant"] = "sequence"
    budget: int | None = None
    kl: Estimator = "k3"
    kl_coefficient: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not 0 <= self.clip_low <= 1 or not self.clip_high >= 0:
            raise ValueError(
                f"clip_low must be within 0 … 1 and clip_high at least 0, got {self.clip_low} and {self.clip_high}"
            )
        if not self.kl_coefficient >= 0:
            raise ValueError(f"kl_coefficient must be at least 0, got {self.kl_coefficient}")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"budget must be at least 1 token, got {self.budget}")


ALGORITHMS = {
    "grpo": Objective(),  # Shao et al. 2024, arXiv:2402.03300, eq. 3; its KL penalty is kl_coefficient, 0.04 there
    "dr_grpo": Objective(advantage="centred", average="constant"),  # Liu et al. 2025, arXiv:2503.20783
    "dapo": Objective(
        clip_high=0.28, average="token"
    ),  # Yu et al. 2025, arXiv:2503.14476: clip-higher, token-level mean, no KL
    "gspo": Objective(ratio="sequence", clip_low=3e-4, clip_high=4e-4),  # Zheng et al. 2025, arXiv:2507.18071
    "rloo": Objective(
        advantage="leave-one-out", average="constant"
    ),  # Ahmadian et al. 2024, arXiv:2402.14740, with PPO's clip
    "ppo": Objective(advantage="generalized", average="token"),  # Schulman et al. 2017, arXiv:1707.06347, eq. 7
}


def policy_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    advantages: Float[Array, " B"] | Float[Array, "B T"],
    objective: Objective,
    *,
    weights: Float[Array, "B T"] | None = None,
    reference: Float[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """The loss to minimise, differentiable in `logprobs`. What stands outside `mask` is never read.

    `weights` are token_weights of the whole batch where this is a part of one: the losses of its parts, and their gradients, add up to
    the batch's. `reference` are the tokens' logprobs under the reference policy. Raises ValueError where a KL penalty has none.
    """
    weights = token_weights(mask, objective) if weights is None else weights
    advantages = jnp.broadcast_to(advantages[:, None] if advantages.ndim == 1 else advantages, mask.shape)
    rho = ratios(logprobs, old_logprobs, mask, objective)
    # Not jnp.minimum, whose gradient is halved between equals: where the clip does not bind, the gradient is the ratio's alone.
    bound = jnp.where(advantages > 0, 1 + objective.clip_high, 1 - objective.clip_low)
    gained = jnp.where(is_clipped(rho, advantages, objective), bound, rho) * jnp.where(mask, advantages, 0.0)
    loss = -(weights * gained).sum()
    if objective.kl_coefficient == 0:
        return loss
    if reference is None:
        raise ValueError(
            f"kl_coefficient={objective.kl_coefficient} asks for a penalty, but no logprobs of a reference policy were given"
        )
    return loss + objective.kl_coefficient * (weights * kl_penalty(logprobs, reference, mask, objective.kl)).sum()


def token_weights(mask: Bool[Array, "B T"], objective: Objective) -> Float[Array, "B T"]:
    """What each token of a batch counts in its loss. Rows without a token are no samples."""
    if objective.average == "token":
        return token_shares(mask)
    each = mask.sum(-1, keepdims=True, dtype=jnp.float32)
    samples = jnp.maximum((each > 0).sum(), 1)
    length = jnp.maximum(each, 1) if objective.average == "sequence" else float(objective.budget or mask.shape[1])
    return jnp.where(mask, 1 / (samples * length), 0.0)


def token_shares(mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """1 / (tokens of the batch) under the mask, 0 elsewhere: the weights of a mean over tokens."""
    return jnp.where(mask, 1 / jnp.maximum(mask.sum(), 1), 0.0)


def ratios(
    logprobs: Float[Array, "B T"], old_logprobs: Float[Array, "B T"], mask: Bool[Array, "B T"], objective: Objective
) -> Float[Array, "B T"]:
    """π_new / π_old of each token, or GSPO's (π_new / π_old)^(1 / length) of its sequence; exactly 1 where nothing has changed.

    The sequence's ratio carries each token's own gradient: s_t = sg[s] · π_t / sg[π_t], the token form of GSPO (arXiv:2507.18071,
    section 4.3). Its gradient is GSPO's where a sequence has one advantage, and it takes one advantage a token too.
    """
    log_ratio = jnp.where(mask, logprobs - old_logprobs, 0.0)
    if objective.ratio == "token":
        return exp(log_ratio)
    mean = log_ratio.sum(-1, keepdims=True) / jnp.maximum(mask.sum(-1, keepdims=True), 1)
    possible = mask & (logprobs > -jnp.inf)
    own = jnp.where(possible, logprobs - jax.lax.stop_gradient(logprobs), 0.0)  # 0, with a gradient
    return exp(jax.lax.stop_gradient(mean) + own)


def is_clipped(rho: Float[Array, "B T"], advantages: Float[Array, "B T"], objective: Objective) -> Bool[Array, "B T"]:
    """Where the clip binds: the ratio has left its range on the side that the advantage drives it to, and has no gradient any more."""
    return ((advantages > 0) & (rho > 1 + objective.clip_high)) | ((advantages < 0) & (rho < 1 - objective.clip_low))


def kl_penalty(
    logprobs: Float[Array, "B T"], reference: Float[Array, "B T"], mask: Bool[Array, "B T"], estimator: Estimator = "k3"
) -> Float[Array, "B T"]:
    """Estimates of KL(π ‖ reference) at tokens drawn from π; 0 outside `mask`, and exactly 0 where both logprobs are equal.

    0 too at a token that either policy has cut from its support (top-k, top-p or min-p; weights that have moved since it was drawn):
    where π has none of it, it is no part of the sum; where the reference has none, KL is infinite and has nothing to teach.

    With r = reference / π: k1 = -log r, k2 = (log r)² / 2, k3 = r - 1 - log r. J. Schulman, "Approximating KL Divergence", 2020,
    http://joschu.net/blog/kl-approx.html. k1 and k3 are unbiased as values; as a loss k2's gradient is that of the KL.
    """
    log_r = jnp.where(mask & (jnp.minimum(logprobs, reference) > -jnp.inf), reference - logprobs, 0.0)
    if estimator == "k1":
        return -log_r
    return log_r**2 / 2 if estimator == "k2" else jnp.expm1(log_r) - log_r


def value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip: float = 0.2,
    weights: Float[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """Half the larger squared error of the value and of the value kept within `clip` of the old one; mean over tokens unless weighed.

    The clipped form is of PPO's implementations, not of its paper: Engstrom et al. 2020, arXiv:2005.12729, section 3.
    """
    weights = token_shares(mask) if weights is None else weights
    moved = jnp.where(mask, values - old_values, 0.0)
    error, old_error = (jnp.where(mask, x - returns, 0.0) for x in (values, old_values))
    bounded = old_error + jnp.clip(moved, -clip, clip)
    binds = (jnp.abs(moved) > clip) & (
        bounded**2 > error**2
    )  # then the error is a constant; not jnp.maximum, for its gradient at equals
    return 0.5 * (weights * jnp.where(binds, jax.lax.stop_gradient(bounded), error) ** 2).sum()
