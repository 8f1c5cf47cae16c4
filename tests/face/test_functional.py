"""jaxengine.generate: one engine after calls with any weights, whatever cuts a call off."""

import contextlib
import itertools
import threading
import weakref
from unittest import mock

import jax
import pytest
from conftest import bits, random_model

import jaxengine
from jaxengine import SamplingParams, functional
from jaxengine.command.bench import compilations
from jaxengine.engine.engine import Engine
from jaxengine.engine.session import Session
from jaxengine.models.params import initialise

PROMPTS, PARAMS = [[5, 6, 7] * 20], SamplingParams(max_tokens=6, ignore_eos=True)
CONFIG, POLICY = random_model(num_hidden_layers=1)
OTHER = initialise(CONFIG, jax.random.key(9), scale=0.1)


@pytest.fixture(autouse=True)
def no_sessions(monkeypatch):
    monkeypatch.setattr(functional, "_kept", {})


def generate(policy, **engine):
    return jaxengine.generate(
        policy,
        PROMPTS,
        PARAMS,
        key=jax.random.key(0),
        config=CONFIG,
        **dict(max_model_len=128, max_num_seqs=4, num_pages=40) | engine,
    )


def test_the_first_call_compiles_each_step_once():
    jax.clear_caches()
    with compilations() as names:
        first = generate(POLICY)
    steps = [name for name in names if "step" in name or "history" in name or "pages" in name]
    assert len(steps) == len(set(steps)) == 4, steps
    with compilations() as names:
        assert bits(generate(OTHER)) != bits(first) == bits(generate(POLICY))
    assert not names


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "home, name, at",
    [
        (Engine, "drop_weights", 1),
        (Engine, "drop_weights", 2),
        (Engine, "_recover", 2),
        (Engine, "update_params", 1),
        (Session, "complete", 1),
    ],
)
def test_an_interrupt_leaves_nothing_of_a_policy_to_the_next(home, name, after, at, monkeypatch):
    """Before or after each call of the method. All weights here are version 0, the key of pages and contracts."""
    (expected,) = generate(OTHER)
    real, calls = getattr(home, name), itertools.count(1)

    def interrupted(*args, **kwargs):
        now = next(calls) == at
        if now and not after:
            raise KeyboardInterrupt
        out = real(*args, **kwargs)
        if now:
            raise KeyboardInterrupt
        return out

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(home, name, interrupted)
        generate(POLICY)
    (found,) = generate(OTHER)
    assert bits([found]) == bits([expected]) and found.digest == expected.digest
    assert found.num_cached_tokens == expected.num_cached_tokens == 0
    (kept,) = functional._kept.values()
    session = kept.session
    session.engine.scheduler.check_integrity()
    assert session.params is None and not session.engine.requests and not session.contracts._digests


def test_two_threads_that_call_first_share_an_engine(monkeypatch):
    made, real, both = [], functional.Session, threading.Barrier(2)

    def counted(*args, **kwargs):
        made.append(real(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(functional, "Session", counted)
    answers: list = [None, None]

    def call(index: int) -> None:
        both.wait()
        answers[index] = bits(generate((POLICY, OTHER)[index]))

    threads = [threading.Thread(target=call, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and answers == [bits(generate(POLICY)), bits(generate(OTHER))]


def test_one_pool_is_kept():
    """The other is gone before a new one is made, so that there is never memory for two."""
    seen, make = [], functional.Session

    def made(*given):
        assert not functional._kept
        return make(*given)

    with mock.patch.object(functional, "Session", made):
        for max_waiting in (40, 40, 41, 40):
            generate(POLICY, max_waiting=max_waiting)
            (kept,) = functional._kept.values()
            seen.append(weakref.ref(kept.session))
            del kept
    assert seen[0] == seen[1] and [session() is None for session in seen] == [True, True, True, False]


def test_a_pool_that_is_used_stays_until_its_call_ends():
    """No duplicate is made for it, and one is kept in the end."""
    both, inner = threading.Barrier(2), functional.Session.complete
    made, make = [], functional.Session

    def complete(session, requests):
        both.wait(60)
        return inner(session, requests)

    def call(max_waiting: int) -> None:
        generate(POLICY, max_waiting=max_waiting)

    with (
        mock.patch.object(functional.Session, "complete", complete),
        mock.patch.object(functional, "Session", lambda *given: made.append(given) or make(*given)),
    ):
        threads = [threading.Thread(target=call, args=(max_waiting,)) for max_waiting in (50, 51)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(made) == 2 and len(functional._kept) == 1
