"""Routes that stop, empty and wake the engine; they need the admin key."""

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxengine.server import body
from jaxengine.server.errors import ApiError, json_response, refusals
from jaxengine.server.protocol import AbortRequest, Anything
from jaxengine.server.service import Service

MODES = ("abort", "wait", "keep")
TRUE, FALSE = ("true", "1"), ("false", "0")


async def pause(service: Service, http: HttpRequest) -> Response:
    """No step begins until /resume. `mode` is what becomes of requests under way.

    "abort" ends them, "wait" lets them end, "keep" has them wait where they are. Cached prefixes go, unless
    `clear_cache` is false.
    """
    mode, clears = http.query_params.get("mode", "abort"), _flag(http, "clear_cache", True)
    if mode not in MODES:
        raise ApiError(400, f"mode must be one of {', '.join(MODES)}, got {mode!r:.40}", "mode")
    if mode == "wait" and not service.llm.is_paused:  # paused, they would never end
        async with service.drained():
            await service.engine.pause()
    else:
        await service.engine.pause()
    if mode == "abort":
        _abort(service, list(service.llm.engine.requests))
    if clears:
        await service.clear_prefix_cache()
    return json_response({"status": "paused"})


async def resume(service: Service, http: HttpRequest) -> Response:
    await service.engine.resume()
    return json_response({"status": "resumed"})


async def abort_requests(service: Service, http: HttpRequest) -> Response:
    """End requests by the ids that their answers bear, or all; they are answered with finish reason "abort"."""
    form = await body.read(http, AbortRequest, service.config.max_body_bytes)
    wanted = form.request_ids
    running = list(service.llm.engine.requests)
    chosen = running if wanted is None else [name for name in running if _is_named(name, wanted)]
    return json_response({"status": "aborted", "aborted": _abort(service, chosen)})


def _is_named(name: str, wanted: list[str]) -> bool:
    """Whether an engine's request is one of those; those of a call with several prompts bear its id and a number."""
    return name in wanted or name.rpartition("-")[0] in wanted


def _abort(service: Service, names: list[str]) -> int:
    for name in names:
        service.engine.abort(name)
    return len(names)


async def reset_prefix_cache(service: Service, http: HttpRequest) -> Response:
    await body.read(http, Anything, service.config.max_body_bytes)
    await service.clear_prefix_cache()
    return json_response({"success": True})


async def sleep(service: Service, http: HttpRequest) -> Response:
    """Give the pool's memory back; level 2 the weights' too."""
    level = http.query_params.get("level", "1")
    with refusals():
        await service.engine.sleep(int(level) if level.isdecimal() else -1)
    return json_response({"status": "sleeping"})


async def wake_up(service: Service, http: HttpRequest) -> Response:
    tags = http.query_params.getlist("tags") or None
    try:
        with refusals():
            await service.engine.wake_up(tags)
    except (RuntimeError, MemoryError) as error:
        raise ApiError(409, str(error)) from error
    return json_response({"status": "awake" if not service.llm.is_sleeping else "sleeping"})


def _flag(http: HttpRequest, name: str, default: bool) -> bool:
    given = http.query_params.get(name, str(default)).lower()
    if given not in TRUE + FALSE:
        raise ApiError(400, f"{name} must be true or false, got {given!r:.40}", name)
    return given in TRUE
