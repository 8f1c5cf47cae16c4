"""One step as the scheduler plans it: what decodes, what is prefilled, which pages are copied. Plain Python."""

import dataclasses
import functools
from typing import NamedTuple

from jaxengine.config import QUERY_BLOCK
from jaxengine.host.sample import Sample
from pallas_kernels.numbers import cdiv


class Decode(NamedTuple):
    """A sample that decodes: its last token stands at `position`, and `count` tokens are drawn after it."""

    sample: Sample
    position: int
    count: int


# Takes (sample, position, count). Decode(…) is a Python function, this is its half in C: a step makes hundreds of them.
new_decode = functools.partial(tuple.__new__, Decode)


class Row(NamedTuple):
    """A position of a chunk whose next token is drawn, or whose next token, the prompt's own, is scored."""

    sample: Sample
    position: int
    scored: bool


@dataclasses.dataclass
class Chunk:
    """Tokens [start, stop) of a sample to prefill. The last chunk also draws, for the sample and for its forks.

    `rows` are in the order in which the step answers them. They are written down when the plan is made, because what a
    sample still owes changes as soon as results of an earlier step are collected.
    """

    sample: Sample
    start: int
    stop: int
    is_last: bool
    forks: list[Sample] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)

    @property
    def num_blocks(self) -> int:
        return cdiv(self.stop - self.start, QUERY_BLOCK)

    @property
    def samples(self) -> list[Sample]:
        return [self.sample, *self.forks]

    def wanted_rows(self) -> list[Row]:
        """The prompt's positions to be scored, then the last position once for each sample that draws there."""
        rows = []
        if self.sample.scores_prompt:
            last = min(self.stop, self.sample.prompt_length - 1)
            rows += [Row(self.sample, position, True) for position in range(self.start, last)]
        if self.is_last:
            rows += [Row(sample, self.stop - 1, False) for sample in self.samples]
        return rows


@dataclasses.dataclass
class Plan:
    """One step: the decodes, then a prefill of the chunks, or both at once, then the page copies (source, target)."""

    decodes: list[Decode] = dataclasses.field(default_factory=list)
    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    admitted: list[Sample] = dataclasses.field(default_factory=list)
    grown: list[Sample] = dataclasses.field(default_factory=list)  # those that got pages since the plan before
    steered: list[Sample] = dataclasses.field(default_factory=list)  # those that draw under a grammar

    def __bool__(self) -> bool:
        return bool(self.decodes or self.chunks)

    @property
    def decoding(self) -> list[Sample]:
        return [decode.sample for decode in self.decodes]

    @property
    def prefilling(self) -> list[Sample]:
        """The samples whose chunks are prefilled, whether or not they want a row; few, where many decode."""
        return [sample for chunk in self.chunks for sample in chunk.samples]

    @property
    def rows(self) -> list[Row]:
        """The rows of all chunks, in the order in which the prefill answers them."""
        return [row for chunk in self.chunks for row in chunk.rows]
