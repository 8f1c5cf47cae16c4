"""Comparing samples by bits: tokens, and logprobs as uint32."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxengine.outputs import CompletionOutput

SampleBits = CompletionOutput | tuple[Sequence[int], np.ndarray]  # an output, or (token ids, logprobs)


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
        detail = f"; first difference: {self.first_difference}" if self.first_difference else ""
        return f"{self.equal} of {self.total} samples {self.name}{detail}"


def compare(name: str, expected: Sequence[SampleBits], found: Sequence[SampleBits]) -> Comparison:
    """Compare samples one by one. Samples that are missing count as different."""
    differences = []
    for index, (a, b) in enumerate(zip(expected, found, strict=False)):
        text = difference(a, b)
        if text is not None:
            differences.append(f"sample {index}, {text}")
    present, total = min(len(expected), len(found)), max(len(expected), len(found))
    differences += [f"sample {index} is missing" for index in range(present, total)]
    return Comparison(name, total - len(differences), total, differences[0] if differences else None)


def difference(a: SampleBits, b: SampleBits) -> str | None:
    """Where two samples first differ, None if every bit is equal."""
    rows = [list(zip(*_bits(sample), strict=True)) for sample in (a, b)]
    for position, (x, y) in enumerate(zip(*rows, strict=False)):
        if x != y:
            return f"token {position}: id {x[0]}, logprob bits {x[1]:08x} became {y[0]}, {y[1]:08x}"
    return None if len(rows[0]) == len(rows[1]) else f"{len(rows[0])} tokens became {len(rows[1])}"


def _bits(sample: SampleBits) -> tuple[list[int], list[int]]:
    token_ids, logprobs = sample if isinstance(sample, tuple) else (sample.token_ids, sample.token_logprobs)
    return list(token_ids), np.asarray(logprobs, np.float32).view(np.uint32).tolist()
