"""Stop strings, looked for in a text that grows."""

import bisect
from collections.abc import Iterable
from typing import NamedTuple


class Stop(NamedTuple):
    """A stop string that was completed, and where it ends in the characters that completed it."""

    string: str
    end: int


class StopStrings:
    """The stop strings of one sample. `held` are the last characters of its text that may still become one of them.

    Every string is compared at every character after the first one that begins a string. SamplingParams allows 64
    strings of 1,024 characters; most comparisons end at a string's last character or its first.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self._strings = tuple(sorted(strings))
        self._first_characters = frozenset(string[0] for string in self._strings)
        self._longest = max(map(len, self._strings))
        self.held = ""

    def add(self, text: str) -> Stop | None:
        """Adds characters. The stop string that ends first in them, and of those that end together the longest."""
        if not self.held and self._first_characters.isdisjoint(text):
            return None
        window = self.held + text
        stop = self._completed(window)
        num_held = min(len(window), self._longest - 1)
        while num_held and not self._may_grow(window[-num_held:]):
            num_held -= 1
        self.held = window[len(window) - num_held :]
        return stop

    def _completed(self, window: str) -> Stop | None:
        for end in range(len(self.held) + 1, len(window) + 1):
            if window.endswith(self._strings, 0, end):
                ending = [string for string in self._strings if window.endswith(string, 0, end)]
                return Stop(max(ending, key=len), end - len(self.held))
        return None

    def _may_grow(self, beginning: str) -> bool:
        """Whether a longer stop string begins so. Sorted strings that begin with another one stand right after it."""
        index = bisect.bisect_right(self._strings, beginning)
        return index < len(self._strings) and self._strings[index].startswith(beginning)
