"""The samples that wait, in order. Plain Python."""

import bisect
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from jaxengine.host.sample import Sample


class Queue:
    """A queue that any of its samples may leave; of the lowest priority that waits, the sample that came first is next.

    Each move has a cost that does not grow with the queue's length, but with the number of priorities in it. Its length
    may be asked for by any thread, while another one moves samples.
    """

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self._lines: dict[int, OrderedDict[Sample, None]] = {}  # by priority, none of them empty
        self._priorities: list[int] = []  # of the lines, in order
        self._length = 0
        for sample in samples:
            self.push(sample)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sample]:
        for priority in self._priorities:
            yield from self._lines[priority]

    @property
    def head(self) -> Sample:
        """The sample that is next; there must be one."""
        return next(iter(self._lines[self._priorities[0]]))

    def pop(self) -> Sample:
        """Take the head out."""
        head = self.head
        self.discard(head)
        return head

    def push(self, sample: Sample) -> None:
        """To the end of its priority's line; nothing where it is in the queue."""
        self._put(sample)

    def push_front(self, sample: Sample) -> None:
        """To the front of its priority's line."""
        self._put(sample).move_to_end(sample, last=False)

    def discard(self, sample: Sample) -> None:
        """Take a sample out, wherever it stands; nothing where it is not in the queue."""
        line = self._lines.get(sample.priority, {})
        if sample in line:
            del line[sample]
            self._length -= 1
            if not line:
                del self._lines[sample.priority]
                self._priorities.remove(sample.priority)

    def _put(self, sample: Sample) -> OrderedDict[Sample, None]:
        """The line that the sample stands in now."""
        priority = sample.priority
        if priority not in self._lines:
            self._lines[priority] = OrderedDict()
            bisect.insort(self._priorities, priority)
        line = self._lines[priority]
        self._length += sample not in line
        line[sample] = None
        return line
