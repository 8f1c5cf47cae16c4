"""AsyncLLM: many requests at once, with the bits of LLM.generate; what leaves is aborted, what fails fails alone."""

import asyncio
import contextlib
import dataclasses
import itertools
import random
import time

import jax
import pytest
from conftest import bits, make_llm

from jaxengine import AsyncLLM, SamplingParams
from jaxengine.async_llm import QueueFull
from jaxengine.base.keys import folded, key_data, seeded
from jaxengine.engine.deltas import DeltaReader

PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [12] * 40]
LONG = SamplingParams(max_tokens=400, ignore_eos=True, seed=1)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 120))


@pytest.fixture(scope="module")
def llm(tiny_with_text):
    return tiny_with_text


def is_empty(llm) -> bool:
    scheduler = llm.engine.scheduler
    scheduler.page_pool.check_integrity([])
    return not (llm.engine.requests or scheduler.running or len(scheduler.waiting))


def various(count: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts and parameters of many kinds, each with a seed of its own."""
    draw = random.Random(0)
    return [
        (
            [draw.randrange(250) for _ in range(draw.randrange(1, 60))],
            SamplingParams(
                n=draw.choice([1, 1, 2]),
                temperature=draw.choice([0.0, 0.7, 1.0]),
                top_p=draw.choice([1.0, 0.9]),
                logprobs=draw.choice([None, 2]),
                max_tokens=draw.randrange(1, 12),
                seed=seed,
            ),
        )
        for seed in range(count)
    ]


def test_a_hundred_at_once_have_the_bits_of_generate(llm):
    prompts, params = zip(*various(100), strict=True)

    async def one(engine, prompt, sampling):
        async for delta in engine.stream(prompt, sampling):
            last = delta
        return last.output

    async def all_of_them():
        async with AsyncLLM.over(llm) as engine:
            return await asyncio.gather(*map(one, [engine] * 100, prompts, params))

    assert bits(run(all_of_them())) == bits(llm.generate(list(prompts), list(params)))
    assert is_empty(llm)


def test_a_call_of_many_prompts_has_the_keys_of_generate(llm):
    params, key = SamplingParams(n=2, max_tokens=5), jax.random.key(3)

    async def call():
        async with AsyncLLM.over(llm) as engine:
            return await engine.generate(PROMPTS, params, key=key)

    assert bits(run(call())) == bits(llm.generate(PROMPTS, params, key=key))


def test_deltas_joined_are_the_output(llm):
    params = SamplingParams(max_tokens=20, ignore_eos=True, seed=4, logprobs=1)

    async def call():
        async with AsyncLLM.over(llm) as engine:
            return [delta async for delta in engine.stream("12+30=", params)]

    deltas = run(call())
    (whole,) = deltas[-1].output.outputs
    assert len(deltas) > 5
    assert [token for delta in deltas for new in delta.outputs for token in new.token_ids] == whole.token_ids
    assert "".join(new.text for delta in deltas for new in delta.outputs) == whole.text


def test_what_comes_while_the_caller_is_busy_is_one_delta(llm):
    """Of each sample: the loop is blocked until all is drawn."""
    params = SamplingParams(n=2, max_tokens=30, ignore_eos=True, seed=4, logprobs=1)

    async def call():
        async with AsyncLLM.over(llm) as engine:
            stream = engine.stream("12+30=", params)
            first = await anext(stream)
            while llm.engine.requests:
                time.sleep(0.001)
            return [first, *[delta async for delta in stream]]

    first, *others = run(call())
    assert 1 <= len(others) <= 2 and others[-1].finished  # two, where the end was not sent yet
    for whole in others[-1].output.outputs:
        own = [new for delta in (first, *others) for new in delta.outputs if new.index == whole.index]
        assert [token for new in own for token in new.token_ids] == whole.token_ids
        assert "".join(new.text for new in own) == whole.text
        assert [entry for new in own for entry in new.logprobs] == whole.logprobs
    assert is_empty(llm)


def test_a_request_that_waits_costs_a_step_nothing(llm, monkeypatch):
    """Each is read once when it is queued, and else where it gained something."""
    found = []
    read = DeltaReader.read
    monkeypatch.setattr(DeltaReader, "read", lambda self: found.append(read(self)) or found[-1])
    prompts = [PROMPTS[0]] * 100

    async def call():
        async with AsyncLLM.over(llm) as engine:
            await engine.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True, seed=1))

    run(call())
    assert len(prompts) > 3 * llm.engine_config.max_num_seqs
    assert sum(not deltas for deltas in found) <= len(prompts)
    assert len(found) <= len(prompts) * (1 + 4)


def test_a_cancelled_task_and_a_loop_that_is_left_abort(llm):
    async def call():
        async with AsyncLLM.over(llm) as engine:
            stream = engine.stream(PROMPTS[0], LONG)
            await anext(stream)
            task = asyncio.create_task(engine.generate(PROMPTS, LONG))
            while len(llm.engine.requests) < 4:  # queued by a thread, which may come a step later
                await anext(stream)
            task.cancel()
            await stream.aclose()
            with pytest.raises(asyncio.CancelledError):
                await task
            (other,) = await engine.generate([PROMPTS[1]], SamplingParams(max_tokens=3, seed=5))
            return other

    assert bits([run(call())]) == bits(llm.generate([PROMPTS[1]], SamplingParams(max_tokens=3, seed=5)))
    assert is_empty(llm)


def test_a_task_cancelled_before_it_was_queued_leaves_nothing(llm):
    async def call():
        async with AsyncLLM.over(llm) as engine:
            with llm.session.runner.alone():  # the thread cannot queue it yet
                task = asyncio.create_task(engine.generate(PROMPTS, LONG))
                await asyncio.sleep(0)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await engine.generate([PROMPTS[1]], SamplingParams(max_tokens=1))
            assert is_empty(llm)

    run(call())


def test_what_goes_wrong_fails_alone(llm):
    async def call():
        async with AsyncLLM.over(llm) as engine:
            good = asyncio.create_task(engine.generate(PROMPTS, SamplingParams(max_tokens=8, seed=6)))
            with pytest.raises(ValueError, match="token id 99999"):
                await engine.generate([[99999]])
            with pytest.raises(ValueError, match="in use"):
                await engine.generate(PROMPTS[:2], LONG, request_ids=["one", "one"])
            return await good

    assert bits(run(call())) == bits(llm.generate(PROMPTS, SamplingParams(max_tokens=8, seed=6)))
    assert is_empty(llm)


def test_a_full_queue_refuses_the_whole_call(llm, monkeypatch):
    async def call():
        async with AsyncLLM.over(llm) as engine:
            stream = engine.stream(PROMPTS[0], LONG)
            await anext(stream)
            with pytest.raises(QueueFull, match="max_waiting"):
                await engine.generate(PROMPTS, LONG.replace(n=2))
            assert len(llm.engine.requests) == 1
            await stream.aclose()

    monkeypatch.setattr(llm.engine, "engine_config", dataclasses.replace(llm.engine_config, max_waiting=5))
    run(call())
    assert is_empty(llm)


def test_a_call_that_is_refused_takes_no_key(llm, monkeypatch):
    """Come again, it draws what it would have drawn; a call with seeds takes one, as it always did."""
    prompts, params = PROMPTS[:2], SamplingParams(max_tokens=4)

    def keys(outputs) -> list[tuple[int, int]]:
        return [output.outputs[0].coordinate.key for output in outputs]

    async def call():
        async with AsyncLLM.over(llm) as engine:
            (first,) = await engine.generate(PROMPTS[:1], params)
            with monkeypatch.context() as short:
                short.setattr(llm.engine, "engine_config", dataclasses.replace(llm.engine_config, max_waiting=1))
                for _ in range(2):
                    with pytest.raises(QueueFull):
                        await engine.generate(prompts, params)
                with pytest.raises(QueueFull):
                    llm.generate(prompts, params)
            with pytest.raises(ValueError, match="in use"):
                await engine.generate(prompts, params, request_ids=["one", "one"])
            await engine.generate(prompts, params.replace(seed=1))
            return keys([first]), keys(await engine.generate(prompts, params))

    (first,), last = run(call())
    number = next(i for i in itertools.count() if key_data(folded(seeded(0), i)) == first)
    assert last == [key_data(folded(seeded(0), number + 2))] * 2
    assert is_empty(llm)


def test_an_error_of_a_step_reaches_all_and_the_next_call_goes(llm, monkeypatch):
    step = llm.engine.step

    def broken():
        monkeypatch.setattr(llm.engine, "step", step)
        raise ArithmeticError("injected")

    async def call():
        async with AsyncLLM.over(llm) as engine:
            monkeypatch.setattr(llm.engine, "step", broken)
            tasks = [asyncio.create_task(engine.generate([prompt], LONG)) for prompt in PROMPTS]
            found = await asyncio.gather(*tasks, return_exceptions=True)
            first = [error for error in found if isinstance(error, ArithmeticError)]
            assert first and isinstance(engine.error, ArithmeticError | None)
            await engine.generate(PROMPTS, SamplingParams(max_tokens=2))
            assert engine.error is None

    monkeypatch.setattr("jaxengine.engine.runner.WAKE", 0.001)
    run(call())
    assert is_empty(llm)


def test_a_thread_that_dies_fails_every_call_at_once(llm, monkeypatch):
    def dies(self):
        raise ArithmeticError("injected")

    async def call():
        engine = AsyncLLM.over(llm)
        stream = engine.stream(PROMPTS[0], LONG)
        await anext(stream)
        monkeypatch.setattr("jaxengine.engine.stepping_thread.SteppingThread._turn", dies)
        with pytest.raises(ArithmeticError):
            async for _ in stream:
                pass
        with pytest.raises(RuntimeError, match="injected"):
            await engine.generate(PROMPTS)
        assert isinstance(engine.error, ArithmeticError)
        await engine.close()

    run(call())
    assert is_empty(llm)


def test_paused_requests_wait_and_can_be_aborted(llm):
    async def call():
        async with AsyncLLM.over(llm) as engine:
            await engine.pause()
            waiting = asyncio.create_task(engine.generate([PROMPTS[0]], SamplingParams(max_tokens=4, seed=7)))
            aborted = asyncio.create_task(engine.generate([PROMPTS[1]], LONG, request_ids=["mine"]))
            while "mine" not in llm.engine.requests:
                await asyncio.sleep(0)
            engine.abort("mine")
            (ended,) = await aborted
            assert ended.outputs[0].finish_reason == "abort" and not waiting.done()
            await engine.resume()
            return await waiting

    assert bits(run(call())) == bits(llm.generate([PROMPTS[0]], SamplingParams(max_tokens=4, seed=7)))


def test_close_fails_what_is_under_way_and_ends_the_thread(tiny):
    llm = make_llm(tiny.config, tiny.params)

    async def call():
        engine = AsyncLLM.over(llm)
        task = asyncio.create_task(engine.generate(PROMPTS, LONG))
        await anext(engine.stream(PROMPTS[0], LONG))
        await engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            await task
        with pytest.raises(RuntimeError, match="closed"):
            await engine.generate(PROMPTS)
        await engine.close()

    run(call())
    assert is_empty(llm)
    llm.close()
