"""An interrupt, a stream that is dropped, an abort: while the engine compiles, runs a step, or has nothing to do."""

import asyncio
import contextlib
import functools
import gc
import itertools
import linecache
import os
import signal
import sys
import threading
from pathlib import Path

import jax
import pytest
from conftest import bits, make_llm
from neighbours import PARAMS, PROMPTS, assert_idle, run, start, step

import jaxengine
from jaxengine import LLM, SamplingParams
from jaxengine.base.progress import Progress
from jaxengine.device import steps

PROMPT = list(range(200, 320))
VICTIM = SamplingParams(max_tokens=30, seed=5)
KEY = 7  # of neighbours.start
STATIC = ("model_config", "kernels", "tile", "max_logprobs", "num_steps")  # of a decode step's arguments
pytestmark = pytest.mark.timeout(120)  # what goes wrong here may wait for ever


@pytest.fixture(scope="module")
def expected(tiny) -> list[tuple]:
    return run(tiny, start(tiny))


@pytest.fixture(scope="module")
def whole(tiny) -> list[tuple]:
    return run(tiny, start(tiny, [PROMPT], VICTIM))


def fresh(tiny: LLM, overlap: bool) -> LLM:
    """An engine that has proven nothing yet."""
    return make_llm(tiny.config, tiny.params, overlap=overlap)


@pytest.fixture(params=[False, True], ids=["plain", "overlapped"])
def llm(request, tiny) -> LLM:
    return fresh(tiny, request.param)


def generate(llm: LLM) -> list[tuple]:
    """The neighbours in a call of their own."""
    return bits(llm.generate(PROMPTS, PARAMS, key=jax.random.key(KEY)))


def amid_a_step(llm: LLM, monkeypatch, fault) -> None:
    """`fault()` once, while the next decode is under way."""
    run_decode, calls = llm.engine.step_variants.run_decode, itertools.count()

    def called(*args):
        out = run_decode(*args)
        if next(calls) == 0:
            fault()
        return out

    monkeypatch.setattr(llm.engine.step_variants, "run_decode", called)


# -- while compiling --------------------------------------------------------------------------------------------------


def interrupted_report(lines: list[str], at: int, text: str) -> None:
    lines.append(text)
    if len(lines) == at:
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_ctrl_c_while_steps_are_compiled_and_proven(tiny, overlap, expected):
    """At each line that an engine reports before its first answer; the last round is not interrupted."""
    for at in itertools.count(1):
        llm, lines = fresh(tiny, overlap), []
        llm.engine.step_variants.report = functools.partial(interrupted_report, lines, at)
        with contextlib.suppress(KeyboardInterrupt):
            assert generate(llm) == expected
            break
        assert len(lines) >= at and "compil" in lines[-1]  # steps that compile side by side report on
        assert_idle(llm)
        assert generate(llm) == expected
    assert at >= 4, "there were interrupts"


def test_ctrl_c_amid_tracing(llm, expected, monkeypatch):
    """JAX is in the midst of a program that is to take the cache."""

    @functools.partial(jax.jit, static_argnames=STATIC, donate_argnames="cache")
    def traced(params, cache, *args, model_config, kernels, tile, needs, max_logprobs, num_steps):
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(steps, "decode_step", traced)
        generate(llm)
    assert_idle(llm)
    assert generate(llm) == expected


def test_ctrl_c_while_warming_up(llm, expected, monkeypatch):
    requests = start(llm)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(steps, "read_pages", lambda *args: signal.raise_signal(signal.SIGINT))
        llm.warm_up()
    assert run(llm, requests) == expected
    assert_idle(llm)


# -- between steps ----------------------------------------------------------------------------------------------------


def interrupt_at(place: str, seen: list[str]):
    """A trace function that raises KeyboardInterrupt at a line, and lists all that LLM executes outside of a step."""
    names = ("llm.py", "base/progress.py", "engine/engine.py", "host/scheduler.py")
    files = {str(Path(jaxengine.__file__).parent / name) for name in names}
    assert all(map(os.path.exists, files)), "a file has moved: nothing in it would be interrupted"
    inside = ("step", "_collect", "_dispatch", "schedule", "warm_up")

    def trace(frame, event, arg):
        code = frame.f_code
        if code.co_filename not in files or code.co_name in inside or not seen and code.co_name != "generate":
            return None
        # Python handles no signal between the end of a `with` block and the release of its lock, but traces that line.
        if event == "line" and not linecache.getline(code.co_filename, frame.f_lineno).lstrip().startswith("with "):
            seen.append(f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}")
            if seen[-1] == place and seen.count(place) == 1:
                raise KeyboardInterrupt
        return trace

    return trace


def test_ctrl_c_at_any_line_of_generate(llm, expected):
    """Before, between and after the steps: nothing is left queued, and the ids are free again."""
    ask = lambda: bits(llm.generate([[1, 2], [3]], SamplingParams(max_tokens=2, n=2, seed=1), request_ids=["a", "b"]))

    def interrupted(place: str) -> list[str]:
        seen, before = [], sys.gettrace()
        sys.settrace(interrupt_at(place, seen))
        try:
            with contextlib.suppress(KeyboardInterrupt):
                ask()
        finally:
            sys.settrace(before)
        return seen

    right, places = ask(), sorted(set(interrupted("nowhere")))
    assert len(places) > 40
    for place in places:
        assert place in interrupted(place)
        assert_idle(llm)
        assert ask() == right, f"interrupted at {place}"
    assert generate(llm) == expected


