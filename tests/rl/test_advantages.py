"""Advantages against their definitions, written as loops in float64."""

import functools

import jax
import numpy as np
import pytest

from jaxengine.rl import advantages
from jaxengine.rl.advantages import at_last_token, generalized, group_relative, leave_one_out, of_samples, standardized

GROUP = np.array([0, 0, 0, 2, 2, 1, 2, 2, 7])  # ids in any order, of any size, one alone
REWARDS = np.array([1.0, 0.0, 0.25, -3.0, 0.1, 0.7, 0.1, 0.1, 5.0], np.float32)


def bits(x) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


def naive(kind: str, rewards: np.ndarray, group: np.ndarray) -> np.ndarray:
    out, rewards = np.zeros(len(rewards)), rewards.astype(np.float64)
    for i, group_id in enumerate(group):
        members = [j for j, other in enumerate(group) if other == group_id and group_id >= 0]
        if kind == "leave-one-out":
            others = [rewards[j] for j in members if j != i]
            out[i] = rewards[i] - sum(others) / len(others) if others else 0.0
        elif members:
            mean = sum(rewards[j] for j in members) / len(members)
            deviation = (sum((rewards[j] - mean) ** 2 for j in members) / len(members)) ** 0.5
            out[i] = (rewards[i] - mean) / (deviation + advantages.SMALLEST_DEVIATION if kind == "scaled" else 1.0)
    return out


FUNCTIONS = {
    "scaled": group_relative,
    "centred": functools.partial(group_relative, scaled=False),
    "leave-one-out": leave_one_out,
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_groups_against_the_definition(kind):
    actual = jax.jit(FUNCTIONS[kind])(REWARDS, GROUP)
    np.testing.assert_allclose(actual, naive(kind, REWARDS, GROUP), rtol=2e-6, atol=1e-6)
    assert actual.dtype == np.float32 and actual[5] == actual[8] == 0.0


def test_by_hand():
    """Two of four are right: the mean and the deviation are 1/2; the mean of the other three is 1/3 or 2/3."""
    rewards, group = np.array([1.0, 0.0, 0.0, 1.0], np.float32), np.zeros(4, int)
    np.testing.assert_allclose(group_relative(rewards, group), [1, -1, -1, 1], rtol=3e-6)
    np.testing.assert_array_equal(group_relative(rewards, group, scaled=False), [0.5, -0.5, -0.5, 0.5])
    np.testing.assert_allclose(leave_one_out(rewards, group), [2 / 3, -2 / 3, -2 / 3, 2 / 3], rtol=1e-6)


def test_the_deviation_of_a_sample_is_numpys():
    """With divisor G - 1, as TRL and tunix have it; 0 in a group of one."""
    actual = of_samples(REWARDS, GROUP, "scaled", "sample")
    for group in np.unique(GROUP):
        rewards = REWARDS[GROUP == group]
        deviation = rewards.std(ddof=1) if len(rewards) > 1 else 1.0
        expected = (rewards - rewards.mean()) / (deviation + advantages.SMALLEST_DEVIATION)
        np.testing.assert_allclose(actual[GROUP == group], expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6 / 7, -0.7])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_equal_rewards_have_no_advantage(kind, reward):
    """All advantages are exactly 0. With a rounded mean they would be rounding errors, divided by a tiny deviation."""
    rewards = np.full(7, reward, np.float32)
    assert (bits(FUNCTIONS[kind](rewards, np.zeros(7, int))) == 0).all()


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_a_row_that_is_left_out_moves_no_bit(kind):
    rewards, group = np.insert(REWARDS, [2, 5], [np.nan, 1e9]).astype(np.float32), np.insert(GROUP, [2, 5], -1)
    actual = np.asarray(FUNCTIONS[kind](rewards, group))
    assert (actual[[2, 6]] == 0).all()
    assert (bits(np.delete(actual, [2, 6])) == bits(FUNCTIONS[kind](REWARDS, GROUP))).all()


def ragged(rng: np.random.RandomState, rows: int = 6, width: int = 12) -> np.ndarray:
    """A mask of completions of all lengths: one with a gap, an empty one, a full one."""
    where = np.arange(width)
    begin, end = rng.randint(1, 5, (rows, 1)), rng.randint(5, width + 1, (rows, 1))
    mask = (where >= begin) & (where < end)
    mask[0], mask[1] = False, True
    mask[2] = (where >= 2) & (where != 5) & (where != 6) & (where < 10)
    return mask


@pytest.mark.parametrize("discount, decay", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_generalized_advantages_are_the_sum_of_the_definition(discount, decay):
    """A_t = Σ_l (γλ)^l δ_{t+l} over the steps of the episode, the tokens under the mask. Outside everything is NaN."""
    rng = np.random.RandomState(0)
    mask = ragged(rng)
    rewards, values = (np.where(mask, rng.normal(size=mask.shape), np.nan).astype(np.float32) for _ in range(2))
    jitted = jax.jit(functools.partial(generalized, discount=discount, decay=decay))
    actual, returns = jitted(rewards, values, mask)
    expected = np.zeros(mask.shape)
    for row in range(mask.shape[0]):
        steps = np.flatnonzero(mask[row])
        r, v = rewards[row, steps].astype(np.float64), np.append(values[row, steps].astype(np.float64), 0.0)
        deltas = [r[i] + discount * v[i + 1] - v[i] for i in range(len(steps))]
        for i, t in enumerate(steps):
            expected[row, t] = sum((discount * decay) ** (j - i) * deltas[j] for j in range(i, len(steps)))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(mask, expected + np.nan_to_num(values), 0), rtol=1e-5, atol=1e-5)


def test_without_decay_or_discount_returns_are_the_rewards_to_come():
    mask = np.array([[False, True, True, False, True]])
    rewards = at_last_token(np.array([3.0], np.float32), mask)
    np.testing.assert_array_equal(rewards, [[0, 0, 0, 0, 3]])
    values = np.array([[9.0, 1.0, 2.0, 9.0, 0.5]], np.float32)
    actual, returns = generalized(rewards, values, mask, decay=1.0)
    np.testing.assert_array_equal(returns, [[0, 3, 3, 0, 3]])
    np.testing.assert_array_equal(actual, [[0, 2, 1, 0, 2.5]])


def test_a_reward_stands_at_the_last_token():
    mask = np.array([[False, False, False], [True, True, False], [False, True, True]])
    actual = at_last_token(np.array([5.0, 1.0, 2.0], np.float32), mask)
    np.testing.assert_array_equal(actual, [[0, 0, 0], [0, 1, 0], [0, 0, 2]])  # a row without a token has none


def test_standardized_over_the_tokens_under_the_mask():
    mask = ragged(np.random.RandomState(1))
    x = np.where(mask, np.random.RandomState(2).normal(5, 3, mask.shape), np.nan).astype(np.float32)
    actual = np.asarray(standardized(x, mask))
    np.testing.assert_allclose([actual[mask].mean(), actual[mask].std()], [0, 1], atol=1e-5)
    assert (actual[~mask] == 0).all()
