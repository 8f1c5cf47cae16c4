"""Structured outputs: texts follow, `score` gives their bits, and neither they nor their neighbours know each other."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from conftest import ENGINE, ONE_TILE, bits, make_llm

from jaxengine import LLM, Rollout, SamplingParams, StructuredOutputsParams, grammar_mask, score
from jaxengine.coordinate import Contract, Coordinate
from jaxengine.engine import step_variants
from jaxengine.text.grammar import Grammar

pytest.importorskip("llguidance")  # an extra, `structured`
SCHEMA = {
    "type": "object",
    "properties": {
        "sum": {"type": "integer", "minimum": 0, "maximum": 999},
        "parts": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "kind": {"enum": ["plus", "minus"]},
    },
    "required": ["sum", "parts", "kind"],
    "additionalProperties": False,
}
PAIR = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2}
CHOICES = ["plus", "minus", 'a"b\\c', "naïve 😀", "line\nbreak"]
PROMPTS = ["12+30=", "7*8=", "9-4=", "1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1+1="]
STRUCTURED = [
    SamplingParams(n=2, max_tokens=60, structured_outputs={"json": SCHEMA}),
    SamplingParams(max_tokens=12, temperature=0.7, top_p=0.9, structured_outputs={"regex": "[0-9]{2,6}(,[0-9]+)?"}),
    SamplingParams(n=2, max_tokens=30, temperature=1.5, repetition_penalty=1.2, structured_outputs={"choice": CHOICES}),
    SamplingParams(max_tokens=25, temperature=0, structured_outputs={"grammar": 'start: "(" start ")" | /[a-c]{1,9}/'}),
]
PLAIN = [SamplingParams(max_tokens=30), SamplingParams(n=2, max_tokens=20, top_k=20), SamplingParams(temperature=0)]
KEY = jax.random.key(3)


def texts(outputs) -> list[str]:
    return [sample.text for output in outputs for sample in output.outputs]


def drawn(llm: LLM, beside: int = 0, **adjusted) -> list:
    """The bits of the structured requests, with some plain ones in the same batch."""
    params = [part.replace(seed=index) for index, part in enumerate(STRUCTURED + PLAIN[:beside])]
    prompts = PROMPTS + ["3+4="] * beside
    with llm.engine.adjusted(**adjusted):
        return bits(llm.generate(prompts, params)[: len(STRUCTURED)])


@pytest.fixture(scope="module")
def expected(calc):
    return drawn(calc)


# -- what follows what -------------------------------------------------------------------------------------------------


def test_a_hundred_of_a_hundred_follow_the_schema(calc):
    params = SamplingParams(n=50, max_tokens=200, structured_outputs=StructuredOutputsParams(json=SCHEMA))
    outputs = calc.generate(PROMPTS[:2], params, key=KEY)
    for text in texts(outputs):
        found = json.loads(text)
        assert list(found) == ["sum", "parts", "kind"] and found["kind"] in ("plus", "minus")
        assert 0 <= found["sum"] <= 999 and len(found["parts"]) <= 3 and all(0 <= part <= 99 for part in found["parts"])
    assert {sample.finish_reason for output in outputs for sample in output.outputs} == {"stop"}
    assert len(set(texts(outputs))) > 50


def test_a_choice_is_one_of_them_letter_by_letter(calc):
    params = SamplingParams(n=32, max_tokens=40, temperature=3.0, structured_outputs={"choice": CHOICES})
    assert set(texts(calc.generate(PROMPTS, params, key=KEY))) == set(CHOICES)


@pytest.mark.parametrize(
    "asked, pattern",
    [
        ({"regex": "[0-9]{3}|x+y"}, "[0-9]{3}|x+y"),
        ({"grammar": 'start: NUMBER ("+" NUMBER)*\nNUMBER: /[1-9][0-9]?/'}, r"[1-9][0-9]?(\+[1-9][0-9]?)*"),
        ({"json": PAIR, "whitespace_pattern": "x{1,2}"}, r"\[[12](xx?)?,(xx?)?[12](xx?)?\]"),
        ({"json": PAIR}, r"\[[12] ?, ?[12] ?\]"),
    ],
    ids=["regex", "grammar", "own white space", "white space"],
)
def test_text_follows(calc, asked, pattern):
    outputs = calc.generate(PROMPTS, SamplingParams(n=8, max_tokens=80, structured_outputs=asked), key=KEY)
    ended = [sample for output in outputs for sample in output.outputs if sample.finish_reason == "stop"]
    assert len(ended) > 16 and all(re.fullmatch(pattern, sample.text) for sample in ended)


def test_any_object_is_an_object(calc):
    params = SamplingParams(n=16, max_tokens=300, structured_outputs=StructuredOutputsParams(json_object=True))
    (output,) = calc.generate(PROMPTS[:1], params, key=KEY)
    ended = [sample.text for sample in output.outputs if sample.finish_reason == "stop"]
    assert ended and all(isinstance(json.loads(text), dict) for text in ended)


def test_without_end_tokens_it_ends_where_nothing_can_follow(calc):
    params = SamplingParams(max_tokens=20, ignore_eos=True, structured_outputs={"regex": "[0-9]{4}"})
    (sample,) = calc.generate(PROMPTS[:1], params, key=KEY)[0].outputs
    assert re.fullmatch("[0-9]{4}", sample.text) and (sample.finish_reason, len(sample.token_ids)) == ("stop", 4)


# -- bits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        dict(overlap=True),
        dict(beside=3),
        dict(beside=3, overlap=True),
        dict(beside=3, overlap=True, held_pages=390, held_slots=26),
        dict(beside=3, max_num_batched_tokens=32, held_slots=30),
        dict(enable_prefix_caching=False, held_pages=392),
    ],
    ids=lambda settings: " ".join(settings),
)
def test_bits_do_not_know_the_batch_the_loop_or_the_memory(calc, expected, settings):
    assert drawn(calc, **settings) == expected


@pytest.mark.parametrize("overlap", [False, True])
def test_bits_do_not_know_how_many_steps_a_dispatch_runs(calc, expected, monkeypatch, overlap):
    monkeypatch.setattr(step_variants, "TILES", ONE_TILE)
    llm = LLM("calc", progress=False, decode_steps=3, overlap=overlap, **ENGINE)
    assert drawn(llm, beside=3) == expected


@pytest.mark.parametrize("overlap", [False, True])
def test_neighbours_do_not_notice(calc, overlap):
    def neighbours(beside) -> list:
        with calc.engine.adjusted(overlap=overlap):
            params = [part.replace(seed=index) for index, part in enumerate(PLAIN + beside)]
            return bits(calc.generate(PROMPTS[:3] + PROMPTS[: len(beside)], params)[:3])

    assert neighbours(STRUCTURED) == neighbours([])


def test_neighbours_lose_no_step(calc):
    """A structured sample waits for its last token; the others go on meanwhile, a token a step."""
    requests = calc.admitted(
        PROMPTS[:2], [SamplingParams(max_tokens=20, ignore_eos=True), STRUCTURED[0].replace(n=1)], KEY, None
    )
    with calc.engine.adjusted(overlap=True):
        run = calc.session.runner.run(requests)
        counts = [len(requests[0].samples[0].drawn.token_ids) for _ in run]
    assert counts[:22] == [0, *range(1, 21), 20]


def test_score_gives_the_bits_of_generate(calc):
    rollout = Rollout.from_outputs(calc.generate(PROMPTS, STRUCTURED, key=KEY))
    found = calc.score(rollout.tokens, rollout.mask, rollout.sampling_params)
    assert found.tobytes() == rollout.logprobs.tobytes()
    masks = grammar_mask(
        rollout.tokens, rollout.mask, rollout.sampling_params, config=calc.config, tokenizer=calc.tokenizer
    )

    def loss(params):
        how = dict(config=calc.config, grammar_mask=masks)
        logprobs = score(params, rollout.tokens, rollout.mask, rollout.sampling_params, **how)
        return logprobs.sum(), logprobs

    (_, logprobs), gradient = jax.value_and_grad(loss, has_aux=True)(calc.params)
    assert np.asarray(logprobs).tobytes() == rollout.logprobs.tobytes()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_grammar_is_read_once_for_each_completion(calc, monkeypatch):
    """The mask of a row may have several runs of tokens: each is a completion of its own."""
    read, matcher = [], Grammar.matcher
    monkeypatch.setattr(Grammar, "matcher", lambda self: read.append(self) or matcher(self))
    seven, eight = (calc.tokenizer.encode(text, add_special_tokens=False)[0] for text in "78")
    tokens, mask = np.array([[1, seven, eight, 1, eight]]), np.array([[False, True, True, False, True]])
    params = [SamplingParams(structured_outputs={"regex": "7?8+"})]
    calc.tokenizer.grammars.compiled(params[0].structure)  # is tried where it is read first
    read.clear()
    found = grammar_mask(tokens, mask, params, config=calc.config, tokenizer=calc.tokenizer)
    assert len(read) == 2 and found.rows.tolist() == [[-1, 0, 1, -1, 0]]


def test_score_refuses_what_would_give_other_bits(calc):
    rollout = Rollout.from_outputs(calc.generate(PROMPTS, STRUCTURED, key=KEY))
    with pytest.raises(ValueError, match="grammar_mask"):
        score(calc.params, rollout.tokens, rollout.mask, rollout.sampling_params, config=calc.config)
    other = [params.replace(structured_outputs={"choice": ["other"]}) for params in rollout.sampling_params]
    with pytest.raises(ValueError, match=r"tokens\[0, 6\]"):
        calc.score(rollout.tokens, rollout.mask, other)


def test_a_coordinate_draws_it_again(calc):
    for output in calc.generate(PROMPTS, STRUCTURED, key=KEY):
        for sample in output.outputs:
            coordinate = Coordinate.from_json(sample.coordinate.to_json())
            assert calc.replay(coordinate).holds
    parts = coordinate.contract.parts
    other = parts | {"grammars": parts["grammars"] | {"library": "another"}}
    with pytest.raises(ValueError, match="grammars.library"):
        calc.replay(dataclasses.replace(coordinate, contract=Contract(other)))


# -- lives that are cut short ------------------------------------------------------------------------------------------


def test_extend_goes_on_with_the_bits_of_the_whole(calc):
    whole = calc.generate(PROMPTS, STRUCTURED, key=KEY)
    begun = calc.generate(PROMPTS, [params.replace(max_tokens=4) for params in STRUCTURED], key=KEY)
    found = [calc.extend([output], params)[0] for output, params in zip(begun, STRUCTURED, strict=True)]
    assert bits(found) == bits(whole)
    with pytest.raises(ValueError, match="structured_outputs do not allow what sample 0 has"):
        calc.extend(begun[:1], STRUCTURED[0].replace(structured_outputs={"choice": ["other words"]}))


def test_an_interrupt_and_an_abort_leave_the_others_their_bits(calc, expected):
    params = [part.replace(seed=index) for index, part in enumerate(STRUCTURED)]
    requests = calc.admitted([*PROMPTS, PROMPTS[0]], [*params, params[0].replace(max_tokens=200)], KEY, None)
    with calc.engine.adjusted(overlap=True):
        run = calc.session.runner.run(requests)
        for _ in range(9):
            next(run)
        calc.abort(requests[-1].request_id)
        calc.engine._recover()  # what an interrupt anywhere in a step is followed by
        for _ in run:
            pass
    assert bits([calc.session.output(request) for request in requests[:-1]]) == expected
    assert requests[-1].samples[0].drawn.finish_reason == "abort"


@pytest.mark.parametrize("in_flight", ["recompute", "keep"])
def test_weights_that_change_meanwhile_change_no_form(calc, in_flight):
    llm = make_llm(calc.config, calc.params, tokenizer=calc.tokenizer)
    params = SamplingParams(max_tokens=90, structured_outputs={"json": SCHEMA})
    requests = llm.admitted(PROMPTS[:1] * 4, params, KEY, None)
    with llm.engine.adjusted(overlap=True):
        run = llm.session.runner.run(requests)
        for _ in range(12):
            next(run)
        llm.update_params(jax.tree.map(lambda x: x * 1.01, calc.params), in_flight=in_flight, cast=True)
        for _ in run:
            pass
    for request in requests:
        (sample,) = llm.session.output(request).outputs
        assert set(json.loads(sample.text)) == {"sum", "parts", "kind"} and len(sample.weight_versions) == 2


# -- what cannot be followed -------------------------------------------------------------------------------------------

WRONG = {
    "an open group": (dict(regex="(a"), "regex.*unclosed group"),
    "an unknown name": (dict(grammar="start: foo"), 'grammar.*unknown name: "foo"'),
    "no schema": (dict(json={"type": "objec"}), "json.*Invalid type"),
    "no JSON": (dict(json="{"), "json.*EOF"),
    "a schema that nothing meets": (dict(json={"allOf": [{"type": "string"}, {"type": "integer"}]}), "json.*Unsatis"),
    "an address": (dict(json={"$ref": "http://127.0.0.1/a.json"}), "json"),
    "the empty text": (dict(grammar='start: ""'), "grammar is followed by no text"),
    "no text at all": (dict(regex="[^\\x00-\\U0010ffff]"), "regex is followed by no text"),
    "an empty choice": (dict(choice=["a", ""]), r"choice\[1\] is empty"),
    "a text of choices": (dict(choice="abc"), "choice must be a list"),
    "too many choices": (dict(choice=["a"] * 1025), "at most|1 to 1024"),
    "a number": (dict(json=3), "json must be a schema"),
    "nothing": (dict(), "needs one of"),
    "two at once": (dict(json="{}", regex="a"), "json and regex"),
    "a long one": (dict(regex="a" * 70_000), "at most 65536"),
    "half a character": (dict(choice=["\ud800"]), "half a surrogate"),
    "a deep one": (dict(json="[" * 30_000), "json"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_at_once_with_its_place(calc, name):
    given, message = WRONG[name]
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}") as caught:
        calc.generate(PROMPTS[:1], SamplingParams(max_tokens=4, structured_outputs=given))
    assert str(caught.value).startswith("structured_outputs") and len(str(caught.value)) < 1000
    calc.engine.scheduler.check_integrity()


def test_a_wrong_one_fails_alone_where_that_was_asked_for(calc):
    params = [PLAIN[0], SamplingParams(structured_outputs={"regex": "("})]
    right, wrong = calc.generate(PROMPTS[:2], params, key=KEY, on_error="return")
    assert bits([right]) == bits(calc.generate(PROMPTS[:2], PLAIN[0], key=KEY)[:1])
    assert wrong.outputs[0].finish_reason == "error" and "regex" in wrong.outputs[0].stop_reason


@pytest.mark.parametrize(
    "more", [dict(allowed_token_ids=[65, 66]), dict(min_tokens=9), dict(logit_bias=None, stop_token_ids=[])]
)
def test_a_dead_end_ends_the_request(calc, more):
    params = SamplingParams(max_tokens=20, structured_outputs={"choice": ["7", "8"]}, **more)
    (sample,) = calc.generate(PROMPTS[:1], params, key=KEY)[0].outputs
    if "stop_token_ids" in more:
        assert sample.text in "78" and sample.finish_reason == "stop"
    else:
        assert sample.finish_reason == "error" and "structured_outputs" in sample.stop_reason


def test_one_that_takes_too_long_ends_its_own_request(calc):
    params = [*PLAIN[:2], SamplingParams(structured_outputs={"regex": "((((a{100}){100}){100}){100}b){100}"})]
    outputs = calc.generate(PROMPTS[:3], params, key=KEY)
    assert outputs[2].outputs[0].finish_reason == "error" and "lexer" in outputs[2].outputs[0].stop_reason
    assert bits(outputs[:2]) == bits(calc.generate(PROMPTS[:2], PLAIN[:2], key=KEY))


def test_a_model_without_a_tokenizer_says_so(tiny):
    with pytest.raises(ValueError, match="structured_outputs .* no tokenizer"):
        tiny.generate([[1]], SamplingParams(structured_outputs={"regex": "a"}))


@pytest.mark.parametrize("name", ["guided_decoding", "guided_json", "response_format"])
def test_older_names_say_the_newer_one(name):
    with pytest.raises(TypeError, match=f"{name!r}.*StructuredOutputsParams"):
        SamplingParams(**{name: {"type": "object"}})
