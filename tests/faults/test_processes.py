"""Threads, two engines, fork, pickle, a running event loop, a clock that jumps. The bits are those of a plain call."""

import asyncio
import copy
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from conftest import bits, make_llm
from neighbours import PARAMS, PROMPTS, answers, assert_idle, run, start

from jaxengine import LLM, SamplingParams

SEEDED = [params.replace(seed=i) for i, params in enumerate(PARAMS)]


@pytest.fixture(scope="module")
def expected(tiny) -> list[tuple]:
    return run(tiny, start(tiny))


@pytest.fixture(scope="module")
def seeded(tiny) -> list[tuple]:
    """What the prompts answer under keys of their own, whatever call they come with."""
    return bits(tiny.generate(PROMPTS, SEEDED))


@pytest.fixture(params=[False, True], ids=["plain", "overlapped"])
def llm(request, tiny, expected) -> LLM:
    llm = make_llm(tiny.config, tiny.params, overlap=request.param)
    assert run(llm, start(llm)) == expected
    return llm


# -- threads ----------------------------------------------------------------------------------------------------------


def together(*calls) -> list:
    """The calls' results; all start at once, each in a thread of its own."""
    barrier = threading.Barrier(len(calls))

    def held_back(call):
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(held_back, call) for call in calls]]


def test_threads_that_generate_at_once_get_their_own_bits(llm, seeded):
    found = together(*[lambda: bits(llm.generate(PROMPTS, SEEDED))] * 5)
    assert found == [seeded] * 5
    assert_idle(llm)


def test_streams_and_calls_share_their_steps(llm, seeded):
    """A call steps for all requests, so it may end a stream, which still yields its last, finished output."""
    streams = [llm.stream(prompt, params, cumulative=True) for prompt, params in zip(PROMPTS, SEEDED, strict=True)]
    last = {}
    for i, outputs in enumerate(itertools.zip_longest(*streams)):
        last |= {k: output for k, output in enumerate(outputs) if output is not None}
        if i == 1:
            assert len(llm.engine.requests) == len(PROMPTS)
            assert bits(llm.generate(PROMPTS, SEEDED)) == seeded
            assert not llm.engine.requests, "the call's steps were the streams' too"
    assert bits([last[k] for k in range(len(PROMPTS))]) == seeded and all(output.finished for output in last.values())
    assert_idle(llm)


def test_a_stream_is_read_between_steps(llm, monkeypatch):
    """A token and its logprob are two writes: a stream that was read between them would show one without the other."""
    render = llm.session.output
    locked: list[bool] = []
    monkeypatch.setattr(
        llm.session, "output", lambda request: (locked.append(llm.session.runner.lock.locked()), render(request))[1]
    )
    for output in llm.stream([1, 2], SamplingParams(max_tokens=5), cumulative=True):
        assert output.finished or all(locked)
    assert len(locked) >= 5


def test_a_thread_may_abort_what_another_one_waits_for(llm, seeded):
    begun = threading.Event()

    def consume():
        outputs = []
        for output in llm.stream(PROMPTS[1], SEEDED[1].replace(max_tokens=400), cumulative=True):
            outputs.append(output)
            if len(outputs) == 3:
                name.append(output.request_id)
                begun.set()
        return outputs[-1]

    def abort():
        begun.wait()
        llm.abort(name[0])

    name: list[str] = []
    output, _, beside = together(consume, abort, lambda: bits(llm.generate(PROMPTS, SEEDED)))
    assert [sample.finish_reason for sample in output.outputs] == ["abort"] * 2
    for sample, (tokens, *_) in zip(output.outputs, seeded[1:3], strict=True):
        assert min(len(sample.token_ids), len(tokens)) >= 2 and all(
            a == b for a, b in zip(sample.token_ids, tokens, strict=False)
        )
    assert beside == seeded
    assert_idle(llm)


def test_an_error_in_one_threads_step_leaves_the_others_bits(llm, seeded, monkeypatch):
    """The thread whose step fails gets the error; what the others wait for is computed again."""
    run_decode, calls = llm.engine.step_variants.run_decode, itertools.count()

    def failing(*args):
        out = run_decode(*args)
        if next(calls) == 4:
            raise RuntimeError("a device error, planted")
        return out

    monkeypatch.setattr(llm.engine.step_variants, "run_decode", failing)

    def call():
        try:
            return bits(llm.generate(PROMPTS, SEEDED))
        except RuntimeError as error:
            return str(error)

    found = together(call, call, call)
    assert found.count("a device error, planted") == 1 and found.count(seeded) == 2
    assert_idle(llm)


# -- engines and processes --------------------------------------------------------------------------------------------


