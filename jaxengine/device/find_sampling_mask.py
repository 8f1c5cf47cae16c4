"""The sampling mask of sequences, found by scoring them once under the weights that drew them."""

import operator
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from jaxengine.device import scoring
from jaxengine.device.sampling_mask import SamplingMask, unpacked
from jaxengine.device.scoring import ScoringArrays
from jaxengine.models.params import Decoder
from pallas_kernels.numbers import power_of_two


def find_sampling_mask(
    params: Decoder, tokens: Int[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"], arrays: ScoringArrays, **how: Any
) -> SamplingMask:
    """Numpy arrays. As much as a batch of scoring is on the device at a time, V / 8 bytes a token.

    Raises ValueError where a token under `mask` is outside of what was kept: other weights, or other sampling
    parameters, drew it.
    """
    drawn, batch = mask & _cuts(arrays)[:, None], max(scoring.BATCH_TOKENS // tokens.shape[1], 1)
    counts, ids = np.zeros(tokens.shape, np.int32), []
    for row in range(len(tokens)):
        if row % batch == 0:
            part = operator.itemgetter(slice(row, row + batch))
            own: Any = jax.tree.map(part, (tokens, mask, arrays.each))
            own_arrays = ScoringArrays(own[2], arrays.rules)
            _, words = scoring.in_batches(params, own[0], own[1], own_arrays, kept_words=True, **how)
            assert words is not None
        kept = unpacked(words[row % batch][drawn[row]])
        _check_drawn(row, np.flatnonzero(drawn[row]), tokens[row][drawn[row]], kept)
        counts[row, drawn[row]] = kept.sum(1)
        ids.append(np.nonzero(kept)[1].astype(np.int32))
    width = power_of_two(max(1, *map(len, ids)))  # few widths, because a program is compiled for each
    return SamplingMask(counts, np.stack([np.pad(each, (0, width - len(each)), constant_values=-1) for each in ids]))


def _cuts(arrays: ScoringArrays) -> Bool[np.ndarray, " B"]:
    """Whether top-k, top-p or min-p of each sequence may keep less than the vocabulary."""
    sampling = arrays.each.sampling
    return ((sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)) & (sampling.temperature > 0)


def _check_drawn(row: int, positions: np.ndarray, drawn: np.ndarray, kept: Bool[np.ndarray, "n V"]) -> None:
    outside = ~kept[np.arange(len(drawn)), drawn]
    if outside.any():
        first = int(outside.argmax())
        raise ValueError(
            f"tokens[{row}, {positions[first]}] is {drawn[first]}, which top-k, top-p and min-p do not keep under "
            "these weights and sampling parameters: give those that drew it"
        )
