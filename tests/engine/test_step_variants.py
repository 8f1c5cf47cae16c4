"""Steps are compiled for what is asked of them: which one serves, and that all have the same bits."""

import numpy as np
import pytest
from conftest import ONE_TILE, bits, make_llm, random_model

from jaxengine import SamplingParams
from jaxengine.device.needs import Needs, needs_of
from jaxengine.engine import batch, step_variants
from jaxengine.engine.step_variants import StepVariants, Variant
from jaxengine.models import params as model_params
from jaxengine.ops.tiles import BASE

PROMPTS = [[1, 2, 3], [4] * 40, list(range(5, 70))]
PLAIN, CUT = SamplingParams(max_tokens=8, seed=1), SamplingParams(max_tokens=8, seed=1, top_k=20, top_p=0.8)


@pytest.mark.parametrize(
    "asked, needs",
    [
        ({}, Needs.PLAIN),
        (dict(temperature=0.3, n=4, stop=["x"], seed=3), Needs.PLAIN),
        (dict(top_k=5), Needs.CUT),
        (dict(top_p=0.9), Needs.CUT),
        (dict(min_p=0.1), Needs.CUT),
        (dict(top_k=5, temperature=0), Needs.PLAIN),
        (dict(top_k=5, logprobs=0), Needs.ALL),
        (dict(prompt_logprobs=1), Needs.ALL),
        (dict(logprob_token_ids=[3]), Needs.ALL),
        (dict(raw_logprobs=True), Needs.ALL),
        (dict(entropy=True), Needs.ALL),
        (dict(repetition_penalty=1.1, temperature=0), Needs.ALL),
        (dict(presence_penalty=0.1), Needs.ALL),
        (dict(frequency_penalty=-0.1), Needs.ALL),
        (dict(min_tokens=2), Needs.ALL),
        (dict(min_tokens=2, ignore_eos=True), Needs.PLAIN),  # there is no token that could come too early
        (dict(min_tokens=2, ignore_eos=True, stop_token_ids=[3]), Needs.ALL),
        (dict(logit_bias={3: 1.0}), Needs.ALL),
        (dict(allowed_token_ids=[3, 4]), Needs.ALL),
        (dict(bad_words_token_ids=[[3]]), Needs.ALL),
    ],
)
def test_what_a_request_asks_for(asked, needs):
    assert needs_of(SamplingParams(**asked)) == needs


def served(llm, monkeypatch) -> list[Variant]:
    """The variants that run from now on."""
    found, run = [], StepVariants._run
    monkeypatch.setattr(
        StepVariants, "_run", lambda self, variant, *rest: found.append(variant) or run(self, variant, *rest)
    )
    return found


def one_layer() -> tuple:
    return random_model(num_hidden_layers=1)


def test_bits_are_those_of_every_variant(monkeypatch):
    """A request is served by the least that covers a step, and has the bits of a step that could do everything."""
    llm, expected = make_llm(*one_layer()), {}
    for sampling in (PLAIN, CUT, PLAIN.replace(temperature=0)):
        expected[sampling] = bits(llm.generate(PROMPTS, sampling))
    assert {v.needs for v in llm.engine.step_variants._compiled} == {Needs.PLAIN, Needs.CUT}
    monkeypatch.setattr(batch, "needs_of", lambda sampling: Needs.ALL)
    widest = make_llm(*one_layer())
    for sampling, found in expected.items():
        assert bits(widest.generate(PROMPTS, sampling)) == found
    assert {v.needs for v in widest.engine.step_variants._compiled} == {Needs.ALL}


def test_one_that_can_do_more_serves_for_good_where_it_skips(tiny, monkeypatch):
    llm = make_llm(tiny.config, tiny.params)
    found = served(llm, monkeypatch)
    llm.generate(PROMPTS, PLAIN.replace(logprobs=2))
    assert {v.needs for v in found} == {Needs.ALL}
    found.clear()
    llm.generate(PROMPTS, CUT.replace(max_tokens=40))
    assert {v.needs for v in found} == {Needs.ALL}


@pytest.mark.slow  # interpreted
def test_a_step_without_conditionals_does_no_more_than_is_asked(monkeypatch):
    """Where nothing is skipped, as on a GPU, the narrower step is compiled once it has been wanted often enough."""
    monkeypatch.setattr(step_variants, "TILES", ONE_TILE)
    llm = make_llm(*one_layer(), kernels="pallas_gpu_interpret", compile_patience=2)
    assert not llm.engine.kernels.skips
    found = served(llm, monkeypatch)
    first = bits(llm.generate(PROMPTS[:1], PLAIN.replace(logprobs=2)))
    found.clear()
    again = bits(llm.generate(PROMPTS[:1], PLAIN))
    decodes = [v.needs for v in found if v.kind == "decode" and v.tile == BASE]
    assert decodes[:2] == [Needs.ALL] * 2 and decodes[-1] == Needs.PLAIN
    assert [each[:2] for each in again] == [each[:2] for each in first]


def test_a_program_holds_what_it_is_compiled_for(tiny):
    """Conditionals are XLA's on a CPU; the plain step has none. Kernels that cut in one op need none for cuts either,
    and one more where everything can be asked.
    """
    variants, cache = tiny.engine.step_variants, tiny.engine.cache
    weights = model_params.abstract(tiny.config)

    def conditionals(needs: Needs) -> int:
        return variants.lowered(Variant("decode", BASE, needs), weights, cache).as_text().count("stablehlo.case")

    cuts_in_one_op = tiny.engine.kernels.head_and_draw is not None
    assert [conditionals(needs) for needs in Needs] == ([0, 0, 7] if cuts_in_one_op else [0, 1, 6])


def test_a_variant_of_other_bits_never_serves(monkeypatch):
    """A planted machine that rounds the step with penalties in another way."""
    llm, probe = make_llm(*one_layer()), StepVariants._probe

    def rounding(self, variant, params, cache):
        cache, (tokens, logprobs, *rest) = probe(self, variant, params, cache)
        if variant.needs == Needs.ALL:
            logprobs = np.nextafter(logprobs, np.float32(0))
        return cache, [tokens, logprobs, *rest]

    expected = bits(llm.generate(PROMPTS, PLAIN))
    monkeypatch.setattr(StepVariants, "_probe", rounding)
    with pytest.raises(RuntimeError, match="with all that can be asked gives other bits than the decode step"):
        llm.generate(PROMPTS, PLAIN.replace(logprobs=1))
    assert bits(llm.generate(PROMPTS, PLAIN)) == expected
    monkeypatch.undo()
    assert bits(llm.generate(PROMPTS, PLAIN.replace(logprobs=1))) == expected
