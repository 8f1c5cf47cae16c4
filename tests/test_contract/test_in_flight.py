"""New weights while requests run: each token's bits are those of the weights, keys and values that its version names.

A call is cut between two steps by weights that come in. Fresh engines say what must follow: one that goes on from the
tokens drawn so far ("recompute"), one with less room that is cut at the same token ("keep"), and one that never saw the
new weights ("drain").
"""

import dataclasses

import jax
import pytest
from conftest import bits, make_llm, random_model

from jaxengine import LLM, SamplingParams
from jaxengine.base.keys import sample_key
from jaxengine.models.params import initialise

PROMPTS = [[3], list(range(56)), list(range(100, 190)), [9] * 20]
PARAMS = SamplingParams(max_tokens=40, temperature=0.8, top_p=0.9, n=2, repetition_penalty=1.1)
KEY = jax.random.key(5)
LITTLE_ROOM = dict(held_pages=390, held_slots=29, enable_prefix_caching=False)


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def other(model):
    """Weights of the same shapes that give quite other tokens."""
    return initialise(model[0], jax.random.key(9), scale=0.1)


def engine(model, **changes) -> LLM:
    return make_llm(*model, **changes)


def cut(llm: LLM, steps: int, update, prompts=PROMPTS, params=PARAMS, **adjusted) -> list:
    """The outputs of a call that `update(llm)` interrupts after so many steps; requests share cached prefixes."""
    with llm.engine.adjusted(**adjusted):
        requests = llm.admitted(prompts, params, KEY, None)
        run = llm.session.runner.run(requests)
        for _ in range(steps):
            next(run)
        update(llm)
        for _ in run:
            pass
    llm.engine.scheduler.check_integrity()
    assert all(request.is_finished for request in requests) and not llm.engine.requests
    return [llm.session.output(request) for request in requests]


def spans(outputs) -> list[list[tuple[int, int, int]]]:
    return [[(span.version, span.start, span.stop) for span in sample.weight_versions] for sample in samples(outputs)]


def samples(outputs) -> list:
    return [sample for output in outputs for sample in output.outputs]


def front_of(outputs, cut_outputs) -> list:
    """The first tokens of the outputs: as many as the first weights drew in the cut ones."""
    first = lambda s, c: dataclasses.replace(
        s,
        token_ids=s.token_ids[: old_tokens(c)],
        token_logprobs=s.token_logprobs[: old_tokens(c)],
        finish_reason="abort",
    )
    return [
        dataclasses.replace(o, outputs=[*map(first, o.outputs, c.outputs)])
        for o, c in zip(outputs, cut_outputs, strict=True)
    ]


def old_tokens(sample) -> int:
    """How many tokens the first weights drew."""
    first = sample.weight_versions[0]
    return first.stop if first.version == 0 else 0


def front(outputs) -> list:
    """The outputs as they stood when the new weights came."""
    old = lambda sample: [span for span in sample.weight_versions if span.version == 0]
    begun = lambda output: dataclasses.replace(
        output, outputs=[dataclasses.replace(s, weight_versions=old(s)) for s in output.outputs]
    )
    return [*map(begun, front_of(outputs, outputs))]


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
@pytest.mark.parametrize("steps", [1, 3, 17])
def test_recompute_goes_on_as_a_fresh_engine_under_the_new_weights(model, other, steps, overlap):
    found = cut(engine(model, overlap=overlap), steps, lambda llm: llm.update_params(other))
    assert all(of_one[-1][0] == 1 for of_one in spans(found)) and (
        steps < 3 or any(len(of_one) == 2 for of_one in spans(found))
    )
    fresh = engine((model[0], other), overlap=not overlap)
    assert bits(fresh.extend(front(found), PARAMS)) == bits(found)
    untouched = engine(model).generate(PROMPTS, PARAMS, key=KEY)
    assert bits(front(found)) == bits(front_of(untouched, found))
    assert all(a.token_ids != b.token_ids for a, b in zip(samples(found), samples(untouched), strict=True)), (
        "other weights drew the same"
    )


def test_keep_depends_on_the_cut_alone(model, other):
    """The same cut in an engine with less room, one prompt at a time; and recomputing gives another cache."""
    keep = lambda llm: llm.update_params(other, in_flight="keep")
    found = cut(engine(model), 12, keep)
    recomputed = engine((model[0], other)).extend(front(found), PARAMS)
    assert all(len(of_one) == 2 for of_one in spans(found)), "each sample was to be cut amid its tokens"
    for index in (1, 2):
        for sample in found[index].outputs:
            params = PARAMS.replace(n=1, key=sample_key(KEY, index, sample.index))
            steps = old_tokens(sample)  # the plain loop draws a token a step
            (again,) = cut(engine(model), steps, keep, [PROMPTS[index]], params, **LITTLE_ROOM)
            assert bits([again]) == bits([dataclasses.replace(found[index], outputs=[sample])])
            assert again.outputs[0].weight_versions == sample.weight_versions
    assert bits(recomputed) != bits(found)


