"""Sampling parameters as arrays: what a step, or the trainer, knows of each sequence (step_inputs.SlotParams). Host arrays, numpy."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from jaxengine.device.step_inputs import SamplingArrays
from jaxengine.sampling_params import MAX_LOGIT_BIAS, MAX_STOPS, SamplingParams

MAX_TOP_K = 2**31 - 1  # more than any vocabulary, and an int32


def empty_slots(n: int) -> SamplingArrays:
    """Parameters under which nothing is changed, cut or asked for."""
    zeros = lambda dtype, *shape: np.zeros((n, *shape), dtype)
    ones = lambda: np.ones(n, np.float32)
    missing = lambda width: np.full((n, width), -1, np.int32)
    fields = dict(
        temperature=ones(),
        top_p=ones(),
        min_p=zeros(np.float32),
        repetition_penalty=ones(),
        presence_penalty=zeros(np.float32),
        frequency_penalty=zeros(np.float32),
        top_k=zeros(np.int32),
        prompt_length=zeros(np.int32),
        first_stop=zeros(np.int32),
        stop_ids=missing(MAX_STOPS),
        bias_ids=missing(MAX_LOGIT_BIAS),
        bias_values=zeros(np.float32, MAX_LOGIT_BIAS),
        limit=zeros(np.int32),
        key=zeros(np.uint32, 2),
        key_folds=missing(2),
        num_logprobs=zeros(np.int32),
        details=zeros(bool),
    )
    assert set(fields) == {field.name for field in dataclasses.fields(SamplingArrays)}
    return SamplingArrays(**fields)


def write_slot(
    slots: SamplingArrays, i: int, params: SamplingParams, stop_token_ids: Iterable[int], **more: object
) -> None:
    """Put a request's parameters into slot i; `more` are the fields that depend on where it stands."""
    values = dict(
        temperature=0.0 if params.greedy else params.temperature,
        top_p=params.top_p,
        min_p=params.min_p,
        top_k=min(params.top_k, MAX_TOP_K),
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        stop_ids=_padded(sorted(stop_token_ids), MAX_STOPS, -1),
        bias_ids=_padded([token for token, _ in params.biases], MAX_LOGIT_BIAS, -1),
        bias_values=_padded([value for _, value in params.biases], MAX_LOGIT_BIAS, 0),
    )
    for name, value in (values | more).items():
        getattr(slots, name)[i] = value


def _padded(values: Sequence[float], size: int, fill: int) -> list[float]:
    return [*values, *[fill] * (size - len(values))]
