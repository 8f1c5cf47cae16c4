"""Prompts and chats at the door: rendered text, the context's edge, one that fails alone. Bits are generate's."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from conftest import bits, make_llm

from jaxengine import LLM, Rollout, SamplingParams
from jaxengine.functional import generate
from jaxengine.rl.rewards import compute_rewards

KEY = jax.random.key(8)
PARAMS = SamplingParams(max_tokens=4, ignore_eos=True)
CONTEXT = 512  # of the engines that tests share
LONG = [7 + index % 90 for index in range(CONTEXT)]
SCORING = SamplingParams(max_tokens=0, prompt_logprobs=1)
CHAT = [{"role": "user", "content": "7*8="}]


@pytest.fixture(scope="module")
def llm(tiny_with_text) -> LLM:
    return tiny_with_text


def new(llm: LLM) -> LLM:
    return make_llm(llm.config, llm.params, tokenizer=llm.tokenizer)


def control(llm: LLM) -> str:
    return llm.tokenizer.token_text(min(llm.tokenizer.special_ids))


# -- text that a chat template rendered --


def test_text_that_spells_a_control_token_is_warned_of_once_an_llm(llm, caplog):
    text = f"{control(llm)}hi"
    for first in (new(llm), new(llm)):
        caplog.clear()
        first.generate(["hi", text, text], SamplingParams(max_tokens=1))
        first.generate({"prompt": text, "cache_salt": "a"}, SamplingParams(max_tokens=1))
        (record,) = caplog.records
        assert record.levelno == logging.WARNING and "prompts[1]" in record.message
        assert control(llm) in record.message and "chat()" in record.message
        assert "allow_special_tokens" in record.message


def test_text_that_is_meant_is_not_warned_of(llm, caplog):
    silent = new(llm)
    for allow in (False, True):
        silent.generate({"prompt": f"{control(llm)}hi", "allow_special_tokens": allow}, SamplingParams(max_tokens=1))
    silent.generate("hi", SamplingParams(max_tokens=1))
    silent.chat([{"role": "user", "content": control(llm)}], SamplingParams(max_tokens=1))
    assert not caplog.records


def test_special_tokens_are_added_unless_the_prompt_says_no(llm, monkeypatch):
    asked = []
    encode = llm.tokenizer.encode
    monkeypatch.setattr(llm.tokenizer, "encode", lambda text, **how: asked.append(how) or encode(text, **how))
    llm.generate(["1", {"prompt": "1"}, {"prompt": "1", "add_special_tokens": False}], SamplingParams(max_tokens=1))
    assert [how["add_special_tokens"] for how in asked] == [True, True, False]
    with pytest.raises(ValueError, match=r"prompts\[0\]\['add_special_tokens'\] .*'no'"):
        llm.generate({"prompt": "1", "add_special_tokens": "no"})


# -- chats --


def test_the_prompt_of_a_chat_is_its_rendered_text(llm):
    outputs = llm.chat([CHAT, [{"role": "user", "content": "1+1="}]], PARAMS, key=KEY)
    chats = [llm.get_tokenizer().render_chat(CHAT), llm.tokenizer.render_chat([{"role": "user", "content": "1+1="}])]
    assert [(output.prompt, output.prompt_token_ids) for output in outputs] == chats
    assert llm.tokenizer.decode(outputs[0].prompt_token_ids, skip_special_tokens=False) == outputs[0].prompt
    assert llm.extend(outputs, PARAMS.replace(max_tokens=6))[1].prompt == chats[1].text
    seen = []
    compute_rewards(outputs, ["56", "2"], lambda prompt, completion, answer: seen.append(prompt) or 0.0)
    assert sorted(seen) == sorted(chat.text for chat in chats)  # judges run side by side


def test_the_last_message_is_continued(llm):
    begun = [*CHAT, {"role": "assistant", "content": "The answer"}]
    (output,) = llm.chat(begun, PARAMS, key=KEY, continue_final_message=True)
    assert output.prompt.endswith("The answer")
    assert bits([output]) == bits(llm.generate([output.prompt_token_ids], PARAMS, key=KEY))
    with pytest.raises(ValueError, match="continue_final_message .*add_generation_prompt"):
        llm.chat(begun, continue_final_message=True, add_generation_prompt=True)


# -- one prompt that fails alone --

BAD = {
    "too long": ([7] * 600, "600 tokens"),
    "empty": ([], "is empty"),
    "no token": ([10**6], "token id 1000000"),
    "no keyword": ({"prompt": "1", "prompts": 1}, "'prompts'"),
    "no text": ({"prompt": 5}, "needs 'prompt'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_prompt_fails_alone_and_the_others_draw_as_ever(name, llm):
    bad, message = BAD[name]
    params = SamplingParams(max_tokens=4, n=2)
    right = llm.generate([[1, 2], [3, 4], [5, 6]], params, key=KEY)
    outputs = llm.generate([[1, 2], bad, [5, 6]], params, key=KEY, on_error="return")
    assert bits([outputs[0], outputs[2]]) == bits([right[0], right[2]])
    failed = outputs[1]
    assert failed.finished and failed.prompt_token_ids == []
    for sample in failed.outputs:
        assert (sample.finish_reason, sample.token_ids, sample.text) == ("error", [], "")
        assert "prompts[1]" in sample.stop_reason and message in sample.stop_reason
    assert len(failed.outputs) == 2 and not llm.engine.requests
    with pytest.raises((ValueError, TypeError), match=r"prompts\[1\]"):
        llm.generate([[1, 2], bad, [5, 6]], params, key=KEY)


def test_sampling_that_an_engine_cannot_do_fails_alone(llm):
    good, bad = llm.generate(["1", "2"], [PARAMS, PARAMS.replace(logprobs=99)], key=KEY, on_error="return")
    assert bits([good]) == bits(llm.generate(["1"], PARAMS, key=KEY))
    assert (bad.prompt, bad.outputs[0].coordinate.key_folds) == ("2", (1, 0))
    assert "logprobs=99 of prompts[1]" in bad.outputs[0].stop_reason


def test_a_chat_that_its_template_refuses_fails_alone(llm):
    wrong = [{"role": "user", "content": 3}]
    right = llm.chat([CHAT, CHAT, CHAT], PARAMS, key=KEY)
    outputs = llm.chat([CHAT, wrong, CHAT], PARAMS, key=KEY, on_error="return")
    assert bits([outputs[0], outputs[2]]) == bits([right[0], right[2]])
    assert outputs[1].outputs[0].finish_reason == "error"
    assert "messages[0].content" in outputs[1].outputs[0].stop_reason
    with pytest.raises(ValueError, match=r"messages\[0\]\.content"):
        llm.chat([CHAT, wrong], PARAMS)


def test_what_failed_is_a_row_without_tokens_and_stays_failed(llm):
    outputs = llm.generate([[1, 2], []], PARAMS.replace(entropy=True), key=KEY, on_error="return")
    rollout = Rollout.from_outputs(outputs)
    assert rollout.lengths.tolist() == [6, 0] and rollout.mask.sum(1).tolist() == [4, 0]
    more = llm.extend(outputs, PARAMS.replace(max_tokens=6))
    assert [len(output.outputs[0].token_ids) for output in more] == [6, 0]
    assert more[1].outputs[0].stop_reason == outputs[1].outputs[0].stop_reason
    assert bits(generate(llm.params, [[], [1]], PARAMS, key=KEY, config=llm.config, on_error="return"))[0][2] == "error"


def test_on_error_is_one_of_two(llm):
    with pytest.raises(ValueError, match="on_error .*'refuse', 'return', got 'ignore'"):
        llm.generate([[1]], PARAMS, on_error="ignore")


# -- the context's edge --


@pytest.mark.parametrize(
    "count, max_tokens, kept",
    [(16, 4, 16), (600, 4, 600), (1, None, 1), (-1, 4, CONTEXT - 1), (-1, None, CONTEXT - 1), (-1, 0, CONTEXT)],
)
def test_the_last_tokens_of_a_prompt_are_kept(count, max_tokens, kept, llm):
    params = PARAMS.replace(max_tokens=max_tokens)
    prompt, shorter = [5] * 100 + LONG, PARAMS.replace(max_tokens=max_tokens, truncate_prompt_tokens=count)
    if kept > CONTEXT:
        with pytest.raises(ValueError, match="600 tokens"):
            llm.generate([prompt], shorter)
        return
    (output,) = llm.generate([prompt], shorter, key=KEY)
    assert output.prompt_token_ids == prompt[-kept:]
    assert bits([output]) == bits(llm.generate([prompt[-kept:]], params, key=KEY))
    assert llm.generate([[1, 2]], shorter)[0].prompt_token_ids == [1, 2][-kept:]


def test_a_prompt_that_was_cut_is_not_cut_again(llm):
    begun = llm.generate([LONG], SamplingParams(max_tokens=2, truncate_prompt_tokens=8, ignore_eos=True), key=KEY)
    (more,) = llm.extend(begun, PARAMS.replace(truncate_prompt_tokens=3))
    assert more.prompt_token_ids == LONG[-8:]
    assert bits([more]) == bits(llm.generate([LONG[-8:]], PARAMS, key=KEY))
    assert llm.replay(more.outputs[0].coordinate).holds


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
@pytest.mark.parametrize("tokens", [None, 48], ids=["whole", "in chunks"])
def test_a_prompt_as_long_as_the_context_is_scored_and_nothing_drawn(llm, overlap, tokens):
    changes = {"overlap": overlap} | ({"max_num_batched_tokens": tokens} if tokens else {})
    with llm.engine.adjusted(**changes):
        first, beside = llm.generate([LONG, [1, 2]], [SCORING, PARAMS], key=KEY)
    assert [(s.token_ids, s.finish_reason) for s in first.outputs] == [([], "length")]
    assert bits([beside]) == bits(llm.generate([[9], [1, 2]], PARAMS, key=KEY)[1:])
    (shorter,) = llm.generate([LONG[:-1]], SCORING.replace(max_tokens=1), key=KEY)
    assert len(first.prompt_logprobs) == CONTEXT and first.prompt_logprobs[0] is None
    assert first.prompt_logprobs[:-1] == shorter.prompt_logprobs
    assert LONG[-1] in first.prompt_logprobs[-1]
    assert not llm.engine.requests
    llm.engine.scheduler.check_integrity()


def test_nothing_drawn_and_nothing_scored_runs_no_step(llm, monkeypatch):
    monkeypatch.setattr(llm.engine, "step", lambda: pytest.fail("a step ran"))
    (output,) = llm.generate([[1, 2]], SamplingParams(max_tokens=0, n=2))
    assert [(s.index, s.token_ids, s.finish_reason) for s in output.outputs] == [(0, [], "length"), (1, [], "length")]
    assert llm.generate([[1]], SCORING)[0].prompt_logprobs == [None]


def test_samples_that_share_a_scored_prompt(llm):
    (alone,), (group,) = llm.generate([LONG[:40]], SCORING), llm.generate([LONG[:40]], SCORING.replace(n=3))
    assert group.prompt_logprobs == alone.prompt_logprobs and len(group.outputs) == 3
    (again,) = llm.extend([group])
    assert again.prompt_logprobs == alone.prompt_logprobs


def test_a_scored_prompt_goes_on_where_generate_would(llm):
    scored = llm.generate([LONG[:40]], SCORING, key=KEY)
    params = PARAMS.replace(prompt_logprobs=1)
    assert bits(llm.extend(scored, params)) == bits(llm.generate([LONG[:40]], PARAMS, key=KEY))


def test_a_prompt_longer_than_the_context_is_refused_by_every_entrance(llm):
    for params in (PARAMS, SCORING):
        with pytest.raises(ValueError, match=r"prompts\[0\] .*513 tokens.* max_model_len=512"):
            llm.generate([[7] * 513], params)
        with pytest.raises(ValueError, match=r"prompts\[0\] .*513 tokens.* max_model_len=512"):
            next(llm.stream([[7] * 513], params))
    assert list(llm.stream([LONG], SCORING))[-1].finished


# -- forms --


class OnDevice:
    """An array whose elements are far away: only all at once are they read."""

    def __init__(self, values: list) -> None:
        self.values, self.reads = values, 0

    def tolist(self) -> list:
        self.reads += 1
        return self.values

    def __iter__(self):
        pytest.fail("read element by element")


@pytest.mark.parametrize("values", [[5, 6, 7], [[5, 6, 7]]], ids=["a prompt", "a batch"])
def test_an_array_is_read_at_once(values, llm):
    array = OnDevice(values)
    (output,) = llm.generate(array, SamplingParams(max_tokens=1))
    assert (output.prompt_token_ids, array.reads) == ([5, 6, 7], 1)
    assert llm.generate(np.array(values), SamplingParams(max_tokens=1))[0].prompt_token_ids == [5, 6, 7]


def test_what_has_no_coordinate_cannot_go_on_and_says_what_to_do(llm):
    (output,) = llm.generate([[1, 2]], PARAMS)
    without = dataclasses.replace(output, outputs=[dataclasses.replace(output.outputs[0], coordinate=None)])
    with pytest.raises(ValueError, match="coordinate.*prompt_token_ids"):
        llm.extend([without])


def test_methods_of_vllms_that_are_not_there_say_what_is(llm):
    for name, instead in (("encode", "get_tokenizer"), ("collective_rpc", "update_params"), ("llm_engine", "engine")):
        assert not hasattr(llm, name)
        with pytest.raises(AttributeError, match=f"LLM has no '{name}': .*{instead}"):
            getattr(llm, name)
    assert llm.get_tokenizer() is llm.tokenizer