def test_keep_with_the_same_weights_moves_no_bit_and_recompute_neither(model):
    expected = bits(engine(model).generate(PROMPTS, PARAMS, key=KEY))
    for in_flight in ("keep", "recompute", "drain"):
        assert (
            bits(cut(engine(model), 9, lambda llm, how=in_flight: llm.update_params(model[1], in_flight=how)))
            == expected
        )


def test_kept_pages_serve_no_other_request(model, other):
    """After an update no request reads a page that was written, in part or in whole, under other weights."""
    llm = engine(model)
    cut(llm, 12, lambda llm: llm.update_params(other, in_flight="keep"))
    fresh = engine((model[0], other))
    assert bits(llm.generate(PROMPTS, PARAMS, key=KEY)) == bits(fresh.generate(PROMPTS, PARAMS, key=KEY))
    llm.update_params(model[1])
    assert bits(llm.generate(PROMPTS, PARAMS, key=KEY)) == bits(engine(model).generate(PROMPTS, PARAMS, key=KEY))


def test_drain_ends_what_runs_under_the_old_weights(model, other):
    found = cut(engine(model), 5, lambda llm: llm.update_params(other, in_flight="drain"))
    assert bits(found) == bits(engine(model).generate(PROMPTS, PARAMS, key=KEY))
    assert {version for of_one in spans(found) for version, _, _ in of_one} == {0}


def test_many_updates_in_one_call(model, other):
    """An update every third step, with the policies in turns, in a pool so small that it has to preempt."""
    llm = engine(model)
    with llm.engine.adjusted(held_pages=380, held_slots=26):
        requests = llm.admitted(PROMPTS, PARAMS, KEY, None)
        for step, _ in enumerate(llm.session.runner.run(requests)):
            if step % 3 == 2:
                llm.update_params((other, model[1])[step // 3 % 2], in_flight=("recompute", "keep")[step // 6 % 2])
    llm.engine.scheduler.check_integrity()
    assert llm.engine.scheduler.num_preemptions > 0
    for of_one in spans([llm.session.output(request) for request in requests]):
        assert [start for _, start, _ in of_one[1:]] == [stop for _, _, stop in of_one[:-1]] and of_one[0][1] == 0
        assert of_one[-1][2] == PARAMS.max_tokens and [v for v, _, _ in of_one] == sorted({v for v, _, _ in of_one})


# -- partial rollouts -------------------------------------------------------------------------------------------------


def test_a_partial_rollout_goes_on_with_the_same_bits(model):
    expected = engine(model).generate(PROMPTS, PARAMS, key=KEY)
    llm = engine(model)
    outputs = llm.generate(PROMPTS, PARAMS.replace(max_tokens=7), key=KEY)
    outputs = llm.extend(outputs, PARAMS.replace(max_tokens=25))
    assert [sample.finish_reason for sample in samples(outputs)] == ["length"] * 8
    assert bits(llm.extend(outputs, PARAMS)) == bits(expected)


def test_an_aborted_sample_goes_on_from_where_it_stood(model):
    expected = engine(model).generate(PROMPTS, PARAMS, key=KEY)
    llm = engine(model)
    for steps in (1, 6):
        run = llm.session.runner.run(requests := llm.admitted(PROMPTS, PARAMS, KEY, None))
        for _ in range(steps):
            next(run)
        run.close()
        assert bits(llm.extend([llm.session.output(request) for request in requests])) == bits(expected)


def test_what_a_stop_ended_stays_as_it_is(model):
    llm = engine(model)
    whole = llm.generate(PROMPTS, PARAMS, key=KEY)
    stop = whole[1].outputs[0].token_ids[4]
    params = PARAMS.replace(stop_token_ids=[stop], max_tokens=12)
    outputs = llm.generate(PROMPTS, params, key=KEY)
    assert "stop" in {sample.finish_reason for sample in samples(outputs)}
    llm.update_params(model[1])
    more = llm.extend(outputs, params.replace(max_tokens=30))
    expected = llm.generate(PROMPTS, params.replace(max_tokens=30), key=KEY)
    assert bits(more) == bits(expected)
    first = outputs[1].outputs[0]
    assert more[1].outputs[0].weight_versions == first.weight_versions and first.finish_reason == "stop"