def test_ctrl_c_between_two_steps(llm, expected, whole, monkeypatch):
    """Its traceback is kept, as a notebook keeps it, and with that everything that the interrupted call had."""
    beside, updates = start(llm), itertools.count()

    class Bar:
        n, mininterval = 0, 0

        def update(self, count: int) -> None:
            if next(updates) == 3:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Progress, "bar", lambda *args: contextlib.nullcontext(Bar()))
    with pytest.raises(KeyboardInterrupt) as kept:
        llm.generate([PROMPT, PROMPT], VICTIM, use_tqdm=True)
    assert set(llm.engine.requests) == {request.request_id for request in beside}
    llm.engine.scheduler.check_integrity()
    assert run(llm, beside) == expected
    assert run(llm, start(llm, [PROMPT], VICTIM)) == whole
    assert_idle(llm)
    assert kept.tb is not None


def test_ctrl_c_twice(llm, expected, monkeypatch):
    """The second comes while the first one's requests are being aborted: the next call aborts them."""
    finish, calls, asked = llm.engine.scheduler.finish, itertools.count(), []

    def interrupted(*args):
        if next(calls) == 0:
            signal.raise_signal(signal.SIGINT)
        finish(*args)

    def both():
        asked.extend(llm.engine.requests.values())
        monkeypatch.setattr(llm.engine.scheduler, "finish", interrupted)
        signal.raise_signal(signal.SIGINT)

    amid_a_step(llm, monkeypatch, both)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT, PROMPT], VICTIM)
    assert next(calls) > 0, "there was a second one"
    assert generate(llm) == expected
    assert len(asked) == 2 and all(request.is_finished for request in asked), "another thread may wait for them"
    assert_idle(llm)


def test_ctrl_c_in_a_running_event_loop(llm, expected, monkeypatch):
    """As in a notebook, whose loop runs on."""

    async def cells():
        beside = start(llm)
        step(llm)
        amid_a_step(llm, monkeypatch, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            llm.generate([PROMPT], VICTIM)
        assert set(llm.engine.requests) == {request.request_id for request in beside}
        await asyncio.sleep(0)
        return run(llm, beside), generate(llm)

    loop = asyncio.new_event_loop()
    try:
        assert loop.run_until_complete(cells()) == (expected, expected)
    finally:
        loop.close()
    assert_idle(llm)


# -- streams and aborts -----------------------------------------------------------------------------------------------


def test_a_stream_that_is_dropped_is_aborted(llm, expected):
    beside, stream = start(llm), llm.stream(PROMPT, VICTIM, cumulative=True)
    request = llm.engine.requests[next(stream).request_id]
    del stream
    assert request.is_finished and request.request_id not in llm.engine.requests
    assert run(llm, beside) == expected
    assert_idle(llm)


def test_a_stream_that_is_collected_as_garbage_amid_a_step(llm, expected, monkeypatch):
    """The collector runs it in any thread, here the one that steps, which must not wait for itself nor be disturbed."""
    stream = llm.stream(PROMPT, VICTIM, cumulative=True)
    cycle: list[object] = [stream]
    cycle.append(cycle)
    request = llm.engine.requests[next(stream).request_id]
    del stream, cycle
    amid_a_step(llm, monkeypatch, lambda: (gc.collect(), ends.append(request.is_finished)))
    ends: list[bool] = []
    assert generate(llm) == expected
    assert ends == [False] and request.is_finished and request.samples[0].drawn.finish_reason == "abort", (
        "with the end of that step"
    )
    assert len(request.samples[0].drawn.token_ids) < 6
    assert_idle(llm)


def test_a_signal_handler_may_abort_amid_a_step(llm, expected, monkeypatch):
    (request,) = start(llm, [PROMPT], VICTIM, ["victim"])
    amid_a_step(llm, monkeypatch, lambda: signal.raise_signal(signal.SIGUSR1))
    before = signal.signal(signal.SIGUSR1, lambda *_: llm.abort("victim"))
    try:
        assert generate(llm) == expected
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert request.samples[0].drawn.finish_reason == "abort" and len(request.samples[0].drawn.token_ids) < 6
    assert_idle(llm)


def test_an_abort_from_another_thread_ends_it_with_the_step_that_runs(llm, expected, monkeypatch):
    """The abort does not wait for the step; the pages are free when the step is over."""
    (request,) = start(llm, [PROMPT], VICTIM, ["victim"])
    working, aborted = threading.Event(), threading.Event()
    amid_a_step(llm, monkeypatch, lambda: (working.set(), aborted.wait()))

    def abort():
        working.wait()
        llm.abort("victim")
        aborted.set()

    thread = threading.Thread(target=abort)
    thread.start()
    assert generate(llm) == expected
    thread.join()
    assert request.samples[0].drawn.finish_reason == "abort" and len(request.samples[0].drawn.token_ids) < 6
    assert_idle(llm)
