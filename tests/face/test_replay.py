"""Coordinates: one sample's place, its way through JSON, and drawing it again."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import make_llm

from jaxengine import SamplingParams
from jaxengine.coordinate import Contract, Coordinate

MIX = [
    SamplingParams(n=3, temperature=0.8, top_p=0.9, max_tokens=6, logit_bias={5: 1.5}, stop_token_ids=[7]),
    SamplingParams(temperature=0.0, max_tokens=5, logprobs=2),
    SamplingParams(seed=2**40 + 5, max_tokens=7, repetition_penalty=1.2),
    SamplingParams(key=jax.random.key(9), n=2, max_tokens=4, min_tokens=2, ignore_eos=True),
]


@pytest.fixture(scope="module")
def samples(tiny):
    outputs = tiny.generate([[1, 2, 3], list(range(40)), [9], [4, 4]], MIX, key=jax.random.key(1))
    return [sample for output in outputs for sample in output.outputs]


def test_every_sample_is_drawn_again(tiny, samples):
    assert len(samples) == 7
    for sample in samples:
        assert tiny.replay(sample.coordinate).holds


def test_json_keeps_every_bit(tiny, samples):
    for sample in samples:
        text = sample.coordinate.to_json()
        read = Coordinate.from_json(text)
        assert json.loads(read.to_json()) == json.loads(text)
        assert read.token_logprobs.tobytes() == sample.token_logprobs.tobytes()
        assert read.contract.digest == sample.coordinate.contract.digest
        assert tiny.replay(read).holds


def test_a_changed_bit_is_found(tiny, samples):
    coordinate = samples[0].coordinate
    logprobs = coordinate.token_logprobs.copy()
    logprobs.view(np.uint32)[-1] ^= 1
    found = tiny.replay(dataclasses.replace(coordinate, token_logprobs=logprobs))
    assert not found.holds and found.first_difference.startswith(f"sample 0, token {len(logprobs) - 1}: ")
    other = dataclasses.replace(coordinate, key=(0, 12345))
    assert not tiny.replay(other).holds


def test_another_contract_is_refused_with_what_differs(tiny, samples):
    coordinate = samples[0].coordinate
    parts = coordinate.contract.parts
    other = Contract(parts | {"jaxlib": "0.0.1", "model": parts["model"] | {"dtype": "float8"}})
    with pytest.raises(ValueError, match='jaxlib: "0.0.1", here ".*; model.dtype: "float8", here "float32"'):
        tiny.replay(dataclasses.replace(coordinate, contract=other))


def test_other_code_from_the_compiler_is_another_contract(tiny, samples, monkeypatch):
    coordinate = samples[0].coordinate
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=1 --xla_dump_to=/tmp/dumps")
    here = make_llm(tiny.config, tiny.params)
    assert here.contract().digest != coordinate.contract.digest
    with pytest.raises(ValueError, match='another contract.*: compiler.xla_cpu_enable_fast_math: nothing, here "1"$'):
        here.replay(coordinate)


@pytest.mark.parametrize("text", ["{}", "[]", '{"contract": {}, "sampling_params": 3}', "null", "no json"])
def test_what_is_no_coordinate_is_refused(text):
    with pytest.raises(ValueError):
        Coordinate.from_json(text)


def test_a_sample_without_tokens_has_none(tiny):
    request = tiny.generate([[1, 2]], SamplingParams(max_tokens=3), key=jax.random.key(0))[0]
    assert request.outputs[0].coordinate is not None and request.digest == request.outputs[0].coordinate.contract.digest
