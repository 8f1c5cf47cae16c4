"""Several threads over one engine: the thread that holds the lock steps for all, and the others' requests ride along."""

import collections
import contextlib
import os
import threading
from collections.abc import Iterator

from jaxengine.engine.contract_digest import Contracts
from jaxengine.engine.engine import Engine
from jaxengine.engine.weights import check_alive
from jaxengine.host.sample import Request

WAKE = 0.05  # seconds after which a call that waits for `resume` looks whether its requests were aborted meanwhile


class Runner:
    """Queues requests and steps the engine until they have ended. Belongs to the process that made it."""

    def __init__(self, engine: Engine, contracts: Contracts) -> None:
        self.engine, self.contracts = engine, contracts
        self.lock = threading.Lock()  # one step at a time
        self._to_abort: collections.deque[Request] = (
            collections.deque()
        )  # while the engine was at work: see abort_later
        self._process = os.getpid()
        self._going = threading.Event()
        self._going.set()
        self._paused_by: threading.Thread | None = None

    def check_process(self) -> None:
        """Raises RuntimeError in a fork."""
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this LLM belongs to process {self._process}, of which this one is a fork: its device does not live on "
                "here. Build an LLM in each process, and start processes with multiprocessing's 'spawn'"
            )

    def run(self, requests: list[Request], *, with_text: bool = False) -> Iterator[None]:
        """Queue a call's requests, all or none, and step until they have ended. Holds the lock while it queues and steps.

        The contract is found as they are queued, before the weights can change. `with_text` as in Engine.add.
        """
        remaining = collections.deque(requests)
        try:
            with self.lock:
                self._abort_now()  # their ids are free again
                for request in requests:
                    self.engine.add(request, with_text=with_text)
                check_alive(self.engine.params)
                self.contracts.current()
            while not _all_ended(remaining):
                if not self._wait():
                    continue
                with self.lock:
                    if self._going.is_set() and not _all_ended(remaining):
                        self.engine.step()
                self.sweep()
                yield
        finally:
            self.abort_later(requests)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread steps or adds inside the block. Holds the lock."""
        self.check_process()
        with self.lock:
            yield
        self.sweep()

    # -- pause --------------------------------------------------------------------------------------------------------

    @property
    def is_paused(self) -> bool:
        return not self._going.is_set()

    def pause(self) -> None:
        """No step begins until `resume`; idempotent. A step that runs is waited for."""
        self._paused_by = threading.current_thread()
        self._going.clear()
        with self.alone():
            pass

    def resume(self) -> None:
        """Idempotent."""
        self._going.set()

    def _wait(self) -> bool:
        """Wait while paused; True where the engine goes. Raises where the thread that would wait is the one that has to resume."""
        if self._going.is_set():
            return True
        if self._paused_by is threading.current_thread():
            raise RuntimeError(
                "this LLM was paused by this very thread, which would wait for itself: call resume() first"
            )
        return self._going.wait(WAKE)

    # -- aborting -----------------------------------------------------------------------------------------------------

    def abort_later(self, requests: list[Request]) -> None:
        """Abort those that the engine still has; while it is at work, the thread that works with it does so afterwards.

        Waiting for the lock could be for ever: a stream may be collected as garbage, or a signal be handled, during this
        very thread's step.
        """
        held = self.engine.requests
        self._to_abort.extend(request for request in requests if held.get(request.request_id) is request)
        self.sweep()

    def sweep(self) -> None:
        """To be called after each use of the lock: requests may have been given to `abort_later` in the meantime."""
        while self._to_abort and not self.lock.locked():
            with self.lock:
                self._abort_now()

    def _abort_now(self) -> None:
        while self._to_abort:
            request = self._to_abort[0]
            if self.engine.requests.get(request.request_id) is request:  # else it ended, and its id may be another's
                self.engine.abort(request.request_id)
            self._to_abort.popleft()


def _all_ended(remaining: collections.deque[Request]) -> bool:
    """Whether all have ended; those that have are taken out, so that each is looked at once, however many there are."""
    while remaining and remaining[0].is_finished:
        remaining.popleft()
    return not remaining
