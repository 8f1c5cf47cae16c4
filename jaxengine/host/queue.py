"""The samples that wait, in order. Plain Python."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from jaxengine.host.sample import Sample


class Queue:
    """A queue that any of its samples may leave, each move at a cost that does not grow with its length."""

    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self._samples: OrderedDict[Sample, None] = OrderedDict.fromkeys(samples)

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self._samples)

    @property
    def head(self) -> Sample:
        """The sample that is next; there must be one."""
        return next(iter(self._samples))

    def pop(self) -> Sample:
        """Take the head out."""
        return self._samples.popitem(last=False)[0]

    def push(self, sample: Sample) -> None:
        """To the end."""
        self._samples[sample] = None

    def push_front(self, sample: Sample) -> None:
        """To the front: it is the head now."""
        self._samples[sample] = None
        self._samples.move_to_end(sample, last=False)

    def discard(self, sample: Sample) -> None:
        """Take a sample out, wherever it stands; nothing where it is not in the queue."""
        self._samples.pop(sample, None)
