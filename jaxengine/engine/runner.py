"""Several threads over one engine: who holds the lock steps for all, and the others' requests ride along."""

import collections
import contextlib
import os
import threading
from collections.abc import Callable, Iterator

from jaxengine.engine.engine import Engine
from jaxengine.host.sample import Request, Status

WAKE = 0.05  # seconds after which who waits for `resume` looks whether its requests were aborted meanwhile


class Runner:
    """Queues requests and steps the engine until they have ended. Belongs to the process that made it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.lock = threading.Lock()  # one step at a time
        self._left: collections.deque[Request] = collections.deque()  # aborted, but the engine was at work: see leave
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

    def run(self, requests: list[Request], prepare: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Queue a call's requests, all or none, and step until they have ended; `prepare` runs as they are queued."""
        left = collections.deque(requests)

        def all_ended() -> bool:
            while left and ended(left[0]):
                left.popleft()  # looked at once, however many there are
            return not left

        try:
            with self.lock:
                self._end_left()  # their ids are free again
                for request in requests:
                    self.engine.add(request)
                prepare()
            while not all_ended():
                if not self._wait():
                    continue
                with self.lock:
                    if self._going.is_set() and not all_ended():
                        self.engine.step()
                self.sweep()
                yield
        finally:
            self.leave(requests)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody steps or adds inside the block."""
        self.check_process()
        with self.lock:
            yield
        self.sweep()

    # -- pause -----------------------------------------------------------------------------------------------------------------

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

    # -- leaving ---------------------------------------------------------------------------------------------------------------

    def leave(self, requests: list[Request]) -> None:
        """Abort those that the engine still has; where it is at work, whoever works with it does so afterwards.

        Waiting for it could be for ever: a stream may be collected as garbage, or a signal be handled, amid this very thread's step.
        """
        self._left.extend(request for request in requests if self.engine.requests.get(request.request_id) is request)
        self.sweep()

    def sweep(self) -> None:
        """To be called behind each use of the lock: somebody may have left in the meantime."""
        while self._left and not self.lock.locked():
            with self.lock:
                self._end_left()

    def _end_left(self) -> None:
        while self._left:
            request = self._left[0]
            if (
                self.engine.requests.get(request.request_id) is request
            ):  # else it ended meanwhile, and its id may be another's
                self.engine.abort(request.request_id)
            self._left.popleft()


def ended(request: Request) -> bool:
    return all(sample.status is Status.FINISHED for sample in request.samples)
