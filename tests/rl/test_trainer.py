"""The trainer and the loop on a tiny model: exactly on-policy with any micro-batch, and resumed to the same bits."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from conftest import random_model
from test_advantages import bits

import jaxengine
from checkpoints import snapshots
from jaxengine import Rollout, SamplingParams
from jaxengine.outputs import CompletionOutput, RequestOutput
from jaxengine.rl import critic
from jaxengine.rl.loops.loop import Loop, judged_by
from jaxengine.rl.losses import policy_loss, token_shares, token_weights
from jaxengine.rl.metrics import of_rewards
from jaxengine.rl.objective import ALGORITHMS
from jaxengine.rl.train_state import TrainerConfig
from jaxengine.rl.trainer import Trainer

SAMPLING = SamplingParams(n=4, max_tokens=12, temperature=0.9, top_k=200, stop_token_ids=[*range(10)], entropy=True)
ENGINE = dict(max_model_len=64, max_num_seqs=16, num_pages=80)
WIDTH = 20
RATE = 1e-4
TINY = random_model(vocab_size=250, num_hidden_layers=1, dtype="bfloat16")
ON_POLICY = {"ratio_mean": 1.0, "ratio_max": 1.0, "clip_rate": 0.0, "kl": 0.0, "max_delta": 0.0}


def problems(i: int) -> list[tuple[list[int], int]]:
    rng = np.random.RandomState(i)
    return [(rng.randint(10, 250, size).tolist(), 0) for size in (1, 3, 6, 8)]


def even_share(outputs, answers) -> np.ndarray:
    return np.array([np.mean([t % 2 == 0 for t in s.token_ids]) for o in outputs for s in o.outputs], np.float32)


@functools.cache
def make(algorithm: str = "grpo", kl: float = 0.0, **how) -> Trainer:
    """One trainer for all tests, compiled once: it keeps nothing of a state."""
    objective = dataclasses.replace(ALGORITHMS[algorithm], kl_coefficient=kl)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE))
    return Trainer(TINY[0], optimizer, TrainerConfig(objective, SAMPLING, **how))


def start(trainer: Trainer):
    return trainer.start(TINY[1], jax.random.key(7))


def on_policy(update: dict[str, float]) -> dict[str, float]:
    return {name: update[name] for name in ON_POLICY}


@functools.cache
def _gradient(trainer: Trainer):
    def gradient(state, batch):
        weights = token_weights(batch.mask, trainer.config.objective), token_shares(batch.mask)
        return trainer.gradient(critic.cast(state.master, trainer.model_config), batch, weights)

    return jax.jit(gradient)


def gradient_of(trainer: Trainer, state, batch):
    return _gradient(trainer)(state, batch)


def rounded(policy):
    """The policy's arrays, rounded to bfloat16."""
    return jax.tree.map(lambda x: x.astype("bfloat16").astype(np.float32), policy)


def moved(policy):
    """Other weights, near these."""
    return jax.tree.map(lambda x: x + (0.01 * np.sin(np.arange(x.size)).reshape(x.shape)).astype(x.dtype), policy)


