"""Server-sent events: what a call gains, as it comes."""

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse

from jaxengine.outputs import RequestDelta, RequestOutput
from jaxengine.server.errors import ApiError, json_text
from jaxengine.server.service import Call, Service, until_gone

Chunks = Callable[[int, RequestDelta], Iterable[dict[str, Any]]]
log = logging.getLogger("jaxengine.server")
DONE = "data: [DONE]\n\n"


async def stream(
    service: Service, call: Call, http: HttpRequest, chunks: Chunks, last: Callable[[list[RequestOutput]], Any]
) -> StreamingResponse:
    """An answer of events: `chunks` of each delta, then `last` of the outputs unless that is None, then [DONE].

    What the engine refuses is raised here, with a status of its own; what fails later is an event.
    """
    deltas = service.deltas(call)
    try:
        first = await until_gone(http, _next(deltas))
    except BaseException:
        await deltas.aclose()
        raise
    events = _events(first, deltas, chunks, last)
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def _next(deltas: AsyncGenerator[tuple[int, RequestDelta], None]) -> tuple[int, RequestDelta]:
    return await anext(deltas)


async def _events(
    first: tuple[int, RequestDelta],
    deltas: AsyncGenerator[tuple[int, RequestDelta], None],
    chunks: Chunks,
    last: Callable[[list[RequestOutput]], Any],
) -> AsyncIterator[str]:
    outputs: dict[int, RequestOutput] = {}
    try:
        async with contextlib.aclosing(deltas):
            async for index, delta in _chained(first, deltas):
                if delta.output is not None:
                    outputs[index] = delta.output
                for chunk in chunks(index, delta):
                    yield _event(chunk)
        end = last([outputs[index] for index in sorted(outputs)])
        if end is not None:
            yield _event(end)
    except ApiError as error:
        yield _event(error.body())
    except Exception as error:  # the status is sent already; a client that reads on must not wait
        log.exception("a stream failed")
        yield _event(ApiError(500, f"the server failed with {type(error).__name__}").body())
    yield DONE


async def _chained(
    first: tuple[int, RequestDelta], deltas: AsyncGenerator[tuple[int, RequestDelta], None]
) -> AsyncIterator[tuple[int, RequestDelta]]:
    yield first
    async for each in deltas:
        yield each


def _event(value: Any) -> str:
    return f"data: {json_text(value)}\n\n"
