"""Rewards with a time limit, and a plain function as such a reward, in a thread."""

import abc
import ctypes
import math
import numbers
import queue
import threading
from collections.abc import Callable
from typing import Any

DEFAULT_TIMEOUT = 10.0  # seconds for one sample
Reward = Callable[[Any, str, Any], Any]  # (prompt, completion, answer) -> float


class Bounded(abc.ABC):
    """A reward that ends within a time limit, whatever it is given."""

    @abc.abstractmethod
    def within(self, timeout: float, prompt: Any, completion: str, answer: Any) -> float:
        """The reward of one sample. Raises TimeoutError after `timeout` seconds, and whatever the reward raises."""

    def __call__(self, prompt: Any, completion: str, answer: Any) -> float:
        return self.within(DEFAULT_TIMEOUT, prompt, completion, answer)


class InThread(Bounded):
    """Any function, called in a thread, which is interrupted and abandoned when its time is over.

    Python code can be interrupted. Code that keeps the interpreter lock (a regular expression that backtracks without
    end, a huge power) stops every thread of the process: such a function belongs into `Isolated`.
    """

    def __init__(self, function: Reward) -> None:
        self.function = function

    def within(self, timeout: float, prompt: Any, completion: str, answer: Any) -> float:
        results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def call() -> None:
            try:
                results.put((self.function(prompt, completion, answer), None))
            except BaseException as error:  # SystemExit too: the sample fails, and nothing else ends
                results.put((None, error))

        thread = threading.Thread(target=call, name="reward", daemon=True)
        thread.start()
        try:
            value, error = results.get(timeout=timeout)
        except queue.Empty:
            _interrupt(thread)
            raise took_too_long(timeout) from None
        if error is not None:
            raise error
        return finite(value)


def took_too_long(timeout: float) -> TimeoutError:
    return TimeoutError(f"the reward took longer than {timeout:g} s")


def finite(value: Any) -> float:
    """`value` as a float; raises ValueError where it is no finite number. Numpy's and JAX's scalars are numbers."""
    number = value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
    if not isinstance(number, numbers.Real) or not math.isfinite(number):
        raise ValueError(f"a reward must be a finite number, got {value!r:.80}")
    return float(number)


def _interrupt(thread: threading.Thread) -> None:
    """Raise SystemExit in the thread as soon as it runs Python code again. Does nothing where it has ended."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
