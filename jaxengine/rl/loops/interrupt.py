"""Ctrl-C in a long run: what is under way comes to its end and is saved."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

EXIT_CODE = 128 + signal.SIGINT  # as a shell has it


@contextlib.contextmanager
def heeded() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only noted: the function that this gives says whether there was one. The second
    raises KeyboardInterrupt where it comes. In the main thread.
    """
    told: list[int] = []

    def note(number: int, frame: Any) -> None:
        told.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nCtrl-C: this iteration ends first; once more ends at once", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(told)
    finally:
        signal.signal(signal.SIGINT, before)
