"""Signals that are heeded later: what is under way comes to its end first."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def noted(number: signal.Signals, message: str, *, then: Any = None) -> Iterator[Callable[[], bool]]:
    """Inside, a signal is only noted, and `message` is said; the function that this gives says whether one came.

    From the second on the handler is `then`, where it is given. In the main thread.
    """
    told: list[int] = []

    def note(number: int, frame: Any) -> None:
        told.append(number)
        if then is not None:
            signal.signal(number, then)
        print(message, file=sys.stderr, flush=True)

    before = signal.signal(number, note)
    try:
        yield lambda: bool(told)
    finally:
        signal.signal(number, before)
