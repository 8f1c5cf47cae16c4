"""The ASGI application: routes, and what becomes of errors."""

import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from jaxengine.async_llm import AsyncLLM
from jaxengine.server import about, chat, completions, control, sglang, token_generation, tokens, weights
from jaxengine.server.errors import ApiError
from jaxengine.server.gate import Gate
from jaxengine.server.service import Service
from jaxengine.server.settings import ServerConfig

ROUTES = {
    "GET /health": about.health,
    "GET /liveness": about.health,
    "GET /v1/models": about.models,
    "GET /metrics": about.metrics,
    "GET /version": about.version,
    "GET /get_world_size": about.world_size,
    "GET /server_info": about.server_info,
    "GET /weight_info": about.weight_info,
    "GET /is_paused": about.is_paused,
    "GET /is_sleeping": about.is_sleeping,
    "POST /v1/completions": completions.completions,
    "POST /v1/chat/completions": chat.chat,
    "POST /inference/v1/generate": token_generation.generate,
    "POST /generate": sglang.generate,
    "POST /tokenize": tokens.tokenize,
    "POST /detokenize": tokens.detokenize,
    "POST /pause": control.pause,
    "POST /resume": control.resume,
    "POST /abort_requests": control.abort_requests,
    "POST /reset_prefix_cache": control.reset_prefix_cache,
    "POST /sleep": control.sleep,
    "POST /wake_up": control.wake_up,
    "POST /init_weight_transfer_engine": weights.init_weight_transfer,
    "POST /start_weight_update": weights.start_weight_update,
    "POST /update_weights": weights.update_weights,
    "POST /finish_weight_update": weights.finish_weight_update,
    "POST /update_weights_from_disk": sglang.update_weights_from_disk,
}
Handler = Callable[[Service, HttpRequest], Awaitable[Response]]
log = logging.getLogger("jaxengine.server")


def application(engine: AsyncLLM, config: ServerConfig) -> Starlette:
    """The application over an engine, which it closes when it ends."""
    service = Service(engine, config)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await engine.close()
        service.upload.drop()

    routes = []
    for line, handler in ROUTES.items():
        method, path = line.split()
        routes.append(Route(path, functools.partial(_answered, handler, service), methods=[method]))
    return Starlette(
        routes=routes,
        middleware=[Middleware(Gate, config=config)],
        exception_handlers={ApiError: _refused, HTTPException: _not_routed},
        lifespan=lifespan,
    )


async def _answered(handler: Handler, service: Service, http: HttpRequest) -> Response:
    """A route's answer. Of what nobody foresaw the client is told the kind alone: a message may hold addresses."""
    try:
        return await handler(service, http)
    except (ApiError, HTTPException):
        raise
    except ClientDisconnect as error:  # while its body was read
        raise ApiError(499, "the client went away") from error
    except Exception as error:
        log.exception("%s %s failed", http.method, http.url.path)
        raise ApiError(500, f"the server failed with {type(error).__name__}") from error


async def _refused(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _not_routed(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{http.method} {http.url.path:.200}: {error.detail}"
    return ApiError(error.status_code, message, code="no_route", headers=error.headers).response()
