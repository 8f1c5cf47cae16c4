"""The model's chat template, rendered as the untrusted program that it is.

Jinja's immutable sandbox (template_worker.py) keeps a template from reaching anything but its variables, which are
plain JSON values. It does not keep a template from computing for ever or from filling the memory, so it runs in a
process of its own, which has bounded memory, and is killed after `MAX_SECONDS`. The process is kept for the next chat.
"""

import atexit
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_TEMPLATE_CHARACTERS = 65_536
MAX_CHARACTERS, GROWTH = 1_000_000, 4  # of the rendered text: these, and so many for each character that was given
MAX_SECONDS = 5.0
START_SECONDS = 60.0  # for the process to import Jinja, on a busy machine
MAX_IDLE = 4  # processes that are kept; as many run as threads render at once


class TemplateFailed(ValueError):
    """The template met what it was not written for."""


_WORKER = Path(__file__).with_name("template_worker.py")


def render(source: str, variables: Mapping[str, Any], given: int) -> str:
    """The text that the template makes of `variables`, plain JSON values of `given` characters in all.

    Raises ValueError: the template is not valid, fails, refuses the messages or was stopped.
    """
    return _rendered(source, given, variables=variables)["text"]


def render_marked(
    source: str, variables: Mapping[str, Any], given: int, marks: Mapping[str, Any]
) -> tuple[str, str | None]:
    """The text of `render`, and the same with stand-ins where the template wrote control tokens (provenance.py).

    The second is None where that cannot be told. `marks`: what StandIns.for_worker returns.
    """
    reply = _rendered(source, given, variables=variables, marks=marks)
    return reply["text"], reply["marked"]


def _rendered(source: str, given: int, **request: Any) -> dict[str, Any]:
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise ValueError(f"a chat template may have at most {MAX_TEMPLATE_CHARACTERS} characters, got {len(source)}")
    request |= {"source": source, "max_characters": MAX_CHARACTERS + GROWTH * given}
    line = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
    worker = _idle_worker() or _Worker()
    try:
        reply = json.loads(worker.ask(line, MAX_SECONDS))
    except TimeoutError:
        worker.kill()
        raise ValueError(f"the chat template was stopped: it ran for more than {MAX_SECONDS} seconds") from None
    except EOFError as error:
        raise ValueError(f"the chat template was stopped: {error}") from None
    except BaseException:  # an interrupt: the reply is still to come
        worker.kill()
        raise
    _keep(worker)
    if "error" in reply:
        kind = TemplateFailed if reply["error"].startswith("failed") else ValueError
        raise kind(f"the chat template {reply['error']}")
    return reply


class _Worker:
    """A process that renders templates one after the other, and the socket to it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-P", str(_WORKER)],  # no start-up files, no modules of this folder
                env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, filter(None, sys.path)))},
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                start_new_session=True,  # Ctrl-C is for this process
            )
        self._replies = self._socket.makefile("rb", 1 << 16)
        try:
            self.ask(b"", START_SECONDS)
        except (TimeoutError, EOFError) as error:
            self.kill()
            raise RuntimeError(f"{_WORKER} did not start ({error}); its errors are on stderr") from None

    def ask(self, line: bytes, seconds: float) -> bytes:
        """The reply to one line. Raises TimeoutError, and EOFError where the process ends."""
        deadline = time.monotonic() + seconds
        reply = b""
        try:
            self._socket.settimeout(seconds)
            self._socket.sendall(line)
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            reply = self._replies.readline()
        except ConnectionError:  # it is dead
            pass
        if not reply.endswith(b"\n"):
            self.kill()
            raise EOFError(f"its process ended with exit code {self._process.returncode}")
        return reply

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._close()

    def forget(self) -> None:
        """Let go of a process that is the child of another process."""
        self._process.returncode = 0
        self._close()

    def _close(self) -> None:
        self._replies.close()
        self._socket.close()


_idle: list[_Worker] = []  # append and pop need no lock, which a fork could leave locked


def _idle_worker() -> _Worker | None:
    while _idle:
        worker = _idle.pop()
        if worker.is_alive():
            return worker
        worker.kill()
    return None


def _keep(worker: _Worker) -> None:
    if len(_idle) < MAX_IDLE:
        _idle.append(worker)
    else:
        worker.kill()


def _kill_idle() -> None:
    while _idle:
        _idle.pop().kill()


def _forget_idle() -> None:
    while _idle:
        _idle.pop().forget()


atexit.register(_kill_idle)
os.register_at_fork(after_in_child=_forget_idle)
