"""Requests of the server on their way through the engine: checked, run, counted, and aborted where a client leaves."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, NamedTuple, TypeVar

from starlette.requests import Request as HttpRequest

from jaxengine.async_llm import AsyncLLM, QueueFull
from jaxengine.host.sample import Request
from jaxengine.outputs import RequestDelta, RequestOutput
from jaxengine.sampling_params import SamplingParams
from jaxengine.server.errors import ApiError, refusals, too_many
from jaxengine.server.metrics import Metrics
from jaxengine.server.settings import ServerConfig
from jaxengine.server.weight_upload import WeightUpload
from jaxengine.text.tool_calls import form_of_template

T = TypeVar("T")


class Call(NamedTuple):
    """One HTTP request's requests to the engine, and the id that its answer bears."""

    name: str
    created: int
    requests: list[Request]
    sampling: SamplingParams

    def choice(self, prompt: int, sample: int) -> int:
        """The index of a choice: prompts one after the other, n of each."""
        return prompt * self.sampling.n + sample


class Service:
    """The engine as routes use it."""

    def __init__(self, engine: AsyncLLM, config: ServerConfig) -> None:
        self.engine, self.llm, self.config = engine, engine.llm, config
        self.metrics = Metrics(engine.llm, config.model_name)
        self.started = int(time.time())
        self.upload = WeightUpload(engine, config.weights_root)
        self.weight_label: str | None = None  # what the last weight update called itself
        self._admits = asyncio.Event()
        self._admits.set()
        self._num_open, self._idle = 0, asyncio.Event()
        self._idle.set()

    @property
    def max_model_len(self) -> int:
        return self.llm.engine_config.max_model_len

    @property
    def weights_name(self) -> str:
        """What the last update called its weights, else their version."""
        return self.weight_label or str(self.llm.weights_version)

    @property
    def tool_parser(self) -> str:
        """The name of the form in which the model calls tools."""
        chosen = self.config.tool_call_parser
        return form_of_template(self._template_has) if chosen == "auto" else chosen

    @property
    def tells_thoughts(self) -> bool:
        """Whether what the model thinks is told apart from what it says."""
        wanted = self.config.reasoning_parser
        return self._template_has("</think>") if wanted == "auto" else wanted == "think"

    def _template_has(self, text: str) -> bool:
        return self.llm.tokenizer is not None and self.llm.tokenizer.template_has(text)

    def check_model(self, model: str | None) -> None:
        """Raises ApiError for another model than the one that is served."""
        if model is not None and model != self.config.model_name:
            message = f"the model {model!r:.80} does not exist here: this server has {self.config.model_name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def sampling_params(self, fields: dict[str, Any]) -> SamplingParams:
        """The SamplingParams of a body's fields; null ones have their defaults. Raises ApiError."""
        given = {name: value for name, value in fields.items() if value is not None}
        if self.llm.tokenizer is None and not given.get("stop"):
            given["detokenize"] = False
        with refusals():
            return SamplingParams(**given)

    def check_room(self, num_prompts: int, n: int) -> None:
        """Raises ApiError where a call asks for more samples than one may, or than the queue has room for."""
        count = num_prompts * n
        if count > self.config.max_samples:
            raise ApiError(400, f"{num_prompts} prompts of n={n} are more than {self.config.max_samples} samples", "n")
        waiting, most = self.engine.num_waiting, self.llm.engine_config.max_waiting
        if waiting + count > most:
            raise too_many(f"{waiting} samples wait, at most {most} may: no room for {count} more")

    async def call(
        self,
        kind: str,
        prompts: list[Any],
        sampling: SamplingParams,
        request_id: str | None,
        priority: int | None = None,
    ) -> Call:
        """A call's requests, checked beside the event loop: a long text takes a while to become tokens.

        Without a seed the call draws a key of its own, which coordinates tell; prompt and sample index are folded in.
        """
        self.check_room(len(prompts), sampling.n)
        name = request_id or f"{kind}-{secrets.token_hex(16)}"
        ids = [name] if len(prompts) == 1 else [f"{name}-{index}" for index in range(len(prompts))]
        key = (secrets.randbits(32), secrets.randbits(32))
        each = [sampling] * len(prompts)
        try:
            with refusals():
                admit = self.llm.session.requests
                requests = await asyncio.to_thread(admit, prompts, each, key, ids, priority=priority or 0)
        except RuntimeError as error:  # closed
            raise ApiError(503, str(error)) from error
        return Call(name, int(time.time()), requests, sampling)

    async def deltas(self, call: Call) -> AsyncGenerator[tuple[int, RequestDelta], None]:
        """(index of the prompt, what it gained). Raises ApiError where the engine refuses or fails."""
        await self._admits.wait()
        clock = self.metrics.clock(len(call.requests))
        self._num_open += 1
        self._idle.clear()
        try:
            async with contextlib.aclosing(self.engine.deltas(call.requests)) as deltas:
                async for index, delta in deltas:
                    clock.saw(index, delta)
                    if delta.output is not None:
                        _raise_error_of(delta.output)
                    yield index, delta
        except QueueFull as error:
            raise too_many(str(error)) from error
        except ValueError as error:  # an id in use
            raise ApiError(409, str(error), "request_id") from error
        except RuntimeError as error:  # asleep, closed, or the engine's thread has ended
            raise ApiError(503, str(error)) from error
        finally:
            self._num_open -= 1
            if not self._num_open:
                self._idle.set()

    async def outputs(self, call: Call, http: HttpRequest) -> list[RequestOutput]:
        """The whole outputs, in the order of the prompts; a client that leaves meanwhile aborts them."""
        return await until_gone(http, self._outputs(call))

    async def _outputs(self, call: Call) -> list[RequestOutput]:
        outputs: dict[int, RequestOutput] = {}
        async with contextlib.aclosing(self.deltas(call)) as deltas:
            async for index, delta in deltas:
                if delta.output is not None:
                    outputs[index] = delta.output
        return [outputs[index] for index in range(len(call.requests))]

    async def clear_prefix_cache(self) -> None:
        """Forget every cached prefix, between two steps."""
        await asyncio.to_thread(self.llm.session.clear_prefix_cache)

    @contextlib.asynccontextmanager
    async def drained(self) -> AsyncGenerator[None, None]:
        """No call is under way inside the block, and new ones wait for its end."""
        self._admits.clear()
        try:
            await self._idle.wait()
            yield
        finally:
            self._admits.set()


def _raise_error_of(output: RequestOutput) -> None:
    for sample in output.outputs:
        if sample.finish_reason == "error":
            raise ApiError(500, f"sample {sample.index} failed: {sample.stop_reason}", code="sample_failed")


async def until_gone(http: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The work's result. Where the client goes away first the work is cancelled, and what is answered no one reads."""
    working, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(http))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "the client went away")
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
