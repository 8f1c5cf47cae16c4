"""allowed_token_ids, bad_words and logit_bias keep the contract: batch, preemption, JSON and score by bits."""

import json

import jax
import numpy as np
import pytest
from conftest import bits, make_llm

import jaxengine
from jaxengine import Rollout, SamplingParams
from jaxengine.coordinate import Coordinate
from jaxengine.sampling_params import stop_token_ids

PLAIN = SamplingParams(max_tokens=14, ignore_eos=True)
FEW = list(range(3, 999, 7))
SAMPLING = [
    PLAIN.replace(allowed_token_ids=[5, 31, 32, 999]),
    PLAIN.replace(allowed_token_ids=FEW, temperature=0.7, top_p=0.9, n=3),
    PLAIN.replace(allowed_token_ids=FEW, temperature=0),
    PLAIN,
    PLAIN.replace(bad_words_token_ids=[[i] for i in range(250)], top_k=40),
    PLAIN.replace(allowed_token_ids=[5, 6, 7], bad_words_token_ids=[[5, 6], [7, 7], [6, 5, 5]], n=4),
    PLAIN.replace(allowed_token_ids=[5, 6, 7], bad_words_token_ids=[[5, 6], [7, 7], [6, 5, 5]], repetition_penalty=1.3),
    PLAIN.replace(allowed_token_ids=range(20), logit_bias={3: 2.0, 30: 50.0}, min_tokens=6, stop_token_ids=[3, 4]),
    PLAIN.replace(frequency_penalty=0.8, presence_penalty=-0.3, bad_words_token_ids=[[9]]),
    PLAIN.replace(logit_bias={8: 3.0}, seed=4),
]
PROMPTS = [[3 * i + 1] * (1 + 31 * i % 90) for i in range(len(SAMPLING))]
KEY = jax.random.key(11)


@pytest.fixture(scope="module")
def outputs(tiny):
    return tiny.generate(PROMPTS, SAMPLING, key=KEY)


def breaks(params: SamplingParams, token_ids: list[int]) -> bool:
    """Whether a completion has what its parameters rule out."""
    words = [list(word) for word in params.bad_words_token_ids]
    spans = [(start, len(word)) for word in words for start in range(len(token_ids))]
    has_bad_word = any(token_ids[start : start + length] in words for start, length in spans)
    allowed = params.allowed_token_ids
    return has_bad_word or allowed is not None and not set(token_ids) <= set(allowed)


def test_what_is_ruled_out_is_never_drawn(outputs, tiny):
    for output, params in zip(outputs, SAMPLING, strict=True):
        assert not any(breaks(params, sample.token_ids) for sample in output.outputs)
        assert all(sample.finish_reason in ("length", "stop") for sample in output.outputs)
    without = tiny.generate(
        PROMPTS, [p.replace(allowed_token_ids=None, bad_words_token_ids=()) for p in SAMPLING], key=KEY
    )
    broken = [any(breaks(p, s.token_ids) for s in o.outputs) for o, p in zip(without, SAMPLING, strict=True)]
    assert sum(broken) >= 6, "without the rules most of them draw what the rules forbid"
    assert bits(without[3:4]) == bits(outputs[3:4]), "a request without rules has the same bits beside them"


def test_score_is_generate(outputs, tiny):
    rollout = Rollout.from_outputs(outputs)
    each = [params.replace(n=1) for output, params in zip(outputs, SAMPLING, strict=True) for _ in output.outputs]
    expected = np.asarray(rollout.logprobs).view(np.uint32)
    for sampling in (each, rollout.sampling_params):
        assert (tiny.score(rollout.tokens, rollout.mask, sampling).view(np.uint32) == expected).all()
    score = jax.jit(
        lambda p: jaxengine.score(p, rollout.tokens, rollout.mask, each, config=tiny.config).astype(np.float32)
    )
    assert (np.asarray(score(tiny.params)).view(np.uint32) == expected).all()
    assert np.isfinite(rollout.logprobs).all()


def test_gradients_are_finite_and_only_of_what_is_allowed(outputs, tiny):
    rollout, params = Rollout.from_outputs(outputs[:1]), SAMPLING[0]
    loss = lambda p: jaxengine.score(p, rollout.tokens, rollout.mask, params, config=tiny.config).sum()
    gradient = np.asarray(jax.grad(loss)(tiny.params).output_head).reshape(-1, tiny.config.hidden_size)
    assert np.isfinite(gradient).all()
    assert set(np.flatnonzero(np.abs(gradient).sum(1)).tolist()) == {5, 31, 32, 999}


