"""Processes that do not do the same, or are gone, are told of and end: here as threads over a store in memory."""

import threading
import time

import pytest

from jaxengine.engine import lockstep
from jaxengine.engine.lockstep import Lockstep, LockstepError


class Store:
    """The calls of jax.distributed's key-value store that Lockstep makes."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        with self._changed:
            self.values[key] = value
            self._changed.notify_all()

    def key_value_dir_get(self, name: str) -> list[tuple[str, str]]:
        with self._changed:
            return [(key, value) for key, value in self.values.items() if key.startswith(name)]

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000), key
            return self.values[key]


@pytest.fixture
def pair(monkeypatch):
    """Two processes' locksteps, which are never ended from outside."""
    monkeypatch.setattr(lockstep, "START", 0.0)
    monkeypatch.setattr(lockstep, "BEAT", 0.02)
    store = Store()
    made = [Lockstep(store, "engine/", me, (0, 1), timeout=1.0) for me in (0, 1)]
    yield made
    for each in made:
        each.close()
        each.wait()


def settled(each: Lockstep) -> None:
    with each.together():
        each.settle()


def both(pair, call) -> list[BaseException | None]:
    """`call` of both at once, as two processes would make it; what each raised."""
    raised: list[BaseException | None] = [None, None]

    def run(i: int) -> None:
        try:
            call(pair[i])
        except LockstepError as error:
            raised[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return raised


def test_equal_plans_settle(pair):
    for step in range(3 * lockstep.KEPT):
        for each in pair:
            each.follow(("plan", step))
    assert both(pair, settled) == [None, None]
    assert [each.failure for each in pair] == [None, None]


def test_a_difference_stops_both_with_both_plans(pair):
    for step in range(5):
        for each in pair:
            each.follow(("plan", step, each.me if step == 3 else "same"))
    for error in both(pair, settled):
        assert "step 4" in str(error) and "('plan', 3, 0)" in str(error) and "('plan', 3, 1)" in str(error)


def test_a_difference_that_is_no_longer_kept_is_found_in_the_hashes_after_it(pair):
    pair[0].follow("here"), pair[1].follow("there")
    for step in range(2 * lockstep.KEPT):
        for each in pair:
            if each.failure is None:
                each.follow(step)
    assert all("differs" in str(error) for error in both(pair, settled))


def test_an_error_in_one_ends_the_other(pair):
    with pytest.raises(OSError), pair[0].together():
        raise OSError("a planted failure")
    with pytest.raises(LockstepError, match="process 0 failed with OSError: a planted failure"):
        settled(pair[1])
    with pytest.raises(LockstepError, match="process 0"):
        pair[0].follow("more")


def test_what_refuses_arguments_ends_nothing(pair):
    for each in pair:
        with pytest.raises(ValueError), each.together():
            raise ValueError("n must be at least 1")
        each.follow("next")
    assert both(pair, settled) == [None, None]


def test_one_that_stays_behind_ends_both(pair):
    start = time.monotonic()
    pair[0].follow("alone")
    with pytest.raises(LockstepError, match="process 1 has not begun step 1 .* it is at step 0"):
        settled(pair[0])
    assert time.monotonic() - start >= pair[0].timeout


def test_one_that_falls_silent_ends_the_other(pair, monkeypatch):
    for each in pair:
        each.follow("same")
    assert both(pair, settled) == [None, None]
    monkeypatch.setattr(pair[1], "_tell", lambda: None)
    pair[0]._thread.join(10)
    assert "process 1 showed no sign of life" in str(pair[0].failure)


def test_one_that_is_closed_may_be_silent_and_not_be_waited_for(pair):
    for each in pair:
        each.follow("same")
    assert both(pair, settled) == [None, None]
    pair[1].close()
    pair[0]._thread.join(2 * pair[0].timeout)
    assert pair[0].failure is None
    pair[0].follow("one more")
    with pytest.raises(LockstepError, match="process 1 ended after 1 steps, process 0 has begun 2"):
        settled(pair[0])
