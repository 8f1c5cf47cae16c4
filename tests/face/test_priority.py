"""Priorities: a lower one is served first, equal ones in the order in which they came, and no bit knows of them."""

import jax
import pytest
from conftest import bits, make_llm

from jaxengine import SamplingParams

PROMPTS = [[3], [4], list(range(40)), [5] * 9, [6]]
PARAMS = SamplingParams(max_tokens=6)
KEY = jax.random.key(2)


def order_of_ends(llm, priority) -> list[int]:
    requests = llm.admitted(PROMPTS, PARAMS, KEY, None, priority=priority)
    ended: list[int] = []
    for _ in llm.session.runner.run(requests):
        ended += [i for i, request in enumerate(requests) if request.is_finished and i not in ended]
    return ended


@pytest.mark.parametrize("overlap", [False, True])
def test_the_lowest_comes_first(tiny, overlap):
    with tiny.engine.adjusted(held_slots=31, overlap=overlap):
        assert order_of_ends(tiny, [3, 1, -2, 1, 0]) == [2, 4, 1, 3, 0]
        assert order_of_ends(tiny, 7) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("held", [dict(held_slots=30), dict(held_pages=393, overlap=True), {}])
def test_bits_know_no_priority(tiny, held):
    params = PARAMS.replace(max_tokens=60, temperature=0.8)
    expected = bits(tiny.generate(PROMPTS, params, key=KEY))
    with tiny.engine.adjusted(**held):
        assert bits(tiny.generate(PROMPTS, params, key=KEY, priority=[5, 4, 3, 2, 1])) == expected


def test_the_highest_is_preempted_first(tiny):
    params = SamplingParams(max_tokens=120, ignore_eos=True)
    requests = tiny.admitted([[3], [4], [5]], params, KEY, None, priority=[9, 1, 1])
    with tiny.engine.adjusted(held_pages=391):  # eight pages of 32 tokens, and twelve are wanted
        run, preempted = tiny.session.runner.run(requests), set()
        for _ in run:
            waiting = {requests.index(sample.request) for sample in tiny.engine.scheduler.waiting}
            preempted |= {index for index in waiting if requests[index].samples[0].drawn.token_ids}
    assert preempted == {0}


@pytest.mark.parametrize("wrong", [2**40, "high", [1, 2], [1.5] * 5, None])
def test_a_wrong_priority_is_refused(tiny, wrong):
    with pytest.raises(ValueError, match="priorit"):
        tiny.generate(PROMPTS, PARAMS, priority=wrong)


def test_a_call_that_is_refused_takes_no_number(tiny):
    refused, other = (make_llm(tiny.config, tiny.params) for _ in range(2))
    with pytest.raises(ValueError, match="priorit"):
        refused.generate(PROMPTS, PARAMS, priority="high")
    assert bits(refused.generate(PROMPTS, PARAMS)) == bits(other.generate(PROMPTS, PARAMS))


def test_a_stream_has_one(tiny):
    stream = tiny.stream(PROMPTS[0], PARAMS, key=KEY, priority=-3)
    next(stream)
    assert [request.priority for request in tiny.engine.requests.values()] == [-3]
    stream.close()