def test_alone_preempted_and_in_few_slots(outputs, tiny):
    seeded = [params.replace(seed=3) for params in SAMPLING]
    among = tiny.generate(PROMPTS, seeded, key=KEY)
    for i in (0, 5, 8):
        assert bits(tiny.generate(PROMPTS[i : i + 1], seeded[i], key=KEY)) == bits(among[i : i + 1])
    before = tiny.engine.scheduler.num_preemptions
    with tiny.engine.adjusted(held_pages=tiny.engine_config.num_pages - 5, enable_prefix_caching=False):
        assert bits(tiny.generate(PROMPTS, SAMPLING, key=KEY)) == bits(outputs)
    assert tiny.engine.scheduler.num_preemptions > before
    with tiny.engine.adjusted(held_slots=tiny.engine_config.max_num_seqs - 2, overlap=True):
        assert bits(tiny.generate(PROMPTS, SAMPLING, key=KEY)) == bits(outputs)
    assert not tiny.engine.step_variants.refused


def test_coordinates_survive_as_json(outputs, tiny):
    for output in outputs:
        coordinate = Coordinate.from_json(output.outputs[-1].coordinate.to_json())
        assert tiny.replay(coordinate).holds


def test_a_rollout_file_keeps_the_rules(outputs, tiny, tmp_path):
    rollout = Rollout.from_outputs(outputs)
    rollout.save(tmp_path / "rollout.safetensors")
    loaded = Rollout.load(tmp_path / "rollout.safetensors")
    found = tiny.score(loaded.tokens, loaded.mask, loaded.sampling_params)
    assert (found.view(np.uint32) == np.asarray(rollout.logprobs).view(np.uint32)).all()


def test_words_are_resolved_where_the_tokenizer_is(tiny_with_text):
    llm, key = tiny_with_text, jax.random.key(2)
    params = PLAIN.replace(bad_words=["1", "2"], allowed_token_ids=range(40), max_tokens=20)
    (output,) = llm.generate(["12+30="], params, key=key)
    sample = output.outputs[0]
    banned = llm.tokenizer.encode("1", add_special_tokens=False) + llm.tokenizer.encode("2", add_special_tokens=False)
    assert not set(sample.token_ids) & set(banned) and not set(sample.text) & set("12")
    resolved = sample.coordinate.sampling_params
    assert resolved.bad_words == () and {(token,) for token in banned} <= set(resolved.bad_words_token_ids)
    assert "bad_words_token_ids" in json.loads(sample.coordinate.to_json())["sampling_params"]
    rollout = Rollout.from_outputs([output])
    for score in (params, resolved):
        assert (llm.score(rollout.tokens, rollout.mask, score) == rollout.logprobs).all()
    with pytest.raises(ValueError, match=r"bad_words of sampling_params\[0\] are text.*bad_words_token_ids"):
        jaxengine.score(llm.params, rollout.tokens, rollout.mask, params, config=llm.config)
    longer = llm.extend([output], params.replace(max_tokens=30))
    assert longer[0].outputs[0].token_ids[:20] == sample.token_ids
    assert not set(longer[0].outputs[0].token_ids) & set(banned)


def test_a_dead_end_ends_its_request_alone(outputs, tiny):
    nothing = PLAIN.replace(allowed_token_ids=[5], bad_words_token_ids=[[5]])
    early = PLAIN.replace(allowed_token_ids=[5], min_tokens=3, stop_token_ids=[5])
    found = tiny.generate(PROMPTS + [[1], [2]], SAMPLING + [nothing, early], key=KEY)
    assert bits(found[:-2]) == bits(outputs)
    for output in found[-2:]:
        assert output.outputs[0].finish_reason == "error" and "allowed_token_ids" in output.outputs[0].stop_reason
    assert stop_token_ids(early, ()) == {5}


# -- the whole vocabulary ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny):
    return make_llm(tiny.config, tiny.params, max_logprobs=-1)


