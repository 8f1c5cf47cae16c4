"""A thread of its own that steps the engine: requests come by a queue, and what they gained goes out by callbacks."""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxengine.engine.deltas import DeltaReader
from jaxengine.engine.engine import Engine
from jaxengine.engine.replicas import Replicas
from jaxengine.engine.runner import Runner
from jaxengine.host.sample import Request
from jaxengine.outputs import CompletionDelta, joined


class News(NamedTuple):
    """What the `index`-th request of a call gained with a step, and whether that was its end."""

    index: int
    deltas: list[CompletionDelta]
    finished: bool

    def followed_by(self, later: "News") -> "News":
        """One piece of news in the place of two of the same request."""
        return News(self.index, joined(self.deltas + later.deltas), later.finished)


Deliver = Callable[[list[News] | Exception], None]  # called in the stepping thread: it must return at once


@dataclasses.dataclass(eq=False)
class Call:
    """Requests that were submitted together, and who hears of them. An exception is the last that is delivered."""

    requests: list[Request]
    deliver: Deliver
    is_left: bool = False  # nobody listens any more


class Reading(NamedTuple):
    """A request that has not ended: the `index`-th of a call."""

    call: Call
    index: int
    reader: DeltaReader

    def news(self) -> News:
        """What is new since the last time. Between two steps only."""
        return News(self.index, self.reader.read(), self.call.requests[self.index].is_finished)


class SteppingThread:
    """Steps an engine while a call has requests in it. Every method may be called from any thread.

    Other threads may use the engine beside it, through the same Runner. What goes wrong in a step fails the calls that
    are under way, and the thread goes on, because the engine does. What ends the thread fails them too, and every later
    call.
    """

    def __init__(self, engine: Engine | Replicas, runner: Runner) -> None:
        self._engine, self._runner = engine, runner
        self._changed = threading.Condition()  # guards what follows; notified where it changes
        self._new: list[Call] = []
        self.ended_by: Exception | None = None  # why no call is taken any more
        self._readings: dict[Request, Reading] = {}  # the thread's own
        self._gained: list[Request] = []  # have news, most often: a step's cost does not grow with those that wait
        self.last_error: Exception | None = None  # of the last step, None where it went well
        self._thread = threading.Thread(target=self._run, name="jaxengine-steps", daemon=True)
        self._thread.start()

    def submit(self, requests: list[Request], deliver: Deliver) -> Call:
        """Queue a call's requests, all or none. Raises RuntimeError where the thread has ended."""
        call = Call(requests, deliver)
        with self._changed:
            if self.ended_by is not None:
                raise RuntimeError(f"the engine's thread has ended: {self.ended_by}") from self.ended_by
            self._new.append(call)
            self._changed.notify()
        return call

    def leave(self, call: Call) -> None:
        """Abort what goes on of a call, of which nothing more is to be delivered. Idempotent."""
        call.is_left = True  # first: a call that is being queued is aborted by whoever comes second
        self._runner.abort_later(call.requests)

    def stop(self) -> None:
        """End the thread after the step that runs; calls that are under way fail. Idempotent."""
        with self._changed:
            self.ended_by = self.ended_by or RuntimeError("it was closed")
            self._changed.notify()

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        error = RuntimeError("it ended")
        try:
            while self._take_new():
                self._turn()
        except Exception as caught:
            error = caught
        finally:
            with self._changed:
                self.ended_by = self.ended_by or error
                new, self._new = self._new, []
            self._fail_all(self.ended_by, new)

    def _take_new(self) -> bool:
        """Queue what was submitted, waiting for it where there is nothing to do; False where the thread is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._new or self._readings or self.ended_by)
            if self.ended_by is not None:
                return False
            new, self._new = self._new, []
        for call in new:
            self._queue(call)
            if call.is_left:
                self._runner.abort_later(call.requests)
        return True

    def _queue(self, call: Call) -> None:
        """A call that the engine refuses fails alone."""
        for request in call.requests:
            request.on_news = self._gained.append
        try:
            self._runner.queue(call.requests, with_text=True)
        except Exception as error:
            self._runner.abort_later(call.requests)
            call.deliver(error)
            return
        for index, request in enumerate(call.requests):
            self._readings[request] = Reading(call, index, DeltaReader(request, self._engine.tokenizer))
        self._gained += call.requests  # what an earlier call began has tokens, and may have ended

    def _turn(self) -> None:
        """One step, where the engine is not paused, and the news of it."""
        self._runner.wait_until_it_goes()
        try:
            with self._runner.alone():  # no other thread's step may add a token to what is being read
                if self._engine.has_work and not self._runner.is_halted:
                    self._engine.step()
                    self.last_error = None
                found = self._read()
                if not self._engine.has_work and self._readings:
                    raise RuntimeError("the engine does not have requests any more that have not ended")
        except Exception as error:
            self.last_error = error
            self._fail_all(error)
            return
        for call, news in found.items():
            if not call.is_left:
                call.deliver(news)

    def _read(self) -> dict[Call, list[News]]:
        """The news of the requests that have some."""
        gained = dict.fromkeys(self._gained)
        self._gained.clear()
        found: dict[Call, list[News]] = {}
        for request in gained:
            reading = self._readings.get(request)
            if reading is not None:
                news = reading.news()
                if news.deltas or news.finished:
                    found.setdefault(reading.call, []).append(news)
                if news.finished:
                    del self._readings[request]
        return found

    def _fail_all(self, error: Exception, unqueued: Sequence[Call] = ()) -> None:
        calls = dict.fromkeys(reading.call for reading in self._readings.values())
        self._readings = {}
        for call in (*calls, *unqueued):
            self._runner.abort_later(call.requests)
            call.deliver(error)
