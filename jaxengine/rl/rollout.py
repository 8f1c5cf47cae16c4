"""Rollout: what was generated, as the arrays that a trainer takes."""
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxengine.outputs import CompletionOutput, RequestOutput
from jaxengine.pytree import pytree

Array = Any  # numpy as it is built, jax.Array inside a trainer's step



@pytree
class Rollout:
    """B samples, a row each: prompt then completion, padded on the right with token 0.

    `score(params, rollout.tokens, rollout.mask, sampling_params, config=…)` gives `logprobs` again, bit for bit.
    """

    tokens: Int[Array, "B T"]
    mask: Bool[Array, "B T"]  # True on generated tokens
    logprobs: Float[Array, "B T"]  # of generated tokens, each at its own position; 0 elsewhere
    lengths: Int[Array, " B"]  # prompt and completion
    group: Int[Array, " B"]  # index of the prompt: samples of one prompt share it
    weight_versions: Int[Array, "B T"]  # of the weights that drew each generated token; -1 elsewhere
    entropies: Float[Array, "B T"] | None = None  # of the processed distribution, where it was asked for

    @classmethod
    def from_outputs(cls, outputs: Sequence[RequestOutput], *, length: int | None = None) -> "Rollout":
        """Numpy arrays of all samples, in order. T is `length`, or that of the longest sample.

        Raises ValueError where there is no sample, or one is longer than `length`, or only some have entropies.
        """
        rows = [(group, output.prompt_token_ids, sample) for group, output in enumerate(outputs) for sample in output.outputs]
        if not rows:
            raise ValueError("no outputs: a rollout has at least one sample")
        lengths = np.array([len(prompt) + len(sample.token_ids) for _, prompt, sample in rows], np.int32)
        width = int(lengths.max()) if length is None else length
        if lengths.max() > width:
            raise ValueError(f"sample {int(lengths.argmax())} has {lengths.max()} tokens, more than length={length}")
        place = lambda dtype, fill, part: _placed((len(rows), width), dtype, fill, rows, part)
        return cls(
            _tokens((len(rows), width), rows), place(bool, False, lambda s: True), place(np.float32, 0, lambda s: s.token_logprobs),
            lengths, np.array([group for group, _, _ in rows], np.int32), place(np.int32, -1, _versions),
            place(np.float32, 0, lambda s: s.entropies) if _have_entropies(rows) else None)


Row = tuple[int, list[int], CompletionOutput]


def _tokens(shape: tuple[int, int], rows: list[Row]) -> np.ndarray:
    tokens = np.zeros(shape, np.int32)
    for row, (_, prompt, sample) in zip(tokens, rows, strict=True):
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + len(sample.token_ids)] = sample.token_ids
    return tokens


def _placed(shape, dtype, fill, rows: list[Row], part) -> np.ndarray:
    """`part(sample)` on each row's generated tokens, `fill` elsewhere."""
    out = np.full(shape, fill, dtype)
    for row, (_, prompt, sample) in zip(out, rows, strict=True):
        row[len(prompt) : len(prompt) + len(sample.token_ids)] = part(sample)
    return out


def _versions(sample: CompletionOutput) -> np.ndarray:
    spans = sample.weight_versions
    return np.repeat(np.array([span.version for span in spans], np.int32), [span.stop - span.start for span in spans])


def _have_entropies(rows: list[Row]) -> bool:
    have = {sample.entropies is not None for _, _, sample in rows}
    if len(have) > 1:
        raise ValueError("only some samples have entropies: ask for them in all sampling parameters, or in none")
    return have.pop()
