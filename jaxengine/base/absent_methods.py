"""Methods of vLLM's that a class does not have, explained where somebody asks for one."""

from typing import Any, NoReturn, TypeVar

from jaxengine.base.vllm_names import METHODS

T = TypeVar("T")


class _Absent:
    """An attribute that is not there, and what to take instead: hasattr says False."""

    def __init__(self, hint: str) -> None:
        self._hint = hint

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._name = owner.__name__, name

    def __get__(self, instance: Any, owner: type | None = None) -> NoReturn:
        raise AttributeError(f"{self._owner} has no {self._name!r}: {self._hint}", name=self._name, obj=instance)


def explains_absent_methods(cls: type[T]) -> type[T]:
    """Class decorator for LLM: names of METHODS that it does not have are explained."""
    for name, hint in METHODS.items():
        if name not in vars(cls):
            absent = _Absent(hint)
            absent.__set_name__(cls, name)
            setattr(cls, name, absent)
    return cls
