"""Arguments as they come in, checked: names, integers, numbers, flags, lists.

ValueError names the field, what is allowed and what was given; TypeError names an unknown keyword and the nearest known
one.
"""

import dataclasses
import difflib
import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any, TypeVar

from jaxengine.base.vllm_names import KEYWORDS

T = TypeVar("T")
STRUCTURED = (
    "structured_output",
    "guided_",
    "response_format",
    "json_schema",
)  # beginnings of other engines' keywords for grammars


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint that ends an error about an unknown name; empty when nothing known is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def check_keywords(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError for the first keyword of `given` that is not in `known`."""
    known, hints = list(known), KEYWORDS.get(owner, {})
    for name in given:
        if name not in known and name in hints:
            raise TypeError(f"{owner} has no keyword {name!r}: {hints[name]}")
        if name not in known and str(name).startswith(STRUCTURED):
            raise TypeError(
                f"{owner} has no keyword {name!r}: output that follows a grammar is asked for by SamplingParams("
                "structured_outputs=StructuredOutputsParams(json=… or regex=… or choice=… or grammar=…))"
            )
        if name not in known:
            raise TypeError(
                f"{owner} has no keyword {name!r}{nearest(name, known) or '.'} It takes: {', '.join(known)}"
            )


def strict_keywords(cls: type[T]) -> type[T]:
    """Class decorator for dataclasses: unknown keywords of the constructor are explained."""
    original = cls.__init__
    known = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        check_keywords(cls.__name__, kwargs, known)
        original(self, *args, **kwargs)

    __init__.__doc__, __init__.__wrapped__ = original.__doc__, original  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


def as_integer(value: Any) -> int | None:
    """value as an int, or None where it is no integer (bool is none: True is a flag, not a token)."""
    if isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", "i") not in "iu":
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """value as an int of the range; integers of any kind, numpy's and JAX's included, are accepted."""
    number = as_integer(value)
    if number is None:
        raise ValueError(f"{name} must be an integer, got {value!r:.80}")
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"{name} must be {_range(low, high)}, got {number}")
    return number


def real(name: str, value: Any, low: float, high: float | None = None, open_low: bool = False) -> float:
    """value as a finite float of the range."""
    # `not isinstance(Real)` and not `try: float()`: a string or an array of one element is a mistake, not a number.
    number = _scalar(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Real) or not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number, got {value!r:.80}")
    number = float(number)
    if number < low or (open_low and number == low) or (high is not None and number > high):
        raise ValueError(f"{name} must be {_range(low, high, open_low)}, got {number}")
    return number


def flag(name: str, value: Any) -> bool:
    """value as a bool, numpy's included; not its truth: "false" would be true."""
    known = _scalar(value)
    if not isinstance(known, bool):
        raise ValueError(f"{name} must be True or False, got {value!r:.80}")
    return known


def items(name: str, value: Any, allowed: str) -> tuple[Any, ...]:
    """The items of a list; `allowed` says in words which lists there are."""
    try:
        return tuple(value)
    except TypeError:
        raise ValueError(f"{name} must be {allowed}, got {value!r:.80}") from None


def _scalar(value: Any) -> Any:
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def _range(low: float | None, high: float | None, open_low: bool = False) -> str:
    at_least = f"greater than {low}" if open_low else f"at least {low}"
    return at_least if high is None else f"at most {high}" if low is None else f"{at_least} and at most {high}"