def same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@pytest.fixture(scope="module")
def drawn() -> Rollout:
    config, params = TINY
    prompts = [prompt for prompt, _ in problems(0)]
    outputs = jaxengine.generate(params, prompts, SAMPLING, key=jax.random.key(3), config=config, **ENGINE)
    return Rollout.from_outputs(outputs, length=WIDTH)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Two iterations of two epochs in two mini-batches, with a snapshot between. States are copied, being donated."""
    folder = tmp_path_factory.mktemp("run")
    loop = Loop(make(epochs=2, mini_batches=2, micro_batches=2), problems, even_share, WIDTH, engine=ENGINE)
    state = start(loop.trainer)
    begin = jax.device_get(state)
    state, first = loop.iterate(state)
    snapshots.save(folder, 1, state)
    state, second = loop.iterate(state)
    return loop, folder, begin, jax.device_get(state), (first, second)


def test_the_first_update_of_every_iteration_is_on_policy(ran):
    """Exactly, also in the second iteration, whose float32 weights are no bfloat16 numbers. Later ones are not."""
    *_, iterations = ran
    for iteration in iterations:
        assert len(iteration.updates) == 4 and on_policy(iteration.updates[0]) == ON_POLICY
        for update in iteration.updates[1:]:
            assert update["max_delta"] > 0 and update["kl"] > 0 and update["ratio_max"] != 1.0
    assert [x.version for x in iterations] == [0, 1]
    assert all(update["staleness"] == 0 for iteration in iterations for update in iteration.updates)


def test_the_float32_copy_holds_what_bfloat16_does_not(ran):
    _, _, begin, end, _ = ran
    assert same(rounded(begin.master.policy), begin.master.policy)
    assert not same(rounded(end.master.policy), end.master.policy) and int(end.step) == 8 and int(end.version) == 2


def test_a_run_that_stopped_goes_on_to_the_same_bits(ran):
    """Weights, moments, counters, key, metrics. In other processes: test_learn_calc.py."""
    loop, folder, _, expected, (_, second) = ran
    state, again = loop.iterate(snapshots.restore(folder, start(loop.trainer)))
    assert same(jax.device_get(state), expected)
    assert again.updates == second.updates and again.reward == second.reward


def test_nothing_is_compiled_after_the_first_update(ran):
    loop, *_ = ran
    assert loop.trainer.update._cache_size() == loop.trainer.policy._cache_size() == 1


REWARDS = np.linspace(0, 1, 16, dtype=np.float32)  # of four groups of four: no advantage is 0


@pytest.mark.slow
def test_micro_batches_change_no_logprob(drawn):
    """Inside the update's gradient the logprobs are the engine's bits. Gradients are close and not equal, because the
    gradient of each micro-batch is rounded to the weights' 8 bits before it is added.
    """
    gradients = []
    for micro_batches in (1, 4):
        trainer = make(micro_batches=micro_batches)
        state = start(trainer)
        gradient, _, (logprobs, _) = gradient_of(trainer, state, trainer.batch(state, drawn, REWARDS))
        assert (bits(logprobs) == bits(drawn.logprobs)).all()
        gradients.append(gradient)
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert 0 < np.linalg.norm(a - b) <= 2**-7 * np.linalg.norm(a)


def test_a_critic_changes_no_logprob(drawn):
    """With a critic, the logprobs have the engine's bits too, and values are the same in the gradient and outside it.
    A critic that is not 0 changes the trunk through its loss alone.
    """
    trainer = make("ppo", micro_batches=2)
    state = start(trainer)
    not_zero = critic.Critic(np.linspace(-1, 1, 96, dtype=np.float32), np.float32(0.1))
    state = dataclasses.replace(state, master=dataclasses.replace(state.master, critic=not_zero))
    batch = trainer.batch(state, drawn, REWARDS)
    batch = dataclasses.replace(batch, advantages=0 * batch.advantages)
    gradient, losses, (logprobs, values) = gradient_of(trainer, state, batch)
    assert (bits(logprobs) == bits(drawn.logprobs)).all()
    assert (bits(values) == bits(batch.old_values)).all() and len(np.unique(values[drawn.mask])) > 50
    assert float(losses["loss"]) == 0.0 and np.abs(gradient.policy.layers[0].mlp.down).max() > 0


@pytest.mark.slow
def test_ppo_moves_the_critic(drawn):
    trainer = make("ppo", epochs=2)
    state, updates = trainer.train(start(trainer), drawn, REWARDS)
    assert on_policy(updates[0]) == ON_POLICY and updates[1]["value_loss"] < updates[0]["value_loss"]
    assert np.abs(state.master.critic.weight).max() > 0


@pytest.mark.long
def test_an_update_raises_what_was_rewarded(drawn):
    trainer = make("rloo")
    state = start(trainer)
    batch = trainer.batch(state, drawn, REWARDS)
    state, _ = trainer.train(state, drawn, REWARDS)
    after = jaxengine.score(
        trainer.policy(state), drawn.tokens, drawn.mask, SAMPLING.replace(n=1), config=trainer.model_config
    )
    gain = np.asarray(batch.advantages) * (np.asarray(after) - drawn.logprobs)
    assert gain[drawn.mask].sum() > 0


@pytest.mark.long
def test_samples_without_an_advantage_are_skipped(drawn):
    """Groups that are all right or all wrong are skipped; the loss and the gradient are those of the whole batch."""
    trainer, rewards = make(), REWARDS.copy()
    rewards[:4], rewards[8:12] = 1.0, 0.0
    batch = trainer.batch(start(trainer), drawn, rewards)
    gradient, losses, _ = gradient_of(trainer, start(trainer), batch)
    _, metrics = trainer.update(start(trainer), batch)
    assert float(metrics["loss"]) == pytest.approx(float(losses["loss"]), abs=1e-7)
    assert float(metrics["gradient_norm"]) == pytest.approx(float(optax.global_norm(gradient)), rel=2**-7)


def test_the_policy_outlives_the_state():
    """In float32 too, where nothing is rounded: the engine's weights are a copy, and outlive a donated state."""
    config, params = random_model(vocab_size=250, num_hidden_layers=1)
    trainer = Trainer(config, optax.sgd(1.0))
    state = trainer.start(params, jax.random.key(0))
    policy = trainer.policy(state)
    for array in jax.tree.leaves(state):
        array.delete()
    assert same(policy, params)


