"""Comparing samples by bits: tokens, and logprobs as uint32."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxengine.outputs import CompletionOutput

Sample = CompletionOutput | tuple[Sequence[int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How samples that were drawn again compare with the first ones: tokens, and logprobs as uint32."""

    name: str
    equal: int
    total: int
    first_difference: str | None = None

    @property
    def holds(self) -> bool:
        return self.equal == self.total

    def __str__(self) -> str:
        found = f"; first difference: {self.first_difference}" if self.first_difference else ""
        return f"{self.equal} of {self.total} samples {self.name}{found}"


def compare(name: str, expected: Sequence[Sample], found: Sequence[Sample]) -> Comparison:
    """Compare samples one by one, outputs or pairs (token ids, logprobs); samples that are missing count as different."""
    differences = [text and f"sample {i}, {text}" for i, text in enumerate(map(difference, expected, found))]
    total = max(len(expected), len(found))
    differences += [f"sample {i} is missing" for i in range(len(differences), total)]
    return Comparison(name, differences.count(None), total, next(filter(None, differences), None))


def difference(a: Sample, b: Sample) -> str | None:
    """Where two samples part, None where every bit is equal."""
    rows = [list(zip(*_bits(sample), strict=True)) for sample in (a, b)]
    for position, (x, y) in enumerate(zip(*rows, strict=False)):
        if x != y:
            return f"token {position}: id {x[0]}, logprob bits {x[1]:08x} became {y[0]}, {y[1]:08x}"
    return None if len(rows[0]) == len(rows[1]) else f"{len(rows[0])} tokens became {len(rows[1])}"


def _bits(sample: Sample) -> tuple[list[int], list[int]]:
    token_ids, logprobs = sample if isinstance(sample, tuple) else (sample.token_ids, sample.token_logprobs)
    return list(token_ids), np.asarray(logprobs, np.float32).view(np.uint32).tolist()