def test_logprobs_of_the_whole_vocabulary(whole, outputs, tiny):
    sampling = [p.replace(logprobs=-1, prompt_logprobs=-1) if i in (0, 4) else p for i, p in enumerate(SAMPLING)]
    sampling[8] = SAMPLING[8].replace(logprobs=3)
    found = whole.generate(PROMPTS, sampling, key=KEY)
    assert bits(found) == bits(outputs), "others, and what is drawn, have the bits of an engine with max_logprobs=20"
    vocab = tiny.config.vocab_size
    for output in (found[0], found[4]):
        sample = output.outputs[0]
        for token, logprob, entries in zip(sample.token_ids, sample.token_logprobs, sample.logprobs, strict=True):
            assert entries.keys() == set(range(vocab)) and entries[token].logprob == logprob
            assert abs(sum(np.exp(entry.logprob) for entry in entries.values()) - 1) < 1e-4
        assert output.prompt_logprobs[0] is None
        for entries in output.prompt_logprobs[1:]:
            assert entries.keys() == set(range(vocab)) and min(entry.logprob for entry in entries.values()) > -np.inf
    ruled_out = {token for token, entry in found[0].outputs[0].logprobs[0].items() if entry.logprob == -np.inf}
    assert ruled_out == set(range(vocab)) - {5, 31, 32, 999}
    assert all(3 <= len(entries) <= 4 for entries in found[8].outputs[0].logprobs)


NAMED = [(), (5,), (999, 0, 3), (31, 31, 7), tuple(range(128)), (500,), (6, 5), (3, 30), (9, 8), (8, 11, 999)]


def test_named_tokens_have_the_logprobs_of_the_whole_vocabulary(whole, outputs, tiny):
    sampling = [
        p.replace(logprob_token_ids=named, logprobs=(None, 2)[i % 2])
        for i, (p, named) in enumerate(zip(SAMPLING, NAMED, strict=True))
    ]
    found = tiny.generate(PROMPTS, sampling, key=KEY)
    assert bits(found) == bits(outputs), "what is drawn has the same bits"
    every = whole.generate(PROMPTS, [p.replace(logprobs=-1) for p in SAMPLING], key=KEY)
    assert found[0].outputs[0].logprobs is None
    for output, all_told, params in zip(found[1:], every[1:], sampling[1:], strict=True):
        for sample, of_all in zip(output.outputs, all_told.outputs, strict=True):
            for token, told, entries in zip(sample.token_ids, sample.logprobs, of_all.logprobs, strict=True):
                likeliest = {other for other, entry in entries.items() if entry.rank <= (params.logprobs or 0)}
                assert told.keys() == likeliest | {token, *params.logprob_token_ids}
                own, expected = (np.float32([each[other].logprob for other in told]) for each in (told, entries))
                assert np.array_equal(own.view(np.uint32), expected.view(np.uint32))
                ranks = {other: entry.rank for other, entry in told.items() if entry.rank is not None}
                assert ranks.keys() == likeliest | {token}


def test_a_sample_goes_on_with_named_tokens_only_where_it_was_begun_with_them(tiny):
    begun = tiny.generate([[3, 4]], SamplingParams(max_tokens=3, logprob_token_ids=[7], ignore_eos=True), key=KEY)
    params = begun[0].outputs[0].coordinate.sampling_params
    (whole,) = tiny.generate([[3, 4]], params.replace(max_tokens=6), key=KEY)
    assert tiny.extend(begun, params.replace(max_tokens=6))[0].outputs[0].logprobs == whole.outputs[0].logprobs
    with pytest.raises(ValueError, match="logprob_token_ids is asked for, but sample 0 was begun without"):
        tiny.extend(begun, params.replace(max_tokens=6, logprob_token_ids=[7, 8]))


@pytest.mark.parametrize("ids, message", [([1] * 129, "at most 128"), ([-1], "at least 0"), ([1000], "0 … 999")])
def test_named_tokens_that_are_too_many_or_unknown_are_refused(ids, message, tiny):
    with pytest.raises(ValueError, match=f"logprob_token_ids.*{message}"):
        tiny.generate([[1]], SamplingParams(max_tokens=1, logprob_token_ids=ids))


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_without_room_the_whole_vocabulary_is_refused(name, tiny):
    message = rf"{name}=-1 of prompts\[0\] is more than max_logprobs=20 .*all 1000 tokens.*max_logprobs=-1"
    with pytest.raises(ValueError, match=message):
        tiny.generate([[1]], SamplingParams(max_tokens=1, **{name: -1}))
