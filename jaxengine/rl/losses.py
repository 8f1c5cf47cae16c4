"""Losses on the logprobs of sampled tokens: one function for all objectives (objective.py).

Most of them maximise min(ρ A, clip(ρ) A) with ρ = π_new / π_old. They differ in whether the ratio is that of a token
or of a sequence, in where it is clipped, in how tokens are averaged, and in their advantages (advantages.py).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxengine.rl.objective import Estimator, Objective
from pallas_kernels.pinned_math import exp


def policy_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    advantages: Float[Array, " B"] | Float[Array, "B T"],
    objective: Objective,
    *,
    weights: Float[Array, "B T"] | None = None,
    reference: Float[Array, "B T"] | None = None,
    corrections: Float[Array, "B T"] | None = None,
) -> Float[Array, ""]:
    """The loss to minimise, differentiable in `logprobs`; the entropy's part is the caller's. Values outside `mask` do
    not count, NaN among them.

    Where the arrays are a part of a batch, `weights` are token_weights of the whole batch: the losses of its parts,
    and their gradients, add up to the batch's. `reference` are the tokens' logprobs under the reference policy,
    `corrections` those of correction_weights. Raises ValueError where a KL penalty in the loss has no reference.
    """
    weights = token_weights(mask, objective) if weights is None else weights
    advantages = jnp.broadcast_to(advantages[:, None] if advantages.ndim == 1 else advantages, mask.shape)
    gained = _gained(logprobs, old_logprobs, mask, jnp.where(mask, advantages, 0.0), objective)
    loss = -(weights * (gained if corrections is None else corrections * gained)).sum()
    if not objective.penalises_loss:
        return loss
    if reference is None:
        raise ValueError(
            f"kl_coefficient={objective.kl_coefficient} asks for a penalty, but no logprobs of a reference policy "
            "were given"
        )
    penalty = kl_penalty(logprobs, reference, mask, objective.kl)
    if objective.kl_ratio:
        penalty *= exp(_log_ratio(logprobs, old_logprobs, mask))
    return loss + objective.kl_coefficient * (weights * penalty).sum()


def _gained(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    advantages: Float[Array, "B T"],
    objective: Objective,
) -> Float[Array, "B T"]:
    """What each token adds to the objective, before it is weighed."""
    rho = ratios(logprobs, old_logprobs, mask, objective)
    low, high = clipped_sides(rho, advantages, objective)
    is_weight = objective.surrogate == "weight"
    highest = 1 + objective.clip_high
    if not is_weight and objective.dual_clip is not None:
        highest = jnp.where(advantages > 0, highest, objective.dual_clip)
    # Not jnp.minimum, because it halves the gradient between equal arguments: at ratio 1 they are equal.
    bounded = jnp.where(high, highest, jnp.where(low, 1 - objective.clip_low, rho))
    if is_weight:
        possible = mask & (logprobs > -jnp.inf)
        return jax.lax.stop_gradient(bounded) * advantages * jnp.where(possible, logprobs, 0.0)
    return bounded * advantages


def token_weights(mask: Bool[Array, "B T"], objective: Objective) -> Float[Array, "B T"]:
    """The weight of each token of a batch in its loss, 0 outside the mask. A row without a token is no sample.

    Raises ValueError where the average is constant and the objective has no budget.
    """
    if objective.average == "token":
        return token_shares(mask)
    if objective.average == "sequence":
        return sequence_shares(mask)
    if objective.budget is None:
        raise ValueError("average='constant' divides by a number of tokens: give budget, the most of a completion")
    return sequence_shares(mask, objective.budget)


def sequence_shares(mask: Bool[Array, "B T"], length: int | None = None) -> Float[Array, "B T"]:
    """The weights of a mean over samples of their tokens' sums divided by `length`; None: by a sample's own."""
    counts = mask.sum(-1, keepdims=True, dtype=jnp.float32)
    samples = jnp.maximum((counts > 0).sum(), 1)
    return jnp.where(mask, 1 / (samples * (jnp.maximum(counts, 1) if length is None else float(length))), 0.0)


def token_shares(mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """1 / (tokens of the batch) under the mask, 0 elsewhere: the weights of a mean over tokens."""
    return jnp.where(mask, 1 / jnp.maximum(mask.sum(), 1), 0.0)


def ratios(
    logprobs: Float[Array, "B T"], old_logprobs: Float[Array, "B T"], mask: Bool[Array, "B T"], objective: Objective
) -> Float[Array, "B T"]:
    """π_new / π_old of each token, that of its whole sequence, or GSPO's (π_new / π_old)^(1 / length) of its sequence;
    1 for equal logprobs.

    GSPO's has the gradient of each token's logprob: s_t = sg[s] · π_t / sg[π_t], its token form (arXiv:2507.18071,
    section 4.3). The gradient is GSPO's where all tokens of a sequence have one advantage.
    """
    if objective.ratio != "sequence":
        return exp(_log_ratio(logprobs, old_logprobs, mask, objective.ratio == "trajectory"))
    log_ratio = _log_ratio(logprobs, old_logprobs, mask)
    mean = log_ratio.sum(-1, keepdims=True) / jnp.maximum(mask.sum(-1, keepdims=True), 1)
    possible = mask & (logprobs > -jnp.inf)
    zero = jnp.where(possible, logprobs - jax.lax.stop_gradient(logprobs), 0.0)  # with the gradient of the logprob
    return exp(jax.lax.stop_gradient(mean) + zero)


def _log_ratio(
    logprobs: Float[Array, "B T"], others: Float[Array, "B T"], mask: Bool[Array, "B T"], summed: bool = False
) -> Float[Array, "B T"]:
    """Differences of logprobs, 0 outside the mask; or, at each token, their sum over its sequence."""
    log_ratio = jnp.where(mask, logprobs - others, 0.0)
    return jnp.broadcast_to(log_ratio.sum(-1, keepdims=True), mask.shape) if summed else log_ratio


def clipped_sides(
    rho: Float[Array, "B T"], advantages: Float[Array, "B T"], objective: Objective
) -> tuple[Bool[Array, "B T"], Bool[Array, "B T"]]:
    """Where the clip binds (below, above). It leaves no gradient there, but of surrogate "weight" a smaller one.

    The minimum is bound where the ratio has left its range in the direction of the advantage.
    """
    low, high = rho < 1 - objective.clip_low, rho > 1 + objective.clip_high
    if objective.surrogate == "weight":
        return low, high
    high &= advantages > 0
    if objective.dual_clip is not None:
        high |= (advantages < 0) & (rho > objective.dual_clip)
    return low & (advantages < 0), high


def correction_weights(
    start_logprobs: Float[Array, "B T"],
    drawn_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    objective: Objective,
) -> Float[Array, "B T"]:
    """π_start / π_drew of each token or its sequence within the objective's bounds; exactly 1 for equal logprobs.

    `drawn_logprobs` are those that the tokens were drawn with, whichever weights drew them.
    """
    weights = exp(_log_ratio(start_logprobs, drawn_logprobs, mask, objective.correction_of == "sequence"))
    low, high = objective.correction_low, objective.correction_high
    if objective.correction == "truncated":
        return jnp.clip(weights, low, high)
    return jnp.where((weights < low) | (weights > high), 0.0, weights)


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
