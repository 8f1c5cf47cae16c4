"""Samples that decode are rows of a prefill step, where there is one: the same bits, and one step instead of two."""

import dataclasses

import pytest
from conftest import NATIVE, bits, make_llm, random_model

from jaxengine import SamplingParams
from jaxengine.engine import engine
from jaxengine.ops.kernels import choose_kernels

pytestmark = NATIVE
PROMPTS = [[1, 2, 3], list(range(4, 9)), list(range(90)), [5] * 47, list(range(30, 63)), list(range(7, 80))]
ASKED = [
    SamplingParams(seed=1, max_tokens=20),
    SamplingParams(seed=2, max_tokens=12, n=3, top_p=0.7),
    SamplingParams(seed=3, max_tokens=5, prompt_logprobs=1, logprobs=2),
    SamplingParams(temperature=0, max_tokens=9, repetition_penalty=1.2),
    SamplingParams(seed=4, max_tokens=8, n=2, min_p=0.1, entropy=True),
    SamplingParams(seed=5, max_tokens=6, temperature=0.6),
]
ROOM = dict(
    kernels="cpu", max_num_batched_tokens=32, max_num_seqs=7
)  # so that prompts come in chunks, one after the other


@pytest.fixture(scope="module")
def model():
    return random_model(num_hidden_layers=2)


@pytest.fixture(scope="module")
def one_after_the_other(model):
    """Bits of an engine in which nothing rides."""

    def packing_nothing(*which):
        kernels = choose_kernels(*which)
        assert kernels.packs_rows
        return dataclasses.replace(kernels, packs_rows=False)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(engine, "choose_kernels", packing_nothing)
        llm = make_llm(*model, **ROOM)
    steps = watched(llm)
    found = bits(llm.generate(PROMPTS, ASKED))
    assert any({"decode", "prefill"} <= step for step in steps)
    return found


def watched(llm) -> list[set[str]]:
    """The kinds of compiled steps that each of the engine's steps will run."""
    steps, dispatch, run = [], llm.engine._dispatch, llm.engine._run

    def dispatched(plan):
        steps.append(set())
        return dispatch(plan)

    def ran(how, variant, inputs):
        steps[-1].add(variant.kind)
        return run(how, variant, inputs)

    llm.engine._dispatch, llm.engine._run = dispatched, ran
    return steps


@pytest.mark.parametrize("how", [{}, {"overlap": True}, {"page_size": 16, "compile_patience": 0}], ids=str)
def test_bits_of_what_rides(model, one_after_the_other, how):
    llm = make_llm(*model, **ROOM | how)
    steps, both = watched(llm), []
    schedule = llm.engine.scheduler.schedule

    def scheduled():
        plan = schedule()
        both.append(bool(plan.decodes and plan.chunks))
        return plan

    llm.engine.scheduler.schedule = scheduled
    assert bits(llm.generate(PROMPTS, ASKED)) == one_after_the_other
    assert sum(both) > 5 and all(len(step) <= 1 for step in steps), "a plan took two steps"


def test_several_steps_a_dispatch_take_no_riders(model, one_after_the_other):
    """The tokens of a dispatch's later steps are drawn on the device, where a prefill draws once."""
    llm = make_llm(*model, **ROOM, decode_steps=3)
    steps = watched(llm)
    assert bits(llm.generate(PROMPTS, ASKED)) == one_after_the_other
    assert any({"decode", "prefill"} <= step for step in steps)