def test_a_sample_without_a_reward_is_left_out(drawn):
    trainer, rewards = make(), REWARDS.copy()
    rewards[5] = np.nan
    batch = trainer.batch(start(trainer), drawn, rewards)
    assert not batch.mask[5].any() and batch.mask[4].any()
    assert np.isfinite(batch.advantages).all() and (np.asarray(batch.advantages[5]) == 0).all()


@pytest.mark.parametrize(
    "change, error",
    [
        (dict(rewards=np.ones(3)), r"rewards must be \[16\], one a sample, or \[16, 20\], one a token, got \[3\]"),
        (dict(mini_batches=3), r"16 samples are no multiple of mini_batches · micro_batches = 3 · 1"),
        (
            dict(objective=dataclasses.replace(ALGORITHMS["grpo"], kl_coefficient=0.1)),
            "give reference, the weights of the policy to stay near",
        ),
    ],
)
def test_rollouts_that_do_not_fit_are_refused(drawn, change, error):
    rewards = change.pop("rewards", np.ones(16, np.float32))
    config, params = TINY
    trainer = Trainer(config, optax.sgd(1.0), TrainerConfig(sampling=SAMPLING, **change))
    with pytest.raises(ValueError, match=error):
        trainer.train(trainer.start(params, jax.random.key(0)), drawn, rewards)


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "rloo"])
def test_groups_of_one_are_refused(drawn, algorithm):
    trainer = make(algorithm)
    alone = dataclasses.replace(drawn, group=np.arange(16))
    with pytest.raises(ValueError, match=r"16 samples is a group of its own.*n=….*groups=…"):
        trainer.batch(start(trainer), alone, REWARDS)
    pair = dataclasses.replace(drawn, group=np.array([0, 0, *range(1, 15)]))
    assert (
        np.asarray(trainer.batch(start(trainer), pair, REWARDS).advantages).any(1).tolist() == [True] * 2 + [False] * 14
    )


@pytest.mark.long
def test_a_reference_holds_back(drawn):
    """At the reference the penalty is exactly 0; under weights that have moved away from it, it is positive."""
    trainer = make(kl=1.0)
    batch = trainer.batch(start(trainer), drawn, REWARDS, reference=TINY[1])
    assert (bits(batch.reference) == bits(drawn.logprobs)).all()
    state, here = trainer.update(start(trainer), batch)
    policy = trainer.policy(state)
    _, moved = trainer.update(state, batch)

    def without(logprobs):
        """The loss without a penalty."""
        return float(policy_loss(logprobs, drawn.logprobs, drawn.mask, batch.advantages, ALGORITHMS["grpo"]))

    assert float(here["loss"]) == pytest.approx(without(drawn.logprobs), abs=1e-6)
    after = jaxengine.score(policy, drawn.tokens, drawn.mask, SAMPLING.replace(n=1), config=trainer.model_config)
    assert float(moved["loss"]) > without(np.asarray(after)) + 1e-6


