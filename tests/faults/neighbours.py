"""Requests that run beside a fault, a step at a time: whatever happens to others, their bits must not move."""

import itertools
from collections.abc import Callable

import jax
from conftest import bits

from jaxengine import LLM, SamplingParams
from jaxengine.host.sample import Request

PROMPTS = [[3], list(range(56)), list(range(100, 190)), [9] * 20]  # the second and third come to want a page more
PARAMS = [
    SamplingParams(max_tokens=12),
    SamplingParams(max_tokens=14, n=2, top_p=0.9),
    SamplingParams(max_tokens=9, temperature=0),
    SamplingParams(max_tokens=6, repetition_penalty=1.2, top_k=50),
]


def start(llm: LLM, prompts=PROMPTS, params=PARAMS, ids: list[str] | None = None) -> list[Request]:
    """Queue requests without running them."""
    requests = llm.admitted(prompts, params, jax.random.key(7), ids)
    for request in requests:
        llm.engine.add(request)
    return requests


def step(llm: LLM, held: list[int] | None = None) -> None:
    """A step, and the invariants after it. `held` are pages that a test keeps for itself."""
    llm.engine.step()
    if held is None:
        llm.engine.scheduler.check_integrity()
    else:
        llm.engine.scheduler.page_pool.check_integrity([held, *(s.pages for s in llm.engine.scheduler.running)])


def run(
    llm: LLM,
    requests: list[Request],
    fault: Callable[[], object] | None = None,
    at: int = 3,
    held: list[int] | None = None,
) -> list[tuple]:
    """Step until the requests have ended, with `fault()` before step `at`. What they answered."""
    for i in itertools.count():
        assert i < 1_000, "no end"
        if fault is not None and i == at:
            fault()
        if all(request.is_finished for request in requests):
            assert fault is None or i >= at, "the requests ended before the fault"
            return answers(llm, requests)
        step(llm, held)
    raise AssertionError


def answers(llm: LLM, requests: list[Request]) -> list[tuple]:
    return bits([llm.session.output(request) for request in requests])


def assert_idle(llm: LLM) -> None:
    """Nothing is left of any request."""
    scheduler = llm.engine.scheduler
    assert not llm.engine.requests and not scheduler.running and not scheduler.waiting
    assert scheduler.page_pool.num_available == llm.engine_config.num_pages - 1, "pages are still held"
    scheduler.check_integrity()
