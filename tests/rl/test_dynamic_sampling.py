"""Dynamic sampling: which groups a batch has, what is said of the others, and that a run goes on to its bits."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from test_trainer import ENGINE, TINY, WIDTH, make, problems, same

from checkpoints import snapshots
from jaxengine import SamplingParams
from jaxengine.base.keys import folded
from jaxengine.outputs import CompletionOutput, RequestOutput, VersionSpan
from jaxengine.rl.loops import loop as loops
from jaxengine.rl.loops.loop import Loop
from jaxengine.rl.objective import ALGORITHMS
from jaxengine.rl.train_state import TrainerConfig


class Learning:
    """A trainer that keeps what it is given and learns nothing."""

    def __init__(self, algorithm: str = "grpo", n: int = 2) -> None:
        self.config = TrainerConfig(ALGORITHMS[algorithm], SamplingParams(n=n, max_tokens=9))

    def train(self, state, rollout, rewards, *, reference):
        self.rollout, self.rewards = rollout, rewards
        return state, []


class Written(Loop):
    """Its samples are what the prompts say, tokens each, and `drawn` is (round, prompts) of each call."""

    def generate(self, state, prompts, number=0):
        vars(self).setdefault("drawn", []).append((number, list(prompts)))

        def sample(tokens):
            spans, logprobs = [VersionSpan(0, 0, len(tokens))], np.zeros(len(tokens), np.float32)
            return CompletionOutput(0, "", list(tokens), logprobs, "stop", None, spans)

        return [RequestOutput("", None, [1], [sample(x) for x in prompt], True) for prompt in prompts]


def first_token(outputs, answers):
    """The reward of a sample is its first token."""
    return np.array([x.token_ids[0] for output in outputs for x in output.outputs], np.float32)


def group(*rewards: int, length: int = 1) -> tuple[list[list[int]], None]:
    return [[reward] * length for reward in rewards], None


SAME, ZERO = group(7, 7), group(0, 0)
FIRST = [group(1, 2), SAME, group(3, 4), ZERO, SAME]
FURTHER = {1: [ZERO, group(5, 6), ZERO, group(0, 9)], 2: [group(8, 9, length=3), group(2, 9), SAME], 3: [group(9, 8)]}


def written(refill: int, judge=first_token, **changes) -> Written:
    how = dict(refill=refill, further=lambda i, r: FURTHER[r]) | changes
    return Written(Learning(), lambda i: FIRST, judge, 6, **how)


def run(loop: Written):
    _, iteration = loop.iterate(types.SimpleNamespace(version=4))
    return iteration, loop.trainer.rewards.reshape(5, -1).tolist()


def test_groups_without_spread_are_replaced_until_the_batch_is_full():
    """Round 1 is asked for three and finds one, round 2 is asked for two and finds both; the rest keep their places."""
    loop = written(3)
    iteration, rewards = run(loop)
    assert rewards == [[1, 2], [5, 6], [3, 4], [8, 9], [2, 9]]
    numbers, prompts = zip(*loop.drawn, strict=True)
    assert numbers == (0, 1, 2) and [len(x) for x in prompts] == [5, 3, 2]
    assert prompts[1] == [prompt for prompt, _ in FURTHER[1][:3]]
    assert iteration.rounds == 2 and iteration.thrown_away == 5 and iteration.no_spread == 0
    rollout = loop.trainer.rollout
    assert rollout.tokens[:, 1].tolist() == [1, 2, 5, 6, 3, 4, 8, 9, 2, 9] and rollout.mask[6].sum() == 3
    assert rollout.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] and rollout.tokens.shape == (10, 6)


def test_what_is_told_is_of_everything_that_was_drawn():
    iteration, _ = run(written(3))
    drawn = [x for pairs in (FIRST, FURTHER[1][:3], FURTHER[2][:2]) for prompt, _ in pairs for x in prompt]
    assert iteration.tokens == sum(map(len, drawn)) == 24 and iteration.length == 24 / 20
    assert iteration.reward == np.mean([x[0] for x in drawn])


def test_where_the_bound_is_reached_groups_stay():
    loop = written(1)
    iteration, rewards = run(loop)
    assert rewards == [[1, 2], [5, 6], [3, 4], [0, 0], [7, 7]]
    assert iteration.rounds == 1 and iteration.thrown_away == 3 and iteration.no_spread == 2 / 5


@pytest.mark.parametrize("first, rounds", [(FIRST[:1] * 5, 0), (FIRST, 2)], ids=["full at once", "not full"])
def test_a_batch_that_is_full_draws_no_more(first, rounds):
    loop = dataclasses.replace(written(9), problems=lambda i: first)
    iteration, _ = run(loop)
    assert iteration.rounds == rounds == len(loop.drawn) - 1


def test_without_refill_nothing_is_replaced():
    loop = written(0, further=None)
    iteration, rewards = run(loop)
    assert rewards == [[1, 2], [7, 7], [3, 4], [0, 0], [7, 7]] and iteration.no_spread == 3 / 5
    assert iteration.rounds == iteration.thrown_away == 0 and len(loop.drawn) == 1


def test_rewards_of_tokens_are_compared_by_their_sums():
    def of_tokens(outputs, answers):
        rewards = np.zeros((2 * len(outputs), 6), np.float32)
        rewards[:, 1] = first_token(outputs, answers) - np.arange(2 * len(outputs)) % 2  # [5, 6] has one sum
        return rewards

    loop = written(2, judge=of_tokens)
    run(loop)
    assert loop.trainer.rewards.shape == (10, 6)
    # Sums of FIRST: 1 1, 7 6, 3 3, 0 -1, 7 6; of round 1, asked for two: 0 -1, 5 5; of round 2, asked for one: 8 8.
    assert loop.trainer.rewards[:, 1].tolist() == [0 + 0, -1, 7, 6, 3, 3, 0, -1, 7, 6]
    assert [len(prompts) for _, prompts in loop.drawn] == [5, 2, 1]


def test_a_group_without_rewards_is_replaced_too():
    """One reward is no spread, and neither is none, or an infinite one."""

    def judge(outputs, answers):
        rewards = first_token(outputs, answers)
        rewards[rewards == 2], rewards[rewards == 4] = np.nan, np.inf
        return rewards

    loop = written(1, judge, further=lambda i, r: [*FURTHER[r], SAME, SAME])
    _, rewards = run(loop)
    assert rewards == [[5, 6], [0, 9], [3, np.inf], [0, 0], [7, 7]] and len(loop.drawn[1][1]) == 5


@pytest.mark.parametrize(
    "change, error",
    [
        (dict(refill=-1), "refill must be at least 0 rounds of further problems, got -1"),
        (dict(further=None), "refill=2 draws further problems: give further"),
        (dict(trainer=Learning("ppo")), "refill must be 0 with a critic.*got 2"),
        (dict(trainer=Learning(n=1)), r"SamplingParams\(n=…\) of 2 at least, got n=1"),
    ],
)
def test_a_refill_that_cannot_be_is_refused(change, error):
    with pytest.raises(ValueError, match=error):
        dataclasses.replace(written(2), **change)


def test_a_round_without_problems_is_refused():
    with pytest.raises(ValueError, match=r"further\(4, 1\) gives no problems: refill=1"):
        run(written(1, further=lambda i, r: []))


def test_a_judge_that_gives_too_few_is_named():
    with pytest.raises(ValueError, match=r"the judge gave rewards of the shape \[9\] for 10 samples"):
        run(written(1, judge=lambda outputs, answers: first_token(outputs, answers)[:-1]))


# -- keys, and a run that goes on --------------------------------------------------------------------------------------


def test_every_round_draws_with_a_key_of_its_own(monkeypatch):
    """A function of version and round; round 0 has the key that it has without a refill."""
    keys = []
    monkeypatch.setattr(loops, "generate", lambda *_, key, **__: keys.append(jax.random.key_data(key).tolist()))
    trainer = make()
    state, loop = trainer.start(TINY[1], jax.random.key(7)), Loop(trainer, problems, first_token, WIDTH)
    for version in (0, 1, 2):
        state = dataclasses.replace(state, version=np.int32(version))
        for number in (0, 1, 2):
            loop.generate(state, [[1]], number)
    assert keys[3] == jax.random.key_data(folded(jax.random.key(7), 0, 1)).tolist()
    assert len({tuple(key) for key in keys}) == 9
    samples = {
        tuple(jax.random.key_data(folded(jax.random.key(7), 0, v, prompt)).tolist())
        for v in (0, 1, 2)
        for prompt in (0, 1, 2)
    }
    assert not samples & {tuple(key) for key in keys}  # the key of a prompt of round 0 is no round's


def many_even(outputs, answers) -> np.ndarray:
    """Which samples have more even tokens than odd ones: some groups agree."""
    return np.array([np.mean([t % 2 == 0 for t in s.token_ids]) > 0.5 for o in outputs for s in o.outputs], np.float32)


def test_a_run_that_stopped_goes_on_to_the_same_bits(tmp_path):
    def further(iteration: int, number: int):
        return problems(1000 * iteration + number)

    trainer = make(epochs=2, mini_batches=2, micro_batches=2)
    loop = Loop(trainer, problems, many_even, WIDTH, engine=ENGINE, refill=2, further=further)
    state, first = loop.iterate(trainer.start(TINY[1], jax.random.key(2)))
    snapshots.save(tmp_path, 1, state)
    state, second = loop.iterate(state)
    expected = jax.device_get(state)
    again, resumed = loop.iterate(snapshots.restore(tmp_path, trainer.start(TINY[1], jax.random.key(2))))
    assert same(jax.device_get(again), expected) and first.thrown_away + second.thrown_away > 0
    seconds = dict(generating=0, learning=0)
    assert dataclasses.replace(second, **seconds) == dataclasses.replace(resumed, **seconds)
    for iteration in (first, second):
        assert iteration.rounds > 0 and iteration.updates[0]["kl"] == iteration.updates[0]["max_delta"] == 0
