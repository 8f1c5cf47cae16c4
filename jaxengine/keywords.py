"""Keyword checking: an unknown keyword is an error that names the nearest known one."""
import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")
STRUCTURED = ("structured_output", "guided_", "response_format", "json_schema")  # beginnings of other engines' keywords for grammars


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint that ends an error about an unknown name; empty when nothing known is near."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def check_keywords(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError for the first keyword of `given` that is not in `known`."""
    known = list(known)
    for name in given:
        if name not in known and str(name).startswith(STRUCTURED):
            raise TypeError(f"{owner} has no keyword {name!r}: output that follows a grammar, schema, regular expression or choice is not "
                            "supported. Leave it out and check the text, or steer with logit_bias, stop and stop_token_ids")
        if name not in known:
            raise TypeError(f"{owner} has no keyword {name!r}{nearest(name, known) or '.'} It takes: {', '.join(known)}")


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
