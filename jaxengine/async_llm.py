"""AsyncLLM: an LLM for asyncio, many requests at once, for agent loops and the server."""

import asyncio
import contextlib
import os
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, NoReturn, TypeVar

from jaxengine.engine.engine import QueueFull
from jaxengine.engine.stepping_thread import News, SteppingThread
from jaxengine.host.prompts import conversations_of, prompts_of
from jaxengine.host.sample import Request
from jaxengine.llm import LLM
from jaxengine.outputs import RequestDelta, RequestOutput, RequestOutputs, joined
from jaxengine.sampling_params import SamplingParams

__all__ = ["AsyncLLM", "QueueFull"]
T = TypeVar("T")


class AsyncLLM:
    """An LLM whose engine steps in a thread of its own, so that an event loop goes on while tokens are drawn.

    Takes what LLM takes; `AsyncLLM.over(llm)` has one that is there already, which may be used beside it. Requests of
    all tasks run in one batch, and each draws what `LLM.generate` draws for the same key, prompt and parameters.

        async with AsyncLLM("calc") as engine:
            async for delta in engine.stream("12+30=", SamplingParams(max_tokens=16, seed=1)):
                print(delta.outputs[0].text, end="")

    A task that is cancelled and a loop that is left abort their requests. What goes wrong with a request is raised
    where it is awaited; where the engine's thread ends, every call raises RuntimeError.
    """

    def __init__(self, model: str | os.PathLike[str], **keywords: Any) -> None:
        self._start(LLM(model, **keywords), owns_llm=True)

    @classmethod
    def over(cls, llm: LLM) -> "AsyncLLM":
        """An AsyncLLM over an LLM; closing it leaves the LLM open."""
        self = cls.__new__(cls)
        self._start(llm, owns_llm=False)
        return self

    def _start(self, llm: LLM, owns_llm: bool) -> None:
        self.llm, self._owns_llm = llm, owns_llm
        self._thread = SteppingThread(llm.engine, llm.session.runner)
        weakref.finalize(self, self._thread.stop)  # the thread knows the engine, not this object

    # -- generation ---------------------------------------------------------------------------------------------------

    async def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        key: Any = None,
        request_ids: Sequence[str] | None = None,
        priority: int | Sequence[int] = 0,
    ) -> RequestOutputs:
        """As LLM.generate, and with the same bits."""
        requests = self.llm.admitted(prompts_of(prompts), sampling_params, key, request_ids, priority=priority)
        return await self.completed(requests)

    async def chat(
        self,
        messages: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        key: Any = None,
        **options: Any,
    ) -> RequestOutputs:
        """As LLM.chat; `options` are those of `Tokenizer.render_chat`. Templates run beside the event loop."""
        prompts = [await asyncio.to_thread(self.llm.chat_prompt, each, options) for each in conversations_of(messages)]
        return await self.completed(self.llm.admitted(prompts, sampling_params, key, None))

    async def stream(
        self,
        prompt: Any,
        sampling_params: SamplingParams | None = None,
        *,
        key: Any = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestDelta, None]:
        """What one prompt's samples gained, as in LLM.stream; the last delta has the whole RequestOutput."""
        prompts = prompts_of(prompt)
        if len(prompts) != 1:
            raise ValueError(f"stream takes one prompt, got {len(prompts)}: stream each of them, or use generate")
        ids = None if request_id is None else [request_id]
        requests = self.llm.admitted(prompts, sampling_params, key, ids, priority=priority)
        async with contextlib.aclosing(self.deltas(requests)) as deltas:
            async for _, delta in deltas:
                yield delta

    async def completed(self, requests: list[Request]) -> RequestOutputs:
        """The outputs of requests that LLM.admitted gave, in their order."""
        outputs: list[RequestOutput | None] = [None] * len(requests)
        async with contextlib.aclosing(self.deltas(requests)) as deltas:
            async for index, delta in deltas:
                outputs[index] = delta.output or outputs[index]
        return RequestOutputs(output for output in outputs if output is not None)

    async def deltas(self, requests: list[Request]) -> AsyncGenerator[tuple[int, RequestDelta], None]:
        """(index, what it gained) of requests that LLM.admitted gave, as their tokens come; queued all or none.

        What came while the caller was busy is one delta of each request. Raises QueueFull where there is no room for
        them. Leaving the loop aborts those that go on.
        """
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[list[News] | Exception]()
        call, num_open = self._thread.submit(requests, _sender(loop, arrived)), len(requests)
        try:
            while num_open:
                for index, new, finished in await _waiting_in(arrived):
                    num_open -= finished
                    request, render = requests[index], self.llm.session.output
                    output = await asyncio.to_thread(render, request) if finished else None  # it may hash new weights
                    yield index, RequestDelta(request.request_id, new, finished, output)
        finally:
            if num_open:
                self._thread.leave(call)

    def abort(self, request_id: str) -> None:
        """As LLM.abort."""
        self.llm.abort(request_id)

    @property
    def num_waiting(self) -> int:
        """Samples that wait for a slot."""
        return self.llm.engine.occupancy().waiting

    @property
    def error(self) -> Exception | None:
        """What went wrong in the last step, or ended the thread; None where all is well."""
        return self._thread.last_error or self._thread.ended_by

    # -- what the LLM does under its lock, beside the event loop ------------------------------------------------------

    async def update_params(self, params: Any, **how: Any) -> int:
        """As LLM.update_params."""
        return await asyncio.to_thread(self.llm.update_params, params, **how)

    async def score(self, tokens: Any, mask: Any, sampling_params: Any = None, **how: Any) -> Any:
        """As LLM.score."""
        return await asyncio.to_thread(self.llm.score, tokens, mask, sampling_params, **how)

    async def pause(self) -> None:
        """As LLM.pause."""
        await asyncio.to_thread(self.llm.pause)

    async def resume(self) -> None:
        """As LLM.resume."""
        await asyncio.to_thread(self.llm.resume)

    async def sleep(self, level: int = 1) -> None:
        """As LLM.sleep."""
        await asyncio.to_thread(self.llm.sleep, level)

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """As LLM.wake_up."""
        await asyncio.to_thread(self.llm.wake_up, tags)

    async def close(self) -> None:
        """End every request (their tasks get RuntimeError) and the thread; an LLM of its own is closed. Idempotent."""
        self._thread.stop()
        await asyncio.to_thread(self._thread.join)
        if self._owns_llm:
            await asyncio.to_thread(self.llm.close)

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an AsyncLLM holds device memory and cannot be pickled or copied: build one in each process")


async def _waiting_in(arrived: asyncio.Queue[list[News] | Exception]) -> list[News]:
    """All news that have come, at least one, those of a request joined. Raises an exception that is next."""
    found: list[News] = []
    news = await arrived.get()
    while True:
        if isinstance(news, Exception):
            raise news
        found += news
        if arrived.empty():
            return joined(found)
        news = arrived.get_nowait()


def _sender(loop: asyncio.AbstractEventLoop, arrived: asyncio.Queue[T]) -> Callable[[T], None]:
    """Puts news on a queue of the loop, from another thread; nothing where the loop was closed meanwhile."""

    def deliver(news: T) -> None:
        try:
            loop.call_soon_threadsafe(arrived.put_nowait, news)
        except RuntimeError:
            if not loop.is_closed():
                raise

    return deliver
