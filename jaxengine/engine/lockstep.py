"""Several processes that run one engine: each plans by itself, and here they make sure that the plans are one.

No step waits for this. Each process chains a hash over what it does, and a thread puts the newest hashes into the
processes' key-value store and reads the others' several times a second; a process waits for the others' hashes only
where a call ends (`settle`), so that no output of a plan that differed is ever returned. A difference, a process that
fails, falls silent, or stays back for `timeout` seconds ends all others with a message. A thread that is caught in a
collective operation cannot be woken, so a process that does not come out of one by itself is ended.
"""

import atexit
import collections
import contextlib
import hashlib
import json
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from sharding.distributed import next_name, store

BEAT = 0.2  # seconds between two looks at the others
HURRIED = 0.003  # the same, while a call waits
KEPT = 64  # steps of which the newest hashes are told, and plans are kept to be shown
START = 300  # seconds that processes have, at least, to make an engine: one may load its weights later
GRACE = 5.0  # seconds that a process has to end by itself, and to hear the others out
SHOWN = 4000  # characters of a plan
EXIT_CODE = 70  # EX_SOFTWARE of sysexits.h


class LockstepError(RuntimeError):
    """The processes of one engine do not do the same, or one of them is gone: no further result can be had."""


class Lockstep:
    """What this process does, beside what the others do. The main thread calls; a thread of its own watches."""

    def __init__(self, store: Any, name: str, me: int, processes: Sequence[int], timeout: float) -> None:
        self.me, self.timeout = me, timeout
        self.others = [process for process in processes if process != me]
        self._store, self._name = store, name
        self._steps: collections.deque[tuple[int, str, str]] = collections.deque(maxlen=KEPT)  # (number, hash, what)
        self._count, self._hash, self._begun = 0, "", time.monotonic()
        self._changed = threading.Condition()  # guards what is above and below; notified where one of them changes
        self._seen: dict[int, dict[str, Any]] = {}  # what each other process told last
        self._heard = dict.fromkeys(self.others, time.monotonic())  # when its beat was last another
        self._inside = 0  # calls under way
        self._settling = False
        self.is_busy = False  # with work of its own, for which the others wait as long as it lives
        self.failure: str | None = None
        self.close = weakref.finalize(self, _say_closed, self._store, f"{self._name}closed/{self.me}")
        self._thread = threading.Thread(target=_watch, args=(weakref.ref(self),), name="lockstep", daemon=True)
        self._thread.start()
        atexit.register(_leave, weakref.ref(self))  # before JAX's own, which waits for all processes

    @classmethod
    def of(cls, processes: Sequence[int], timeout: float) -> "Lockstep | None":
        """That of these processes; None for one alone. Seconds as EngineConfig.process_timeout."""
        if len(processes) == 1:
            return None
        return cls(store(), next_name(processes, "lockstep"), jax.process_index(), processes, timeout)

    # -- what the engine calls ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Work that all processes do at the same place. An error that leaves it ends the other processes too."""
        self._check()
        self._inside += 1
        try:
            yield
        except (LockstepError, ValueError, TypeError):  # the latter refuse what is given, in every process
            raise
        except BaseException as error:
            self._check(after=error)
            lost = isinstance(error, jax.errors.JaxRuntimeError)
            problem = f"process {self.me} failed with {type(error).__name__}: {str(error)[:SHOWN]}"
            self._fail(problem, wait=not lost)
            if lost:
                raise LockstepError(
                    f"a step that runs on several processes failed, so another of them has probably ended: {error}"
                ) from error
            raise
        finally:
            self._inside -= 1

    def follow(self, what: Any) -> None:
        """This process is about to do `what`, whose repr has to be the others' too."""
        self._check()
        text = repr(what)
        with self._changed:
            self._count += 1
            self._hash = hashlib.blake2b((self._hash + text).encode(), digest_size=8).hexdigest()
            self._steps.append((self._count, self._hash, text))
            self._begun = time.monotonic()

    def settle(self) -> None:
        """Wait until all others are known to have done what this process did."""
        with self._changed:
            self._settling = True
            self._changed.notify_all()
            self._changed.wait_for(self._is_settled)
            self._settling = False
        self._check()

    def wait(self) -> None:
        """Wait until the others were told of a failure."""
        self._thread.join(2 * GRACE)

    def _check(self, after: BaseException | None = None) -> None:
        if self.failure is not None:
            raise LockstepError(self.failure) from after

    def _is_settled(self) -> bool:
        return self.failure is not None or all(self._agreed(process) for process in self.others)

    def _agreed(self, process: int) -> bool:
        told = self._seen.get(process)
        return told is not None and [self._count, self._hash] in told["steps"]

    # -- what the thread does -----------------------------------------------------------------------------------------

    def look(self) -> bool:
        """Tell what this process did, and compare with what the others tell; False where nothing is left to do."""
        with self._changed:
            self._changed.wait(HURRIED if self._settling else BEAT)
            if self.failure is not None or not self.close.alive:
                return False
        try:
            self._tell()
            found = dict(self._store.key_value_dir_get(self._name))
        except jax.errors.JaxRuntimeError as error:
            self._fail(f"the key-value store in process 0 does not answer: {error}", wait=False)
            return False
        stops = [text for key, text in found.items() if key.startswith(f"{self._name}stop/")]
        if stops:
            self._fail(stops[0])
            return False
        told = {process: found.get(f"{self._name}told/{process}") for process in self.others}
        seen = {process: json.loads(text) for process, text in told.items() if text is not None}
        problem = self._compare(seen, {process for process in self.others if f"{self._name}closed/{process}" in found})
        with self._changed:
            self._seen = seen
            self._changed.notify_all()
        if problem is not None:
            self._fail(problem)
        return problem is None

    def _tell(self) -> None:
        with self._changed:
            steps = [[number, digest] for number, digest, _ in self._steps]
            told = {"beat": time.monotonic(), "count": self._count, "steps": steps, "busy": self.is_busy}
        self._store.key_value_set(f"{self._name}told/{self.me}", json.dumps(told), allow_overwrite=True)

    def _compare(self, seen: dict[int, dict[str, Any]], closed: set[int]) -> str | None:
        """What is wrong, if anything. The processes `closed` do no more steps and need give no sign of life."""
        with self._changed:
            mine = {number: digest for number, digest, _ in self._steps}
            count, begun = self._count, self._begun
        now, patience = time.monotonic(), self.timeout if count > 1 else max(self.timeout, START)
        for process in self.others:
            told = seen.get(process, {"beat": None, "count": 0, "steps": [], "busy": False})
            if told["beat"] != self._seen.get(process, {}).get("beat"):
                self._heard[process] = now
            for number, digest in told["steps"]:
                if mine.get(number, digest) != digest:
                    return self._difference(process, number)
            silent, behind = now - self._heard[process], now - begun
            if process in closed and told["count"] < count:
                return f"process {process} ended after {told['count']} steps, process {self.me} has begun {count}"
            if process not in closed and silent > patience:
                return f"process {process} showed no sign of life for {silent:.0f} s"
            if told["count"] < count and behind > patience and not told["busy"]:
                return (
                    f"process {process} has not begun step {count} after {behind:.0f} s: it is at step "
                    f"{told['count']} (process_timeout={self.timeout:g})"
                )
        return None

    def _difference(self, process: int, number: int) -> str:
        """Both plans of a step, as text."""
        with self._changed:
            own = next((text for known, _, text in self._steps if known == number), "(no longer kept)")
        key = f"{self._name}plan/{number}/"
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # where it was told already, to another process
            self._store.key_value_set(f"{key}{self.me}", own[:SHOWN])
        try:
            other = self._store.blocking_key_value_get(f"{key}{process}", int(1000 * GRACE))
        except jax.errors.JaxRuntimeError:
            other = "(it did not tell)"
        return (
            f"step {number} differs between processes, so nothing of it is returned\n"
            f"  process {self.me}: {own[:SHOWN]}\n  process {process}: {other}"
        )

    def _fail(self, problem: str, *, wait: bool = True) -> None:
        """End this process' part, and tell the others; `wait` for them to have read it."""
        with self._changed:
            if self.failure is not None:
                return
            self.failure = problem
            self._changed.notify_all()
        print(f"jaxengine, process {self.me}: {self.failure}", file=sys.stderr, flush=True)
        timer = threading.Timer(2 * GRACE, _end, [weakref.ref(self)])
        timer.daemon = True
        timer.start()
        stop, deadline = f"{self._name}stop/", time.monotonic() + GRACE * wait
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._store.key_value_set(f"{stop}{self.me}", problem, allow_overwrite=True)
            while time.monotonic() < deadline and len(self._store.key_value_dir_get(stop)) <= len(self.others):
                time.sleep(BEAT / 4)

    @property
    def is_caught(self) -> bool:
        """Whether a call is still under way after a failure."""
        return self.failure is not None and self._inside > 0


@contextlib.contextmanager
def as_one(lockstep: Lockstep | None, what: Any) -> Iterator[None]:
    """Work that all processes of an engine do at the same place; `what` has the same repr in all. None: one process.

    It begins, and so its results are only given out, where all others are known to begin the same.
    """
    if lockstep is None:
        yield
        return
    with lockstep.together():
        lockstep.follow(what)
        lockstep.settle()
        yield


def _say_closed(store: Any, key: str) -> None:
    """No more calls come from this process: the others need not listen for it."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        store.key_value_set(key, "", allow_overwrite=True)


def _watch(lockstep: "weakref.ref[Lockstep]") -> None:
    while (found := lockstep()) is not None and found.look():
        del found


def _end(lockstep: "weakref.ref[Lockstep]") -> None:
    found = lockstep()
    if found is not None and found.is_caught:
        print(f"jaxengine, process {found.me}: caught in a collective operation, ended", file=sys.stderr, flush=True)
        os._exit(EXIT_CODE)


def _leave(lockstep: "weakref.ref[Lockstep]") -> None:
    """At the process' end. After a failure JAX's own end would wait for processes that are gone."""
    found = lockstep()
    if found is None:
        return
    found.close()
    if found.failure is not None:
        found.wait()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_CODE)
