"""Runs the server until it is told to end."""

import gc
import sys

import uvicorn

from jaxengine.async_llm import AsyncLLM
from jaxengine.server.app import application
from jaxengine.server.settings import ServerConfig

SWITCH_SECONDS = 0.0002


def tune_interpreter() -> None:
    """To be called once, by a process that only serves, when its model is loaded.

    The engine's thread comes back from the device many times a step, and waits each time for what Python calls a switch
    interval where the event loop is at work. What lives by now stays, so that collecting garbage need not look at it.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.collect()
    gc.freeze()


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
