"""Rewards with a time limit, and a plain function as such a reward, in a thread."""

import abc
import ctypes
import inspect
import math
import numbers
import queue
import threading
from collections.abc import Callable, Container
from typing import Any

DEFAULT_TIMEOUT = 10.0  # seconds for one sample
Reward = Callable[..., Any]  # (prompt, completion, answer) -> float; what else it asks for comes by keyword
# What a reward may ask for by a parameter of that name: CompletionOutput's finish_reason and token_ids, and the number
# of tokens that the model wrote, which leaves out those of a tool.
FACTS = ("finish_reason", "token_ids", "num_tokens")


class Bounded(abc.ABC):
    """A reward that ends within a time limit, whatever it is given."""

    asks_for: tuple[str, ...] = ()  # those of FACTS that `within` takes

    @abc.abstractmethod
    def within(self, timeout: float, prompt: Any, completion: str, answer: Any, **facts: Any) -> float:
        """The reward of one sample. Raises TimeoutError after `timeout` seconds, and whatever the reward raises."""

    def __call__(self, prompt: Any, completion: str, answer: Any, **facts: Any) -> float:
        return self.within(DEFAULT_TIMEOUT, prompt, completion, answer, **facts)


def asked_for(function: Callable[..., Any], options: Container[str] = ()) -> tuple[str, ...]:
    """Those of FACTS that a function has parameters for, after the first three; not those that `options` set."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions that are written in C have no signature
        return ()
    by_keyword = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    by_keyword |= {each.name for each in list(parameters)[3:] if each.kind is each.POSITIONAL_OR_KEYWORD}
    return tuple(name for name in FACTS if name in by_keyword and name not in options)


class InThread(Bounded):
    """Any function, called in a thread, which is interrupted and abandoned when its time is over.

    Python code can be interrupted. Code that keeps the interpreter lock (a regular expression that backtracks without
    end, a huge power) stops every thread of the process: such a function belongs into `Isolated`.
    """

    def __init__(self, function: Reward) -> None:
        self.function = function
        self.asks_for = asked_for(function)

    def within(self, timeout: float, prompt: Any, completion: str, answer: Any, **facts: Any) -> float:
        results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

        def call() -> None:
            try:
                results.put((self.function(prompt, completion, answer, **facts), None))
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
