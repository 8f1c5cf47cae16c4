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
def expected(model) -> list:
    """By one op after the other, with nothing beside."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "choose_kernels", one_op_after_the_other)
        return bits(make_llm(*model, kernels="cpu").generate(PROMPTS, ASKED))


def one_op_after_the_other(*which):
    kernels = choose_kernels(*which)
    assert kernels.head_and_draw is not None
    return dataclasses.replace(kernels, head_and_draw=None)


@pytest.mark.parametrize("beside", NEIGHBOURS)
def test_bits_are_those_of_the_ops(model, expected, beside):
    others = NEIGHBOURS[beside]
    llm = make_llm(*model, kernels="cpu")
    found = bits(llm.generate(PROMPTS + [[16, 17, 18]] * len(others), ASKED + others))
    assert found[: len(expected)] == expected and len(found) == len(expected) + len(others)


def test_a_mesh_has_no_such_op(model):
    """Its devices have the head by leaves, and share the rows after it."""
    kernels = choose_kernels("cpu", model[0])
    assert kernels.with_leaves(LeavesOfDevices("tensor", 2)).head_and_draw is None
