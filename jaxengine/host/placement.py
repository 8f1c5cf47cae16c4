"""Which replica serves a request: a rule of the requests so far, the same on every run, and with no centre.

Requests that begin alike go where that beginning went last, because its pages are there, unless that replica has far
more to do than the least busy one; all others go to the least busy one, the first of several. Which one serves changes
no bit of an output.
"""

from collections import OrderedDict
from collections.abc import Sequence

FAR_MORE = 8  # samples by which a replica may be ahead of the least busy one and still get what begins alike
REMEMBERED = 4096  # beginnings


class Placement:
    """Remembers where beginnings of prompts went."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._went: OrderedDict[int, int] = OrderedDict()  # the hash of a first page -> replica

    def choose(self, token_ids: Sequence[int], loads: Sequence[int]) -> int:
        """A replica for a request with this prompt, where each replica has `loads[i]` unfinished samples."""
        least = min(loads)
        if len(token_ids) < self.page_size:  # it fills no page, so there is nothing to find again
            return loads.index(least)
        beginning = hash(tuple(token_ids[: self.page_size]))  # of integers: the same in every process
        found = self._went.pop(beginning, None)
        if found is None or loads[found] > least + FAR_MORE:
            found = loads.index(least)
        self._went[beginning] = found
        if len(self._went) > REMEMBERED:
            self._went.popitem(last=False)
        return found