def test_a_penalty_may_be_a_part_of_the_reward(drawn):
    """RLOO's: each completion's k1, summed, is taken from its reward before the baseline."""
    trainer, reference = make("rloo", kl=0.3), moved(TINY[1])
    batch = trainer.batch(start(trainer), drawn, REWARDS, reference=reference)
    far = np.asarray(
        jaxengine.score(reference, drawn.tokens, drawn.mask, SAMPLING.replace(n=1), config=trainer.model_config)
    )
    seen = drawn.mask & np.isfinite(far)  # what the reference cuts off has no useful KL
    rewards = REWARDS - 0.3 * np.where(seen, drawn.logprobs - far, 0).sum(-1)
    others = [np.mean([rewards[j] for j in range(i - i % 4, i - i % 4 + 4) if j != i]) for i in range(16)]
    expected = np.where(drawn.mask, (rewards - others)[:, None], 0)
    np.testing.assert_allclose(batch.advantages, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm, kl", [("grpo", 0.0), ("rloo", 0.3)], ids=["without a penalty", "in the reward"])
def test_the_distance_to_a_reference_is_measured(drawn, algorithm, kl):
    """Wherever the penalty is; from the weights that learn, and 0 where these are the reference."""
    trainer, reference = make(algorithm, kl=kl), moved(TINY[1])
    near = jaxengine.score(reference, drawn.tokens, drawn.mask, SAMPLING.replace(n=1), config=TINY[0])
    log_r = (np.asarray(near) - drawn.logprobs)[drawn.mask]
    log_r = np.where(np.isfinite(log_r), log_r, 0)  # what the reference cuts off has no useful KL
    _, (update,) = trainer.train(start(trainer), drawn, REWARDS, reference=reference)
    assert update["kl_reference"] == pytest.approx((np.exp(log_r) - 1 - log_r).mean(), rel=1e-4) and update["kl"] == 0
    _, (update,) = trainer.train(start(trainer), drawn, REWARDS, reference=TINY[1])
    assert update["kl_reference"] == 0


def test_without_a_reference_there_is_no_distance_to_it(drawn):
    _, (update,) = make().train(start(make()), drawn, REWARDS)
    assert "kl_reference" not in update and update["staleness"] == 0


def test_staleness_is_the_mean_over_tokens_of_versions(drawn):
    """Of the sampled ones alone, in the versions of the state that learns."""
    drew = np.where(drawn.mask, 2, -1)
    drew[:4] = np.where(drawn.mask[:4], 4, -1)
    state = dataclasses.replace(start(make()), version=np.int32(5))
    _, (update,) = make().train(state, dataclasses.replace(drawn, weight_versions=drew), REWARDS)
    newer = drawn.mask[:4].sum() / drawn.mask.sum()
    assert update["staleness"] == pytest.approx(1 * newer + 3 * (1 - newer)) and 0 < newer < 1


def test_what_earlier_weights_drew_is_corrected(drawn):
    """ρ begins at the weights that learn, and the way from those that drew is a weight; where they are the same, 1."""
    objective = dataclasses.replace(ALGORITHMS["grpo"], correction="truncated", correction_high=1.5)
    trainer = Trainer(TINY[0], optax.sgd(1.0), TrainerConfig(objective, SAMPLING))
    batch = trainer.batch(start(trainer), drawn, REWARDS)
    assert (bits(batch.old_logprobs) == bits(drawn.logprobs)).all() and (
        bits(batch.corrections) == bits(np.ones(1))
    ).all()
    others = moved(TINY[1])
    batch = trainer.batch(trainer.start(others, jax.random.key(0)), drawn, REWARDS)
    now = np.asarray(jaxengine.score(others, drawn.tokens, drawn.mask, SAMPLING.replace(n=1), config=TINY[0]))
    assert (bits(batch.old_logprobs) == bits(now)).all()
    expected = np.minimum(np.exp(np.where(drawn.mask, now - drawn.logprobs, 0)), 1.5)
    np.testing.assert_allclose(batch.corrections, expected, rtol=1e-5)
    assert (np.asarray(batch.corrections) == 1.5).any() and (np.asarray(batch.corrections) < 1).any()


@pytest.mark.slow
def test_the_entropy_is_that_of_the_draw_and_has_a_gradient(drawn):
    objective = dataclasses.replace(ALGORITHMS["dr_grpo"], entropy_coefficient=0.5)
    config, sampling = TINY[0], SAMPLING.replace(n=1)
    trainer = Trainer(config, optax.sgd(1.0), TrainerConfig(objective, SAMPLING, micro_batches=2))
    equal = np.ones(16, np.float32)  # no advantage at all, so that the entropy alone has a gradient
    gradient, losses, _ = gradient_of(trainer, start(trainer), trainer.batch(start(trainer), drawn, equal))
    assert float(losses["entropy"]) == pytest.approx(drawn.entropies[drawn.mask].mean(), rel=1e-5)

    def bonus(params):
        _, entropies = jaxengine.score(params, drawn.tokens, drawn.mask, sampling, config=config, entropy=True)
        return -0.5 * entropies.sum() / drawn.mask.sum()

    expected = jax.grad(bonus)(TINY[1])
    for a, b in zip(jax.tree.leaves(gradient.policy), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.linalg.norm(a - b) <= 2**-6 * np.linalg.norm(b) and b.any()


def test_a_judge_calls_the_reward_for_each_sample():
    def reward(prompt, text, answer):
        return float(text == answer) + (prompt == "1+1=")

    def sample(text, finish_reason):
        return CompletionOutput(0, text, [1], np.zeros(1, np.float32), finish_reason, None, [])

    outputs = [
        RequestOutput("a", "1+1=", [1], [sample("2", "stop"), sample("3", "stop")], True),
        RequestOutput("b", "2*2=", [1], [sample("4", "error")], True),
    ]
    with pytest.warns(UserWarning, match="1 of 3 samples have no reward; the first, row 2: the engine ended"):
        np.testing.assert_array_equal(judged_by(reward)(outputs, ["2", "4"]).values, [2, 1, np.nan])


def test_a_reward_that_raises_fails_its_sample_alone():
    def reward(prompt, text, answer):
        return 1 / int(text)

    samples = [
        CompletionOutput(i, text, [1], np.zeros(1, np.float32), "stop", None, []) for i, text in enumerate("204")
    ]
    outputs = [RequestOutput("a", "1+1=", [1], samples, True)]
    with pytest.warns(UserWarning, match="1 of 3 samples have no reward; the first, row 1: .*ZeroDivisionError"):
        np.testing.assert_array_equal(judged_by(reward)(outputs, ["2"]).values, [0.5, np.nan, 0.25])
    with pytest.warns(UserWarning, match="row 1"):
        np.testing.assert_array_equal(judged_by(reward, failed=-1.0)(outputs, ["2"]).values, [0.5, -1, 0.25])


def test_rewards_are_counted_as_the_trainer_counts_them():
    rewards = np.array([1, 0, 0.5, 0.5, np.inf, 0.5, np.nan, np.nan], np.float32)
    found = of_rewards(rewards, np.array([0, 0, 1, 1, 1, 2, 3, 3]))
    assert found.left_out == 3 / 8 and found.no_spread == pytest.approx(2 / 3) and found.mean == 0.5
    assert found.deviation == pytest.approx(np.std([1, 0, 0.5, 0.5, 0.5]))
    nothing = of_rewards(rewards[-2:], np.zeros(2, int))
    assert nothing.left_out == 1 and np.isnan(nothing.mean) and nothing.no_spread == 0
