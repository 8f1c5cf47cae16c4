"""Several threads over one engine.

The thread that holds the lock steps for all, and the others' requests ride along.
"""

import collections
import contextlib
import os
import threading
from collections.abc import Iterator

from jaxengine.base.keys import CallKeys
from jaxengine.engine.contract_digest import Contracts
from jaxengine.engine.engine import Engine
from jaxengine.engine.replicas import Replicas
from jaxengine.engine.weights import check_alive
from jaxengine.host.sample import Request

WAKE = 0.05  # seconds after which a call that waits for `resume` looks whether its requests were aborted meanwhile


class Runner:
    """Queues requests and steps the engine until they have ended. Belongs to the process that made it."""

    def __init__(self, engine: Engine | Replicas, contracts: Contracts, call_keys: CallKeys | None = None) -> None:
        """`call_keys` are for calls that bring no key."""
        self.engine, self.contracts, self._call_keys = engine, contracts, call_keys
        self.lock = threading.Lock()  # one step at a time
        self._to_abort: collections.deque[Request] = (
            collections.deque()
        )  # while the engine was at work: see abort_later
        self._process = os.getpid()
        self._changed = threading.Condition()  # guards what follows; notified where one of them ends
        self._paused_by: threading.Thread | None = None
        self._asleep_by: threading.Thread | None = None
        self._owner: threading.Thread | None = None  # see `reserved`
        self.is_closed = False

    def check_usable(self) -> None:
        """Raises RuntimeError in a fork, and after `close`."""
        if self.is_closed:
            raise RuntimeError("this LLM was closed, its memory is given back: build another one")
        if os.getpid() != self._process:
            raise RuntimeError(
                f"this LLM belongs to process {self._process}, of which this one is a fork: its device does not live "
                "on here. Build an LLM in each process, and start processes with multiprocessing's 'spawn'"
            )

    def run(self, requests: list[Request], *, with_text: bool = False) -> Iterator[None]:
        """Queue a call's requests, all or none, and step until they have ended.

        Holds the lock while it queues and steps. `with_text` as in Engine.add.
        """
        remaining = collections.deque(requests)
        try:
            self.queue(requests, with_text=with_text)
            while not self._are_answered(remaining):
                if not self.wait_until_it_goes():
                    continue
                with self.lock:
                    if not self.is_halted and not self._are_answered(remaining):
                        self.engine.step()
                self.sweep()
                yield
        finally:
            self.abort_later(requests)

    def _are_answered(self, remaining: collections.deque[Request]) -> bool:
        """Whether all have ended; those that have are taken out, so that each is looked at once, however many."""
        while remaining and remaining[0].is_finished:
            remaining.popleft()
        return not remaining and not self.engine.owes_answers

    def queue(self, requests: list[Request], *, with_text: bool = False) -> None:
        """Queue a call's requests. Where it raises, the caller gives them to `abort_later`: some may be queued.

        The contract is found before the first step, because the weights may change in the middle; reading all weights
        takes a while, so other threads may step meanwhile.
        """
        self.check_awake()
        check_alive(self.engine.params)
        self.contracts.current()
        with self._turn():
            self.check_awake()
            self._abort_now()  # their ids are free again
            with self._keys_for(requests):
                for request in requests:
                    self.engine.add(request, with_text=with_text)
            check_alive(self.engine.params)
            self.contracts.current()  # at once, unless the weights have changed meanwhile

    @contextlib.contextmanager
    def _keys_for(self, requests: list[Request]) -> Iterator[None]:
        """A call that brought no key has the next one inside the block, and takes it where the block does not raise: a
        call that is refused takes none, so that it draws the same when it comes again.
        """
        keyless = [request for request in requests if request.is_keyless]
        if not keyless:
            yield
            return
        assert self._call_keys is not None
        words = self._call_keys.upcoming
        for request in keyless:
            if request.prompt_index >= 0:  # else it has its own
                request.key = words
        yield
        self._call_keys.take()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread steps or adds inside the block. Holds the lock."""
        self.check_usable()
        try:
            with self._turn():
                yield
        finally:
            self.sweep()

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Inside the block all other threads' calls wait, while this one's go on. Raises ValueError where one is under
        way.
        """
        with self.alone():
            if self.engine.has_work:
                raise ValueError("the LLM has requests under way: wait until they have ended")
            self._owner = threading.current_thread()
        try:
            yield
        finally:
            with self._changed:
                self._owner = None
                self._changed.notify_all()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """The lock, while no other thread has reserved the engine."""
        while True:
            with self._changed:
                self._changed.wait_for(self._is_mine)
            with self.lock:
                if self._is_mine():  # still
                    yield
                    return

    def _is_mine(self) -> bool:
        return self._owner in (None, threading.current_thread())

    # -- pause and sleep ----------------------------------------------------------------------------------------------

    @property
    def is_paused(self) -> bool:
        return self._paused_by is not None

    @property
    def is_asleep(self) -> bool:
        return self._asleep_by is not None

    @property
    def is_halted(self) -> bool:
        """Whether no step may begin."""
        return self.is_paused or self.is_asleep

    def check_awake(self) -> None:
        """Raises RuntimeError while the LLM is asleep."""
        if self.is_asleep:
            raise RuntimeError("this LLM is asleep, its pages are given back: call wake_up() first")

    def pause(self) -> None:
        """No step begins until `resume`; idempotent. A step that runs is waited for."""
        self._paused_by = threading.current_thread()
        with self.alone():
            pass

    def resume(self) -> None:
        """Idempotent."""
        with self._changed:
            self._paused_by = None
            self._changed.notify_all()

    def fall_asleep(self) -> None:
        """As `pause`, and new requests are refused; idempotent. Within the lock."""
        self._asleep_by = threading.current_thread()

    def awake(self) -> None:
        """Requests that waited go on; idempotent."""
        with self._changed:
            self._asleep_by = None
            self._changed.notify_all()

    def wait_until_it_goes(self) -> bool:
        """Wait while paused or asleep; True where the engine goes.

        Raises where the thread that would wait is the one that has to end it.
        """
        for halted_by, done, undo in (
            (self._paused_by, "paused", "resume()"),
            (self._asleep_by, "put to sleep", "wake_up()"),
        ):
            if halted_by is threading.current_thread():
                raise RuntimeError(
                    f"this LLM was {done} by this very thread, which would wait for itself: call {undo} first"
                )
        with self._changed:
            return self._changed.wait_for(lambda: not self.is_halted, WAKE)

    # -- aborting -----------------------------------------------------------------------------------------------------

    def abort_later(self, requests: list[Request]) -> None:
        """Abort those that the engine still has; while it is at work, the thread that works with it does so afterwards.

        Waiting for the lock could be for ever: a stream may be collected as garbage, or a signal be handled, during
        this very thread's step.
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
