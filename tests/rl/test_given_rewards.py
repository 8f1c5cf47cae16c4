"""Rewards one a token, and samples that were cut off: what a trainer's batch makes of them. Nothing is generated."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from conftest import random_model
from test_advantages import bits

from jaxengine import Rollout, SamplingParams
from jaxengine.rl.advantages import at_last_token, generalized, of_samples, standardized
from jaxengine.rl.critic import Forward
from jaxengine.rl.given_rewards import of_samples as sums
from jaxengine.rl.losses import kl_penalty, token_weights
from jaxengine.rl.objective import ALGORITHMS
from jaxengine.rl.rollout import FINISH_REASONS
from jaxengine.rl.train_state import TrainerConfig
from jaxengine.rl.trainer import Trainer

TINY = random_model(vocab_size=250, num_hidden_layers=1)
B, T = 8, 12
GROUP = np.repeat([0, 1], 4)
RNG = np.random.RandomState(0)
STARTS, STOPS = RNG.randint(1, 4, (B, 1)), RNG.randint(7, T, (B, 1))  # T is more than the longest
MASK = (np.arange(T) >= STARTS) & (np.arange(T) < STOPS)
MASK[2, 5] = False  # a tool's
LOGPROBS = np.where(MASK, -RNG.rand(B, T), 0).astype(np.float32)
REWARDS = RNG.normal(size=B).astype(np.float32)
TOKEN_REWARDS = np.where(MASK, RNG.normal(size=(B, T)), 0).astype(np.float32)
CUT_OFF = np.array([0, 1, 0, 0, 0, 0, 1, 1], bool)


def rollout(**changes) -> Rollout:
    reasons = np.where(CUT_OFF, FINISH_REASONS.index("length"), FINISH_REASONS.index("stop"))
    arrays = dict(tokens=np.where(MASK, 7, 3), mask=MASK, logprobs=LOGPROBS, lengths=STOPS[:, 0], group=GROUP)
    return Rollout(**arrays, weight_versions=np.where(MASK, 0, -1), finish_reasons=reasons, **changes)


def trainer(algorithm: str, kl: float = 0.0, **how) -> Trainer:
    objective = dataclasses.replace(ALGORITHMS[algorithm], kl_coefficient=kl)
    return Trainer(TINY[0], optax.sgd(1.0), TrainerConfig(objective, SamplingParams(max_tokens=T), **how))


def batch_of(made: Trainer, rewards, drawn: Rollout | None = None, **how):
    return made.batch(made.start(TINY[1], jax.random.key(0)), drawn or rollout(), rewards, **how)


# -- one a token -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "rloo"])
def test_a_groups_advantages_are_of_the_sums(algorithm):
    by_token = batch_of(trainer(algorithm), TOKEN_REWARDS)
    expected = [np.float32(sum(np.float64(x) for x in row)) for row in TOKEN_REWARDS]
    assert (bits(sums(TOKEN_REWARDS)) == bits(expected)).all()
    by_sample = batch_of(trainer(algorithm), np.array(expected))
    assert (bits(by_token.advantages) == bits(by_sample.advantages)).all() and by_sample.advantages.any()


def test_padding_moves_no_bit_of_a_sum():
    rewards = RNG.normal(size=(64, 37)).astype(np.float32)
    for padding in (1, 8, 91):
        assert (bits(sums(np.pad(rewards, ((0, 0), (0, padding))))) == bits(sums(rewards))).all()


def with_values(made: Trainer) -> np.ndarray:
    """The values that the trainer's critic is made to have."""
    values = np.where(MASK, np.sin(np.arange(B * T)).reshape(B, T), 0).astype(np.float32)
    made._forward = lambda master, batch: Forward(LOGPROBS, values, None)
    return values


@pytest.mark.parametrize("rewards", [REWARDS, TOKEN_REWARDS], ids=["a sample", "a token"])
def test_with_a_critic_they_go_to_their_tokens(rewards):
    made = trainer("ppo")
    values = with_values(made)
    batch = batch_of(made, rewards)
    of_tokens = at_last_token(rewards, MASK) if rewards.ndim == 1 else rewards
    advantages, returns = generalized(of_tokens, values, MASK, decay=made.config.decay)
    assert (bits(batch.returns) == bits(returns)).all() and np.asarray(returns).any()
    assert (bits(batch.advantages) == bits(standardized(advantages, MASK))).all()


