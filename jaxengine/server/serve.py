"""Runs the server until it is told to end."""

import uvicorn

from jaxengine.async_llm import AsyncLLM
from jaxengine.server.app import application
from jaxengine.server.settings import ServerConfig


def server(engine: AsyncLLM, config: ServerConfig) -> uvicorn.Server:
    """A server that is not running yet.

    At SIGTERM it takes no more requests, lets those that are under way end for `drain_seconds`, aborts the rest and
    closes the engine.
    """
    return uvicorn.Server(
        uvicorn.Config(
            application(engine, config),
            host=config.host,
            port=config.port,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",  # no route speaks it, so the gate sees such a request as any other
            timeout_graceful_shutdown=config.drain_seconds,
        )
    )
