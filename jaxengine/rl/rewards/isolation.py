"""Rewards in worker processes, which are killed when they hang, and whose crash ends nothing else."""

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxengine.rl.rewards.bounded import Bounded, asked_for, took_too_long

WORKER = Path(__file__).with_name("reward_worker.py")
START_SECONDS = 120.0  # for a worker to import what it runs, on a busy machine
WORKER_MEMORY = 4 << 30  # bytes of address space


class Isolated(Bounded):
    """A reward that runs `function(prompt, completion, answer, **options)` in worker processes.

    `function` is at the top level of a module, which each worker imports; arguments and options are sent as JSON. A
    worker has at most `memory` bytes of address space. There are as many workers as calls at the same time; they are
    started when they are needed, kept for later calls, and ended by `close` or with this object. Raises ValueError
    where workers could not import `function`, and TypeError where an option is no JSON.
    """

    def __init__(self, function: Callable[..., Any], *, memory: int = WORKER_MEMORY, **options: Any) -> None:
        self.__name__, self.asks_for = function.__name__, asked_for(function, options)
        self._setup = {
            "module": function.__module__,
            "name": function.__qualname__,
            "options": options,
            "memory": memory,
        }
        json.dumps(options)  # raises here and not in a worker
        module = importlib.import_module(function.__module__)
        if function.__module__ == "__main__" or getattr(module, function.__qualname__, None) is not function:
            raise ValueError(
                f"a worker process cannot import {function.__module__}.{function.__qualname__}: put the function at "
                "the top level of a module, or give it to compute_rewards as it is, to run in a thread"
            )
        self._idle: list[Worker] = []
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _kill_all, self._idle)

    def within(self, timeout: float, prompt: Any, completion: str, answer: Any, **facts: Any) -> float:
        line = json.dumps([timeout, facts, prompt, completion, answer])
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        worker = worker or Worker(self._setup)
        try:
            reply = worker.ask(line, timeout)
        except BaseException:
            worker.kill()
            raise
        with self._lock:
            self._idle.append(worker)
        if "error" in reply:
            raise RewardError(reply["error"])
        return reply["value"]

    def close(self) -> None:
        """End the idle workers. The next sample starts a new one."""
        with self._lock:
            _kill_all(self._idle)


class RewardError(Exception):
    """What a reward raised in its worker process, as text."""

    def __str__(self) -> str:
        return self.args[0]


class Worker:
    """A process that runs reward_worker.py, and the pipes to it."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # a worker that reads nothing must not hold the writer up
        try:
            reply = self.ask(json.dumps(setup | {"path": sys.path}), START_SECONDS)
        except BaseException:
            self.kill()
            raise
        if "error" in reply:
            self.kill()
            raise RuntimeError(f"a worker process could not import the reward: {reply['error']}")

    def ask(self, line: str, timeout: float) -> dict[str, Any]:
        """The reply to one line. Raises TimeoutError, and ChildProcessError where the process ends."""
        deadline = time.monotonic() + timeout
        with contextlib.suppress(BrokenPipeError):  # the process has ended, which reading reports
            self._write(memoryview(line.encode() + b"\n"), deadline, timeout)
        reply = b""
        while not reply.endswith(b"\n"):
            reply += self._read(deadline, timeout)
        return json.loads(reply)

    def _write(self, data: memoryview, deadline: float, timeout: float) -> None:
        assert self._process.stdin is not None
        pipe = self._process.stdin.fileno()
        while data:
            _wait(pipe, select.POLLOUT, deadline, timeout)
            data = data[os.write(pipe, data) :]

    def _read(self, deadline: float, timeout: float) -> bytes:
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        _wait(pipe, select.POLLIN, deadline, timeout)
        part = os.read(pipe, 1 << 16)
        if not part:
            raise ChildProcessError(f"the reward's process ended with {how_it_ended(self._process.wait())}")
        return part

    def kill(self) -> None:
        """End the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def _wait(pipe: int, event: int, deadline: float, timeout: float) -> None:
    """Until the pipe is ready for `event`. Raises TimeoutError after the deadline, which names the `timeout`."""
    ready = select.poll()
    ready.register(pipe, event)
    if not ready.poll(max(deadline - time.monotonic(), 0) * 1000):
        raise took_too_long(timeout)


def how_it_ended(code: int) -> str:
    """A return code of subprocess in words: "SIGKILL", or "exit code 1"."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _kill_all(workers: list[Worker]) -> None:
    while workers:
        workers.pop().kill()
