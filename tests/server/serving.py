"""A server on loopback, in a thread of the tests' process."""

import contextlib
import threading
import time
from collections.abc import Iterator

import httpx

from jaxengine import LLM, AsyncLLM
from jaxengine.server.serve import server
from jaxengine.server.settings import ServerConfig

KEY, ADMIN = "a key", "an admin's key"


class Running:
    """A server that runs in a thread, and clients of it with one key, the admin's or none."""

    def __init__(self, llm: LLM, address: str) -> None:
        self.llm, self.address = llm, address
        self.user, self.admin, self.nobody = (self._client(key) for key in (KEY, ADMIN, None))

    def _client(self, key: str | None) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.address, headers=headers, timeout=120)

    def close(self) -> None:
        for client in (self.user, self.admin, self.nobody):
            client.close()

    def wait_until(self, holds) -> None:
        end = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < end, "it did not come about in a minute"
            time.sleep(0.005)

    def is_idle(self) -> bool:
        scheduler = self.llm.engine.scheduler
        return not (self.llm.engine.requests or scheduler.running or len(scheduler.waiting))


@contextlib.contextmanager
def running(llm: LLM, **settings) -> Iterator[Running]:
    config = ServerConfig(**{"model_name": "calc", "port": 0, "drain_seconds": 5} | settings)
    served = server(AsyncLLM.over(llm), config)
    thread = threading.Thread(target=served.run)
    thread.start()
    try:
        while not served.started:
            assert thread.is_alive()
            time.sleep(0.01)
        found = Running(llm, f"http://127.0.0.1:{served.servers[0].sockets[0].getsockname()[1]}")
        yield found
        found.close()
    finally:
        served.should_exit = True
        thread.join()