def test_a_penalty_is_taken_from_both(monkeypatch):
    near = LOGPROBS + np.where(MASK, 0.25, 0).astype(np.float32)
    monkeypatch.setattr(Trainer, "_reference", lambda self, params, batch: near)
    batch = batch_of(trainer("rloo", kl=0.5), TOKEN_REWARDS)
    rewards = TOKEN_REWARDS - 0.5 * kl_penalty(LOGPROBS, near, MASK, "k1")
    expected = np.where(MASK, np.asarray(of_samples(rewards.sum(-1), GROUP, "leave-one-out"))[:, None], 0)
    np.testing.assert_allclose(batch.advantages, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_sample_with_one_that_is_not_finite_is_left_out(bad):
    rewards = TOKEN_REWARDS.copy()
    rewards[5, np.flatnonzero(MASK[5])[1]] = bad
    rewards[3] = np.nan  # a whole row says the same
    batch = batch_of(trainer("grpo"), rewards)
    assert (np.asarray(batch.mask).any(-1) == ~np.isin(np.arange(B), [3, 5])).all()
    alone = of_samples(sums(TOKEN_REWARDS), np.where(np.isin(np.arange(B), [3, 5]), -1, GROUP), "scaled")
    expected = np.where(MASK, np.asarray(alone)[:, None], 0)
    assert (bits(batch.advantages) == bits(expected)).all()


@pytest.mark.parametrize("shape", [(B - 1,), (B, T + 1), (B, 1), (T,), (), (B, T, 1)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=rf"rewards must be \[{B}\], .*\[{B}, {T}\], one a token, got \[.*\]"):
        batch_of(trainer("grpo"), np.ones(shape, np.float32))


@pytest.mark.parametrize("position", [0, 5, T - 1], ids=["prompt", "tool", "padding"])
def test_a_reward_outside_the_mask_is_refused(position):
    rewards = TOKEN_REWARDS.copy()
    rewards[2, position] = -0.5
    with pytest.raises(ValueError, match=rf"rewards\[2, {position}\] is -0.5, .*outside the rollout's mask"):
        batch_of(trainer("grpo"), rewards)


# -- samples that were cut off -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "rloo", "dapo"])
def test_what_was_cut_off_is_in_its_groups_baseline_and_has_no_loss(algorithm):
    whole, masked = (batch_of(trainer(algorithm, mask_truncated=on), REWARDS) for on in (False, True))
    kept = np.asarray(~CUT_OFF)
    assert (np.asarray(whole.mask) == MASK).all() and (np.asarray(masked.mask) == MASK & kept[:, None]).all()
    assert (bits(masked.advantages)[kept] == bits(whole.advantages)[kept]).all()
    assert not np.asarray(masked.advantages)[CUT_OFF].any() and np.asarray(whole.advantages)[CUT_OFF].any()
    weights = np.asarray(token_weights(masked.mask, trainer(algorithm).config.objective))
    alone = np.asarray(token_weights(MASK[kept], trainer(algorithm).config.objective))
    assert (bits(weights[kept]) == bits(alone)).all() and not weights[CUT_OFF].any()


def test_a_critic_learns_nothing_from_what_was_cut_off():
    made = trainer("ppo", mask_truncated=True)
    values = with_values(made)
    batch = batch_of(made, TOKEN_REWARDS)
    kept = MASK & ~CUT_OFF[:, None]
    advantages, returns = generalized(TOKEN_REWARDS, values, kept, decay=made.config.decay)
    assert (bits(batch.returns) == bits(returns)).all() and (np.asarray(batch.mask) == kept).all()
    assert (bits(batch.advantages) == bits(standardized(advantages, kept))).all()


def test_a_penalty_in_the_reward_is_in_the_baseline_too(monkeypatch):
    def reference(self, params, batch):
        return LOGPROBS + np.where(batch.mask, 0.25, 0).astype(np.float32)  # score says nothing outside its mask

    monkeypatch.setattr(Trainer, "_reference", reference)
    whole, masked = (batch_of(trainer("rloo", kl=0.5, mask_truncated=on), REWARDS) for on in (False, True))
    assert (bits(masked.advantages)[~CUT_OFF] == bits(whole.advantages)[~CUT_OFF]).all()


def test_without_finish_reasons_nothing_can_be_masked():
    drawn = dataclasses.replace(rollout(), finish_reasons=None)
    with pytest.raises(ValueError, match="has no finish_reasons"):
        batch_of(trainer("grpo", mask_truncated=True), REWARDS, drawn)
    batch_of(trainer("grpo"), REWARDS, drawn)
