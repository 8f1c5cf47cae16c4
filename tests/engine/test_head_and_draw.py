"""A token has the same bits whether one op went from its hidden state to it, or one op after the other."""

import dataclasses

import pytest
from conftest import NATIVE, bits, make_llm, random_model

from jaxengine import SamplingParams
from jaxengine.engine import engine
from jaxengine.ops.kernels import choose_kernels
from sharding.leaves import LeavesOfDevices

pytestmark = NATIVE
PROMPTS = [[1, 2, 3], [4] * 20, [5, 6, 7, 8, 9], [10, 11], [12], [13, 14, 15]]
ASKED = [
    SamplingParams(seed=1, max_tokens=6),
    SamplingParams(temperature=0, max_tokens=6),
    SamplingParams(seed=2, max_tokens=6, temperature=0.6, top_k=20),
    SamplingParams(seed=3, max_tokens=6, top_p=0.7, n=3),
    SamplingParams(seed=4, max_tokens=6, min_p=0.1, temperature=1.7),
    SamplingParams(temperature=0, max_tokens=6, top_k=1, top_p=0.5),
]
NEIGHBOURS = {  # what else runs, so that the steps of all are compiled for it, and some of them take it
    "nothing": [],
    "a penalty": [SamplingParams(seed=5, max_tokens=3, repetition_penalty=1.3)],
    "rules": [SamplingParams(seed=5, max_tokens=3, allowed_token_ids=[3, 4], min_tokens=2)],
    "logprobs": [SamplingParams(seed=5, max_tokens=3, logprobs=2, prompt_logprobs=1, entropy=True, raw_logprobs=True)],
}


@pytest.fixture(scope="module")
def model():
    return random_model(num_hidden_layers=1)


@pytest.fixture(scope="module")
def by_ops(model):
    """An LLM that takes one op after the other."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "choose_kernels", one_op_after_the_other)
        return make_llm(*model, kernels="cpu")


def one_op_after_the_other(*which):
    kernels = choose_kernels(*which)
    assert kernels.head_and_draw is not None
    return dataclasses.replace(kernels, head_and_draw=None)


def details(outputs) -> list[tuple]:
    """What a request that asks for more is told beside its bits."""
    samples = [sample for output in outputs for sample in output.outputs]
    arrays = [(sample.raw_logprobs, sample.entropies) for sample in samples]
    return [
        (sample.logprobs, *(None if array is None else array.tobytes() for array in of))
        for sample, of in zip(samples, arrays, strict=True)
    ]


@pytest.mark.parametrize("beside", NEIGHBOURS)
def test_bits_are_those_of_the_ops(model, by_ops, beside):
    """Those of the others too, which are told all that they ask for."""
    prompts, asked = PROMPTS + [[16, 17, 18]] * len(NEIGHBOURS[beside]), ASKED + NEIGHBOURS[beside]
    own = make_llm(*model, kernels="cpu")
    assert own.engine.kernels.head_and_draw is not None and by_ops.engine.kernels.head_and_draw is None
    found, expected = (llm.generate(prompts, asked) for llm in (own, by_ops))
    assert bits(found) == bits(expected) and details(found) == details(expected)
    assert bits(found)[: len(ASKED) + 2] == bits(by_ops.generate(PROMPTS, ASKED))


def test_a_mesh_has_no_such_op(model):
    """Its devices have the head by leaves, and share the rows after it."""
    kernels = choose_kernels("cpu", model[0])
    assert kernels.with_leaves(LeavesOfDevices("tensor", 2)).head_and_draw is None
