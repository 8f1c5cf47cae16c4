"""The trainer and the loop on a tiny model: on-policy to the bit, whatever the micro-batch, and resumed to the same bits."""
import dataclasses

import jax
import numpy as np
import optax
import pytest
from conftest import random_model
from test_advantages import bits

import jaxengine
from checkpoints import snapshots
from jaxengine import Rollout, SamplingParams
from jaxengine.rl import critic
from jaxengine.rl.loop import Loop, judged_by
from jaxengine.rl.losses import ALGORITHMS
from jaxengine.rl.trainer import Trainer, TrainerConfig

SAMPLING = SamplingParams(n=4, max_tokens=12, temperature=0.9, top_k=200, stop_token_ids=[*range(10)], entropy=True)
ENGINE = dict(max_model_len=64, max_num_seqs=16, num_pages=80)
WIDTH = 20
RATE = 1e-4
TINY = random_model(vocab_size=250, num_hidden_layers=2, dtype="bfloat16")
ON_POLICY = {"ratio_mean": 1.0, "ratio_max": 1.0, "clip_rate": 0.0, "kl": 0.0, "max_delta": 0.0}


def problems(i: int) -> list[tuple[list[int], int]]:
    rng = np.random.RandomState(i)
    return [(rng.randint(10, 250, size).tolist(), 0) for size in (1, 3, 6, 8)]



def even_share(outputs, answers) -> np.ndarray:
    return np.array([np.mean([t % 2 == 0 for t in s.token_ids]) for o in outputs for s in o.outputs], np.float32)


def make(algorithm: str = "grpo", model=TINY, **how) -> tuple[Loop, object]:
    config, params = model
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE))
    trainer = Trainer(config, optimizer, TrainerConfig(ALGORITHMS[algorithm], SAMPLING, **how))
    return Loop(trainer, problems, even_share, WIDTH, engine=ENGINE), trainer.start(params, jax.random.key(7))


def on_policy(update: dict[str, float]) -> dict[str, float]:
    return {name: update[name] for name in ON_POLICY}


def gradient_of(trainer: Trainer, state, batch):
    return jax.jit(lambda state, batch: trainer.gradient(critic.cast(state.master, trainer.model), batch))(state, batch)


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
    """Two iterations of two epochs in two mini-batches, with a snapshot between; what is compared is copied, since states are donated."""
    folder = tmp_path_factory.mktemp("run")
    loop, state = make(epochs=2, mini_batches=2, micro_batches=2)
    begin = jax.device_get(state)
    state, first = loop.iterate(state)
    snapshots.save(folder, 1, state)
    state, second = loop.iterate(state)
    return loop, folder, begin, jax.device_get(state), (first, second)


def test_the_first_update_of_every_iteration_is_on_policy(ran):
    """Exactly, by the second iteration too, whose weights are rounded from what bfloat16 cannot hold; later updates move."""
    *_, iterations = ran
    for iteration in iterations:
        assert len(iteration.updates) == 4 and on_policy(iteration.updates[0]) == ON_POLICY
        for update in iteration.updates[1:]:
            assert update["max_delta"] > 0 and update["kl"] > 0 and update["ratio_max"] != 1.0
    assert [x.version for x in iterations] == [0, 1]


def test_the_float32_copy_holds_what_bfloat16_does_not(ran):
    _, _, begin, end, _ = ran
    rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype(np.float32), end.master.policy)
    assert same(begin.master.policy, jax.tree.map(lambda x: x.astype("bfloat16").astype(np.float32), begin.master.policy))
    assert not same(rounded, end.master.policy) and int(end.step) == 8 and int(end.version) == 2


def test_a_run_that_stopped_goes_on_to_the_same_bits(ran):
    """Weights, moments, counters, key, metrics: from the snapshot, by a new loop that has seen nothing."""
    _, folder, _, expected, (_, second) = ran
    loop, fresh = make(epochs=2, mini_batches=2, micro_batches=2)
    state, again = loop.iterate(snapshots.restore(folder, fresh))
    assert same(jax.device_get(state), expected)
    assert again.updates == second.updates and again.reward == second.reward


def test_nothing_is_compiled_after_the_first_update(ran):
    loop, *_ = ran
    assert loop.trainer.update._cache_size() == loop.trainer.policy._cache_size() == 1


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_micro_batches_change_no_logprob(drawn, algorithm):
    """C11: inside the update's gradient the logprobs are the engine's bits, with a critic too. Gradients are close, not equal: each
    micro-batch's is rounded to the weights' 8 bits before it is added."""
    rewards, gradients = np.linspace(0, 1, drawn.tokens.shape[0], dtype=np.float32), []
    for micro_batches in (1, 2, 8):
        loop, state = make(algorithm, micro_batches=micro_batches)
        trainer = loop.trainer
        batch = trainer.batch(state, drawn, rewards)
        gradient, _, (logprobs, values) = gradient_of(trainer, state, batch)
        assert (bits(logprobs) == bits(drawn.logprobs)).all()
        if algorithm == "ppo":
            assert (bits(values) == bits(batch.old_values)).all()
        gradients.append(gradient)
    for other in gradients[1:]:
        for a, b in zip(jax.tree.leaves(gradients[0]), jax.tree.leaves(other), strict=True):
            assert np.linalg.norm(a - b) <= 2**-6 * np.linalg.norm(a)
    assert np.linalg.norm(np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradients[0])])) > 0


