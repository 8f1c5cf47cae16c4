"""Several rewards that count together, each reported."""

import dataclasses
import json
import types

import bad_rewards
import numpy as np
import pytest

from jaxengine.outputs import CompletionOutput, RequestOutput, VersionSpan
from jaxengine.rl.loops.loop import Loop, judged_by
from jaxengine.rl.rewards import Isolated, Rewards, compute_rewards


def outputs(*groups: list[str]) -> list[RequestOutput]:
    def sample(text: str) -> CompletionOutput:
        how = "error" if text == "broken" else "stop"
        return CompletionOutput(0, text, [1], np.zeros(1, np.float32), how, None, [VersionSpan(3, 0, 1)])

    return [RequestOutput(str(i), "?", [1], [sample(text) for text in group], True) for i, group in enumerate(groups)]


def right(prompt, completion, answer):
    return completion.startswith(answer)


def short(prompt, completion, answer):
    return 3 - len(completion)


def inverse(prompt, completion, answer):
    return 1 / (len(completion) - 2)


def test_rewards_add_up_with_their_weights_and_each_is_told():
    found = compute_rewards(outputs(["a", "bbb"], ["ca"]), ["a", "c"], [right, short], reward_weights=[1.0, 0.25])
    assert found.values.tolist() == [1.5, 0.0, 1.25] and found.values.dtype == np.float32
    assert {name: values.tolist() for name, values in found.parts.items()} == {"right": [1, 0, 1], "short": [2, 0, 1]}
    unweighted = compute_rewards(outputs(["a", "bbb"]), ["a"], {"x": right, "y": short})
    assert unweighted.values.tolist() == [3, 0] and list(unweighted.parts) == ["x", "y"]
    alone = compute_rewards(outputs(["a"]), ["a"], short)
    assert alone.values.tolist() == [2] and alone.parts["short"].tolist() == [2]


@pytest.mark.parametrize("rewards", [[inverse, right], [right, inverse]], ids=["first", "last"])
def test_a_part_that_fails_fails_its_sample(rewards):
    """Whichever part it is, and whatever it weighs; the parts that did not fail keep their values."""
    batch = outputs(["a", "aa", "aaa"], ["broken"])
    found = compute_rewards(batch, ["a", "b"], rewards, reward_weights=[0.0, 1.0], failed=np.nan)
    assert np.isnan(found.values).tolist() == [False, True, False, True]
    assert found.failures[1].startswith("inverse: ZeroDivisionError") and "the engine ended" in found.failures[3]
    assert list(found.failures) == [1, 3]
    np.testing.assert_array_equal(found.parts["right"], [1, 1, 1, np.nan])
    np.testing.assert_array_equal(found.parts["inverse"], [-1, np.nan, 1, np.nan])
    assert compute_rewards(batch, ["a", "b"], rewards, failed=-7.0).values[[1, 3]].tolist() == [-7, -7]


def test_processes_and_threads_count_together():
    process = Isolated(bad_rewards.by_completion, more=0.5)
    found = compute_rewards(outputs(["good", "raise"]), ["four"], [process, short], reward_weights=[2.0, 1.0])
    assert found.values.tolist() == [9 - 1, 0] and list(found.parts) == ["by_completion", "short"]


@pytest.mark.parametrize(
    "rewards, weights, error",
    [
        ([right, short], [1.0], r"1 reward_weights for 2 rewards \(right, short\)"),
        (right, [1.0, 2.0], "2 reward_weights for one reward"),
        ([right, right], None, "several rewards are called right: name each, in a mapping"),
        ([], None, "no rewards were given"),
        ({"right": right}, [float("inf")], "must be finite numbers, got inf for right"),
    ],
)
def test_names_and_weights_that_are_wrong_are_refused_at_once(rewards, weights, error):
    with pytest.raises(ValueError, match=error):
        judged_by(rewards, reward_weights=weights)


class Learning:
    """A trainer that takes what it is given and learns nothing."""

    def train(self, state, rollout, rewards, *, reference):
        self.rewards = rewards
        return state, []


@dataclasses.dataclass(frozen=True)
class Written(Loop):
    """A loop whose model writes what the problems say."""

    def generate(self, state, prompts, number=0):
        return outputs(*prompts)


def test_an_iteration_reports_each_reward():
    """The mean of each is over the samples that have it: the failed ones of another part among them."""
    problems = [(["a", "aa", "aaa", "b"], "a")]
    loop = Written(Learning(), lambda i: problems, judged_by([right, inverse], reward_weights=[1.0, 0.5]), length=8)
    with pytest.warns(UserWarning, match="1 of 4 samples have no reward; the first, row 1: inverse"):
        _, iteration = loop.iterate(types.SimpleNamespace(version=3))
    assert iteration.rewards == pytest.approx({"right": 3 / 4, "inverse": -1 / 3})
    assert iteration.left_out == 1 / 4 and iteration.reward == pytest.approx((0.5 + 1.5 - 0.5) / 3)
    np.testing.assert_array_equal(loop.trainer.rewards, np.array([0.5, np.nan, 1.5, -0.5], np.float32))
    assert json.loads(json.dumps(dataclasses.asdict(iteration)))["rewards"] == iteration.rewards
    plain = dataclasses.replace(loop, judge=lambda outputs, answers: [1, 2, 3, 4])
    assert plain.iterate(types.SimpleNamespace(version=3))[1].rewards == {}


def test_infinite_rewards_are_left_out_as_the_trainer_leaves_them_out():
    values = np.array([1.0, np.inf, 0.0, -np.inf], np.float32)
    loop = Written(Learning(), lambda i: [(["a"] * 4, "a")], lambda *_: Rewards(values, {}, {"x": values}), length=8)
    _, iteration = loop.iterate(types.SimpleNamespace(version=0))
    assert iteration.rewards == {"x": 0.5} and iteration.reward == 0.5 and iteration.left_out == 0.5