def test_two_engines_in_a_process_know_nothing_of_each_other(tiny, expected):
    """Other weights, the same ids and prompts, steps in turn: each answers as it does alone."""
    halved = jax.tree.map(lambda x: x * 0.5, tiny.params)
    make = lambda: make_llm(tiny.config, halved)
    alone = make()
    other_expected = run(alone, start(alone))
    assert other_expected != expected
    other, ids = make(), [str(i) for i in range(len(PROMPTS))]
    here, there = start(tiny, ids=ids), start(other, ids=ids)
    for i in range(8):
        tiny.engine.step()
        other.engine.step()
        if i == 4:
            start(other, [[5] * 300], SamplingParams(max_tokens=200), ["long"])
            other.engine.step()
            other.abort("long")
    assert run(tiny, here) == expected
    assert run(other, there) == other_expected
    assert tiny.contract().digest != other.contract().digest
    assert_idle(tiny)


@pytest.mark.parametrize("use", [pickle.dumps, copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"])
def test_an_llm_cannot_be_pickled_or_copied(use, tiny, expected):
    with pytest.raises(TypeError, match="cannot be pickled or copied"):
        use(tiny)
    assert run(tiny, start(tiny)) == expected


def test_outputs_and_parameters_can_be_pickled(tiny, seeded):
    """What workers send each other."""
    outputs = tiny.generate(PROMPTS, pickle.loads(pickle.dumps(SEEDED)))  # noqa: S301 - our own bytes
    assert bits(pickle.loads(pickle.dumps(outputs))) == bits(outputs) == seeded  # noqa: S301


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.generate([[1, 2]]),
        lambda llm: llm.score([[1, 2]], [[False, True]]),
        LLM.warm_up,
        lambda llm: llm.replay(None),
    ],
    ids=["generate", "score", "warm_up", "replay"],
)
def test_a_fork_is_refused_and_the_parent_goes_on(tiny, expected, call):
    requests = start(tiny)
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX and Python warn of the fork itself
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)  # were it not refused it might wait for ever, for threads that did not come along
            try:
                call(tiny)
                answer = "it worked"
            except Exception as error:
                answer = str(error)
            finally:
                os.write(writer, answer.encode())
                os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    assert f"this LLM belongs to process {os.getpid()}, of which this one is a fork" in answer
    assert run(tiny, requests) == expected


# -- compiled code on disk --------------------------------------------------------------------------------------------

ONE_TOKEN = """
from jaxengine import LLM, SamplingParams
llm = LLM("calc", progress=False, max_model_len=64, max_num_seqs=2, num_pages=8)
(output,) = llm.generate("1+1=", SamplingParams(max_tokens=2))
print(output.outputs[0].token_ids, output.outputs[0].token_logprobs.tobytes().hex())
"""


@pytest.mark.slow
def test_a_broken_compilation_cache_is_compiled_around(tmp_path):
    """JAX warns and compiles; the bits are the same."""

    def run_with_cache() -> subprocess.CompletedProcess:
        settings = dict(
            JAX_COMPILATION_CACHE_DIR=str(tmp_path),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.5",
            PYTHONWARNINGS="default",
        )
        return subprocess.run(
            [sys.executable, "-c", ONE_TOKEN], env=os.environ | settings, capture_output=True, text=True, check=True
        )

    first = run_with_cache()
    entries = [path for path in tmp_path.iterdir() if path.name.endswith("-cache")]
    assert any("prefill_step" in path.name for path in entries) and any("decode_step" in path.name for path in entries)
    for i, path in enumerate(entries):
        path.write_bytes(path.read_bytes()[: 100 * (i % 2)])  # cut off, or empty
    again = run_with_cache()
    assert again.stdout == first.stdout and "compilation cache" in again.stderr


# -- event loops and clocks -------------------------------------------------------------------------------------------


def test_generate_works_inside_a_running_event_loop(llm, seeded):
    """As in a notebook; and in threads that a loop waits for."""

    async def notebook():
        direct = bits(llm.generate(PROMPTS, SEEDED))
        calls = [asyncio.to_thread(llm.generate, PROMPTS, SEEDED) for _ in range(2)]
        return [direct, *map(bits, await asyncio.gather(*calls))]

    assert asyncio.run(notebook()) == [seeded] * 3
    assert_idle(llm)


def test_a_clock_that_jumps_changes_nothing(llm, expected, monkeypatch):
    """The wall clock goes back a year and forth a century at every look; nothing in the engine looks."""
    looks, jumps = [], itertools.cycle([0.0, 4e9, -3e7, 1.7e9])

    def jumping():
        looks.append(sys._getframe(1).f_globals.get("__name__", ""))
        return next(jumps)

    monkeypatch.setattr(time, "time", jumping)
    requests = start(llm)
    assert run(llm, requests) == expected
    assert bits(llm.generate(PROMPTS, PARAMS, key=jax.random.key(7))) == expected
    assert not [name for name in looks if name.split(".")[0] == "jaxengine"]
    assert answers(llm, requests) == expected