def test_ppo_moves_critic_and_trunk(drawn):
    """The critic learns, on-policy at first; once it does not say 0 everywhere, its loss reaches the trunk."""
    loop, state = make("ppo", epochs=2)
    rewards = np.linspace(0, 1, drawn.tokens.shape[0], dtype=np.float32)
    state, updates = loop.trainer.train(state, drawn, rewards)
    assert on_policy(updates[0]) == ON_POLICY and updates[1]["value_loss"] < updates[0]["value_loss"]
    assert np.abs(state.master.critic.weight).max() > 0
    batch = loop.trainer.batch(state, drawn, rewards)
    still = dataclasses.replace(batch, advantages=0 * batch.advantages)
    gradient, losses, _ = gradient_of(loop.trainer, state, still)
    assert float(losses["loss"]) == 0.0 and np.abs(gradient.policy.layers[0].mlp.down).max() > 0


def test_an_update_raises_what_was_rewarded(drawn):
    loop, state = make("rloo")
    config = loop.trainer.model
    rewards = (drawn.tokens[np.arange(16), drawn.lengths - 1] % 2 == 0).astype(np.float32)
    batch = loop.trainer.batch(state, drawn, rewards)
    state, _ = loop.trainer.train(state, drawn, rewards)
    after = jaxengine.score(loop.trainer.policy(state), drawn.tokens, drawn.mask, SAMPLING.replace(n=1), config=config)
    gain = np.asarray(batch.advantages) * (np.asarray(after) - drawn.logprobs)
    assert gain[drawn.mask].sum() > 0


def test_the_policy_outlives_the_state(drawn):
    """In float32 too, where nothing is rounded: the engine's weights are a copy, and an update that takes the state leaves them."""
    loop, state = make(model=random_model(vocab_size=250, num_hidden_layers=1))
    policy = loop.trainer.policy(state)
    loop.trainer.train(state, drawn, np.ones(16, np.float32))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(policy))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.master))


def test_a_sample_without_a_reward_is_left_out(drawn):
    loop, state = make()
    rewards = np.linspace(0, 1, 16, dtype=np.float32)
    rewards[5] = np.nan
    batch = loop.trainer.batch(state, drawn, rewards)
    assert not batch.mask[5].any() and np.isfinite(batch.advantages).all() and (np.asarray(batch.advantages[5]) == 0).all()
    assert batch.mask[4].any()


@pytest.mark.parametrize("change, error", [
    (dict(rewards=np.ones(3)), r"rewards must be \[16\], one a sample, got \[3\]"),
    (dict(mini_batches=3), r"16 samples are no multiple of mini_batches · micro_batches = 3 · 1"),
    (dict(objective=dataclasses.replace(ALGORITHMS["grpo"], kl_coefficient=0.1)), "give reference, the weights of the policy to stay near"),
])
def test_what_cannot_be_learned_from(drawn, change, error):
    rewards = change.pop("rewards", np.ones(16, np.float32))
    config, params = TINY
    trainer = Trainer(config, optax.sgd(1.0), TrainerConfig(sampling=SAMPLING, **change))
    with pytest.raises(ValueError, match=error):
        trainer.train(trainer.start(params, jax.random.key(0)), drawn, rewards)


def test_a_reference_holds_back(drawn):
    """At the reference itself the penalty is exactly 0, and its gradient k3's, 0 as well; away from it it is not."""
    config, params = TINY
    objective = dataclasses.replace(ALGORITHMS["grpo"], kl_coefficient=1.0)
    trainer = Trainer(config, optax.sgd(0.3), TrainerConfig(objective, SAMPLING, epochs=2))
    plain = Trainer(config, optax.sgd(0.3), TrainerConfig(ALGORITHMS["grpo"], SAMPLING, epochs=2))
    rewards = np.linspace(0, 1, 16, dtype=np.float32)
    _, held = trainer.train(trainer.start(params, jax.random.key(0)), drawn, rewards, reference=params)
    _, free = plain.train(plain.start(params, jax.random.key(0)), drawn, rewards)
    assert held[0]["loss"] == free[0]["loss"] and held[1]["loss"] > free[1]["loss"]


def test_a_judge_calls_the_reward_for_each_sample():
    output = lambda text, reason: dataclasses.make_dataclass("Sample", ["text", "finish_reason"])(text, reason)
    request = dataclasses.make_dataclass("Request", ["prompt", "outputs"])
    outputs = [request("1+1=", [output("2", "stop"), output("3", "stop")]), request("2*2=", [output("4", "error")])]
    found = judged_by(lambda prompt, text, answer: float(text == answer) + (prompt == "1+1="))(outputs, ["2", "4"])
    np.testing.assert_array_equal(found, [2, 1, np.nan])
