"""Losses on the logprobs of sampled tokens: one function, and an Objective for each published algorithm.

All of them maximise min(ρ A, clip(ρ) A) with ρ = π_new / π_old. They differ in whether the ratio is that of a token or
of a sequence, in where it is clipped, in how tokens are averaged, and in their advantages (advantages.py).
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
    """Which loss. The clip keeps ρ within [1 - clip_low, 1 + clip_high] where a ρ outside would raise the objective.

    `average` "sequence": mean over a sample's tokens, then over samples; "token": mean over all tokens of the batch;
    "constant": a sum over a sample's tokens divided by `budget` tokens (None: the width T of the batch), then mean
    over samples. `kl_coefficient` is the weight of the KL penalty to a reference policy, estimated by `kl`. Raises
    ValueError naming the field.
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
    # Yu et al. 2025, arXiv:2503.14476: clip-higher, token-level mean, no KL
    "dapo": Objective(clip_high=0.28, average="token"),
    "gspo": Objective(ratio="sequence", clip_low=3e-4, clip_high=4e-4),  # Zheng et al. 2025, arXiv:2507.18071
    # Ahmadian et al. 2024, arXiv:2402.14740, with PPO's clip
    "rloo": Objective(advantage="leave-one-out", average="constant"),
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
    """The loss to minimise, differentiable in `logprobs`. Values outside `mask` do not count, NaN among them.

    Where the arrays are a part of a batch, `weights` are token_weights of the whole batch: the losses of its parts,
    and their gradients, add up to the batch's. `reference` are the tokens' logprobs under the reference policy. Raises
    ValueError where a KL penalty has none.
    """
    weights = token_weights(mask, objective) if weights is None else weights
    advantages = jnp.broadcast_to(advantages[:, None] if advantages.ndim == 1 else advantages, mask.shape)
    rho = ratios(logprobs, old_logprobs, mask, objective)
    # Not jnp.minimum, because it halves the gradient between equal arguments: at ratio 1 they are equal.
    bound = jnp.where(advantages > 0, 1 + objective.clip_high, 1 - objective.clip_low)
    gained = jnp.where(is_clipped(rho, advantages, objective), bound, rho) * jnp.where(mask, advantages, 0.0)
    loss = -(weights * gained).sum()
    if objective.kl_coefficient == 0:
        return loss
    if reference is None:
        raise ValueError(
            f"kl_coefficient={objective.kl_coefficient} asks for a penalty, but no logprobs of a reference policy "
            "were given"
        )
    return loss + objective.kl_coefficient * (weights * kl_penalty(logprobs, reference, mask, objective.kl)).sum()


def token_weights(mask: Bool[Array, "B T"], objective: Objective) -> Float[Array, "B T"]:
    """The weight of each token of a batch in its loss, 0 outside the mask. A row without a token is no sample."""
    if objective.average == "token":
        return token_shares(mask)
    counts = mask.sum(-1, keepdims=True, dtype=jnp.float32)
    samples = jnp.maximum((counts > 0).sum(), 1)
    length = jnp.maximum(counts, 1) if objective.average == "sequence" else float(objective.budget or mask.shape[1])
    return jnp.where(mask, 1 / (samples * length), 0.0)


def token_shares(mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """1 / (tokens of the batch) under the mask, 0 elsewhere: the weights of a mean over tokens."""
    return jnp.where(mask, 1 / jnp.maximum(mask.sum(), 1), 0.0)


def ratios(
    logprobs: Float[Array, "B T"], old_logprobs: Float[Array, "B T"], mask: Bool[Array, "B T"], objective: Objective
) -> Float[Array, "B T"]:
    """π_new / π_old of each token, or GSPO's (π_new / π_old)^(1 / length) of its sequence; 1 for equal logprobs.

    The ratio of the sequence has the gradient of each token's logprob: s_t = sg[s] · π_t / sg[π_t], the token form of
    GSPO (arXiv:2507.18071, section 4.3). Its gradient is GSPO's where all tokens of a sequence have one advantage.
    """
    log_ratio = jnp.where(mask, logprobs - old_logprobs, 0.0)
    if objective.ratio == "token":
        return exp(log_ratio)
    mean = log_ratio.sum(-1, keepdims=True) / jnp.maximum(mask.sum(-1, keepdims=True), 1)
    possible = mask & (logprobs > -jnp.inf)
    zero = jnp.where(possible, logprobs - jax.lax.stop_gradient(logprobs), 0.0)  # with the gradient of the logprob
    return exp(jax.lax.stop_gradient(mean) + zero)


def is_clipped(rho: Float[Array, "B T"], advantages: Float[Array, "B T"], objective: Objective) -> Bool[Array, "B T"]:
    """Where the clip binds, without a gradient: the ratio has left its range in the direction of the advantage."""
    return ((advantages > 0) & (rho > 1 + objective.clip_high)) | ((advantages < 0) & (rho < 1 - objective.clip_low))


def kl_penalty(
    logprobs: Float[Array, "B T"], reference: Float[Array, "B T"], mask: Bool[Array, "B T"], estimator: Estimator = "k3"
) -> Float[Array, "B T"]:
    """Estimates of KL(π ‖ reference) at tokens drawn from π; exactly 0 outside `mask` and between equal logprobs.

    Also 0 at a token to which either policy gives probability 0 (top-k, top-p or min-p may cut it, once the weights
    have moved). Where π gives 0, the token is no part of the sum; where the reference does, the KL is infinite and has
    no useful gradient.

    With r = reference / π: k1 = -log r, k2 = (log r)² / 2, k3 = r - 1 - log r. J. Schulman, "Approximating KL
    Divergence", 2020, http://joschu.net/blog/kl-approx.html. k1 and k3 are unbiased as values; as a loss k2's gradient
    is that of the KL.
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
    """Half the larger of two squared errors: of the value, and of the value clipped to within `clip` of the old one.
    The mean over tokens, or the sum weighted by `weights`.

    PPO's implementations clip, its paper does not: Engstrom et al. 2020, arXiv:2005.12729, section 3.
    """
    weights = token_shares(mask) if weights is None else weights
    moved = jnp.where(mask, values - old_values, 0.0)
    error, old_error = (jnp.where(mask, x - returns, 0.0) for x in (values, old_values))
    bounded = old_error + jnp.clip(moved, -clip, clip)
    # Where it binds, the error is a constant. Not jnp.maximum, because it halves the gradient between equal arguments.
    binds = (jnp.abs(moved) > clip) & (bounded**2 > error**2)
    return 0.5 * (weights * jnp.where(binds, jax.lax.stop_gradient(bounded), error) ** 2).sum()
