"""Advantages: how much better a sample, or a token, did than expected. Pure functions of float32 arrays.

Rewards are compared within a group, the samples of one prompt, by the ids `[B]` of Rollout.group. A row of group -1, a
failed sample or padding, is left out: its advantage is 0, and it is in no other row's baseline. A sum over a group is
the sum of a row of a [B, B] array and no scatter, so that its order is fixed on every device.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SMALLEST_DEVIATION = 1e-6  # added to a standard deviation before it divides


def check_groups(group: Int[np.ndarray, " B"], advantage: str) -> None:
    """Raises ValueError where no two samples share a group: nothing would be learned."""
    if len(np.unique(group)) == len(group):
        raise ValueError(
            f"each of the {len(group)} samples is a group of its own, so that every {advantage} advantage is 0: draw "
            "several samples a prompt (SamplingParams(n=…)), or say which belong together "
            "(Rollout.from_outputs(outputs, groups=…))"
        )


def of_samples(
    rewards: Float[Array, " B"], group: Int[Array, " B"], kind: str, deviation: str = "population"
) -> Float[Array, " B"]:
    """The advantages of an objective without a critic (objective.Objective.advantage and .deviation)."""
    if kind == "leave-one-out":
        return leave_one_out(rewards, group)
    return group_relative(rewards, group, scaled=kind == "scaled", deviation=deviation)


def group_relative(
    rewards: Float[Array, " B"], group: Int[Array, " B"], *, scaled: bool = True, deviation: str = "population"
) -> Float[Array, " B"]:
    """Reward minus the mean of its group; where `scaled`, divided by the group's standard deviation.

    Its divisor is G for the deviation of a "population" and G - 1 for that of a "sample"; the paper names neither.

    Scaled: GRPO, Shao et al. 2024, arXiv:2402.03300, section 4.1.2. Not scaled: Dr. GRPO, Liu et al. 2025,
    arXiv:2503.20783. Exactly 0 where all rewards of a group are equal.
    """
    same, size = _groups(group)
    centred = _centred(rewards, same, size)
    if not scaled:
        return centred
    divisor = size if deviation == "population" else jnp.maximum(size - 1.0, 1.0)
    variance = jnp.where(same, centred**2, 0.0).sum(-1) / divisor
    return centred / (jnp.sqrt(variance) + SMALLEST_DEVIATION)


def leave_one_out(rewards: Float[Array, " B"], group: Int[Array, " B"]) -> Float[Array, " B"]:
    """Reward minus the mean of the other samples of its group; 0 in a group of one.

    RLOO, Ahmadian et al. 2024, arXiv:2402.14740. r - (Σ - r) / (G - 1) is G / (G - 1) times group_relative's r - Σ / G.
    """
    same, size = _groups(group)
    return _centred(rewards, same, size) * size / jnp.maximum(size - 1.0, 1.0)


def generalized(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    discount: float = 1.0,
    decay: float = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(advantages, returns) of generalized advantage estimation: Schulman et al. 2015, arXiv:1506.02438, section 3.

    A step is a token under `mask`; `values[b, t]` is the value of the state in which token t was drawn, and
    `rewards[b, t]` is the reward after it. Tokens outside the mask (prompt, padding, a tool's answer) are no steps:
    the next state is that of the next token under the mask, and after the last one the value is 0.
    δ = r + γ v' - v, A = δ + γ λ A'; returns are A + v. Both are 0 outside the mask.
    """

    def step(later: tuple[Array, Array], column: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (advantage, next_value), (reward, value, is_step) = later, column
        here = reward + discount * next_value - value + discount * decay * advantage
        carried = jnp.where(is_step, here, advantage), jnp.where(is_step, value, next_value)
        return carried, jnp.where(is_step, here, 0.0)

    zeros = jnp.zeros(rewards.shape[0], jnp.float32)
    columns = (rewards.T.astype(jnp.float32), values.T.astype(jnp.float32), mask.T)
    _, advantages = jax.lax.scan(step, (zeros, zeros), columns, reverse=True)
    return advantages.T, jnp.where(mask, advantages.T + values, 0.0)


def at_last_token(rewards: Float[Array, " B"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """A sample's reward on the last token under its mask, 0 elsewhere. A row without such a token is all 0."""
    positions = jnp.arange(mask.shape[1])
    last = jnp.where(mask, positions, -1).max(-1, keepdims=True)
    return jnp.where(mask & (positions == last), rewards[:, None], 0.0).astype(jnp.float32)


def standardized(advantages: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Shifted and scaled to mean 0, deviation 1 over the tokens under `mask`, as PPO's implementations do; else 0."""
    count = jnp.maximum(mask.sum(), 1)
    centred = jnp.where(mask, advantages - jnp.where(mask, advantages, 0.0).sum() / count, 0.0)
    return centred / (jnp.sqrt((centred**2).sum() / count) + SMALLEST_DEVIATION)


def _groups(group: Int[Array, " B"]) -> tuple[Bool[Array, "B B"], Float[Array, " B"]]:
    """(which rows share a group, the size of each row's group). A row of group -1 shares none, and its size is 1."""
    same = (group[:, None] == group) & (group >= 0)
    return same, jnp.maximum(same.sum(-1), 1).astype(jnp.float32)


def _centred(rewards: Float[Array, " B"], same: Bool[Array, "B B"], size: Float[Array, " B"]) -> Float[Array, " B"]:
    """Rewards minus their group's mean, exactly 0 where all are equal.

    The mean is of the differences from the group's lowest, because the mean of equal numbers may be rounded.
    """
    member = jnp.diagonal(same)
    rewards = jnp.where(member, rewards, 0.0).astype(jnp.float32)
    lowest = jnp.where(member, jnp.where(same, rewards, jnp.inf).min(-1), 0.0)
    above = jnp.where(same, rewards - lowest[:, None], 0.0)
    return rewards - lowest - above.sum(-1) / size
