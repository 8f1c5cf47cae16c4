"""Pools of pages that nothing uses, and that make room for new ones where memory runs out.

A device has one memory for all engines of a process. A pool is sized to take most of it, so a second LLM has no room
while the first is still referred to, as in a notebook's cell that is run twice. An engine without requests loses only
its cached prefixes with its pool, and has the pool again with its next request.
"""

import weakref
from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Owner(Protocol):
    """Whatever has a pool that can be given back for a while."""

    def release_pool_if_idle(self) -> bool:
        """Give the pool's memory back where nothing is under way; whether that was done."""
        ...


_owners: "weakref.WeakSet[Owner]" = weakref.WeakSet()


def register(owner: Owner) -> None:
    """`owner`'s pool may be given back from now on, as long as it lives."""
    _owners.add(owner)


def with_room(build: Callable[[], T]) -> T:
    """`build()`; where memory runs out and idle pools can be given back, once more after that."""
    try:
        return build()
    except MemoryError:
        if not release():
            raise
    return build()


def release() -> int:
    """Give every idle pool back; their number."""
    return sum([owner.release_pool_if_idle() for owner in list(_owners)])
