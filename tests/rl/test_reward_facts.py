"""What a reward is told of its sample when it asks: why it ended, and its tokens; and DAPO's penalty, which asks."""

import functools

import bad_rewards
import numpy as np
import pytest

from jaxengine.outputs import UNDRAWN, CompletionOutput, RequestOutput, VersionSpan
from jaxengine.rl.rewards import Isolated, compute_rewards, overlong_penalty


def sample(num_tokens: int, finish_reason: str = "stop", of_a_tool: int = 0) -> CompletionOutput:
    """Of `num_tokens` that the model wrote and some of a tool between them."""
    first = num_tokens - 1
    spans = [VersionSpan(4, 0, first), VersionSpan(UNDRAWN, first, first + of_a_tool)]
    spans += [VersionSpan(4, first + of_a_tool, num_tokens + of_a_tool)]
    tokens = list(range(3, 3 + num_tokens + of_a_tool))
    return CompletionOutput(0, "text", tokens, np.zeros(len(tokens), np.float32), finish_reason, None, spans)


def judged(reward, *samples: CompletionOutput) -> list[float]:
    found = compute_rewards([RequestOutput("0", "?", [1], list(samples), True)], ["answer"], reward)
    assert not found.failures
    return found.values.tolist()


def by_position(prompt, completion, answer, finish_reason):
    return finish_reason == "length"


def by_name_with_a_default(*sample, num_tokens=-1):
    return num_tokens if len(sample) == 3 else -9


def of_options(prompt, completion, answer, **options):
    return len(options)


def of_another_meaning(token_ids, finish_reason, num_tokens):
    return token_ids == "?" and finish_reason == "text" and num_tokens == "answer"


class Called:
    def __call__(self, prompt, completion, answer, *, token_ids):
        return sum(token_ids)


@pytest.mark.parametrize(
    "reward, expected",
    [
        (bad_rewards.by_facts, [13, 123]),
        (Isolated(bad_rewards.by_facts), [13, 123]),
        (Isolated(bad_rewards.by_facts, more=1000, num_tokens=5), [1053, 1153]),  # an option is the caller's
        (functools.partial(bad_rewards.by_facts, more=1000), [1013, 1123]),
        (by_position, [0, 1]),
        (by_name_with_a_default, [1, 2]),
        (of_options, [0, 0]),
        (of_another_meaning, [1, 1]),
        (Called(), [3, 3 + 4 + 5 + 6]),
    ],
)
def test_a_reward_gets_what_it_asks_for_by_name(reward, expected):
    assert judged(reward, sample(1), sample(2, "length", of_a_tool=2)) == expected


def test_a_reward_may_be_called_as_it_is():
    assert Isolated(bad_rewards.by_facts)("?", "", "", finish_reason="stop", num_tokens=2, token_ids=[7]) == 27


def test_the_overlong_penalty_is_dapos():
    """Eq. 13 of arXiv:2503.14476 with its three cases, at every length about them; a tool's tokens do not count."""

    def defined(length: int) -> float:
        if length <= 20 - 8:
            return 0.0
        return ((20 - 8) - length) / 8 if length <= 20 else -1.0

    lengths = range(1, 25)
    found = judged(overlong_penalty(max_tokens=20, cache=8), *(sample(n, of_a_tool=n % 3) for n in lengths))
    assert found == [defined(n) for n in lengths] and found[10:21] == [0, 0, *(-i / 8 for i in range(1, 9)), -1]
    parts = compute_rewards([], [], [overlong_penalty(max_tokens=20, cache=20)]).parts
    assert list(parts) == ["overlong"]


@pytest.mark.parametrize("cache", [0, 21, -1])
def test_a_cache_that_is_no_part_of_the_tokens_is_refused(cache):
    with pytest.raises(ValueError, match=rf"cache must be within 1 … max_tokens=20 tokens, got {cache}"):
        overlong_penalty(max_tokens=20, cache=cache)
