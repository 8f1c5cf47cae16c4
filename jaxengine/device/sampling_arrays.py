"""Slots as host arrays, numpy: SamplingParams and requests in the form in which a step, or the trainer, takes them."""

from collections.abc import Iterable, Sequence

import numpy as np

from jaxengine.device.step_inputs import RequestArrays, SamplingArrays, Slots
from jaxengine.sampling_params import MAX_LOGIT_BIAS, MAX_STOPS, SamplingParams

MAX_TOP_K = 2**31 - 1  # more than any vocabulary, and an int32


def empty_slots(n: int) -> Slots:
    """n slots that change, cut and ask for nothing."""
    return Slots(empty_sampling(n), empty_requests(n))


def empty_sampling(n: int) -> SamplingArrays:
    """Parameters that leave n distributions as they are."""
    return SamplingArrays(
        temperature=np.ones(n, np.float32),
        top_p=np.ones(n, np.float32),
        min_p=np.zeros(n, np.float32),
        repetition_penalty=np.ones(n, np.float32),
        presence_penalty=np.zeros(n, np.float32),
        frequency_penalty=np.zeros(n, np.float32),
        top_k=np.zeros(n, np.int32),
        stop_ids=_nothing(n, MAX_STOPS),
        bias_ids=_nothing(n, MAX_LOGIT_BIAS),
        bias_values=np.zeros((n, MAX_LOGIT_BIAS), np.float32),
    )


def empty_requests(n: int) -> RequestArrays:
    """n requests of no tokens."""
    return RequestArrays(
        prompt_length=np.zeros(n, np.int32),
        first_stop=np.zeros(n, np.int32),
        limit=np.zeros(n, np.int32),
        key=np.zeros((n, 2), np.uint32),
        key_folds=_nothing(n, 2),
        num_logprobs=np.zeros(n, np.int32),
        details=np.zeros(n, bool),
    )


def _nothing(n: int, width: int) -> np.ndarray:
    return np.full((n, width), -1, np.int32)


def write_sampling(arrays: SamplingArrays, i: int, sampling: SamplingParams, stop_token_ids: Iterable[int]) -> None:
    """Put a request's parameters into slot i. `stop_token_ids` are its own and the model's."""
    arrays.temperature[i] = 0.0 if sampling.greedy else sampling.temperature
    arrays.top_k[i] = min(sampling.top_k, MAX_TOP_K)
    for name in ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        getattr(arrays, name)[i] = getattr(sampling, name)
    arrays.stop_ids[i] = _padded(sorted(stop_token_ids), MAX_STOPS, -1)
    arrays.bias_ids[i] = _padded([token for token, _ in sampling.biases], MAX_LOGIT_BIAS, -1)
    arrays.bias_values[i] = _padded([value for _, value in sampling.biases], MAX_LOGIT_BIAS, 0)


def write_request(arrays: RequestArrays, i: int, **values: object) -> None:
    """Put the named values into slot i."""
    for name, value in values.items():
        getattr(arrays, name)[i] = value


def _padded(values: Sequence[float], size: int, fill: int) -> list[float]:
    return [*values, *[fill] * (size - len(values))]
