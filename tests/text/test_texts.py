"""Text through the engine: stops, streams, chats, samples that are extended. Tokens and bits are those without text."""

import jax
import pytest
from conftest import bits, make_llm

from jaxengine import LLM, SamplingParams

KEY = jax.random.key(5)
PROMPT, OTHER = "12+30=", "7*8="


@pytest.fixture(scope="module")
def llm(tiny_with_text) -> LLM:
    return tiny_with_text


@pytest.fixture(scope="module")
def params(llm) -> SamplingParams:
    """Letters alone, so that every token is a character; without end."""
    letters = llm.tokenizer.encode("abcdefghijkl", add_special_tokens=False)
    return SamplingParams(max_tokens=20, logit_bias={token: 60.0 for token in letters}, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module")
def whole(llm, params):
    return llm.generate([PROMPT, OTHER], params, key=KEY)


def test_a_stop_string_cuts_the_text_and_moves_no_bit(llm, params, whole):
    text = whole[0].outputs[0].text
    assert len(text) == 20
    stop = text[6:8]
    end = text.index(stop) + len(stop)
    for include in (False, True):
        cut = params.replace(stop=["never", stop], include_stop_str_in_output=include)
        first, second = llm.generate([PROMPT, OTHER], [cut, params], key=KEY)
        sample, expected = first.outputs[0], whole[0].outputs[0]
        assert (sample.text, sample.finish_reason, sample.stop_reason) == (
            text[:end] if include else text[: end - 2],
            "stop",
            stop,
        )
        assert (
            sample.token_ids == expected.token_ids[:end] and len(sample.logprobs) == len(sample.token_logprobs) == end
        )
        assert (
            sample.token_logprobs.tobytes() == expected.token_logprobs[:end].tobytes()
            and sample.logprobs == expected.logprobs[:end]
        )
        assert bits([second]) == bits([whole[1]])


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", [(), ("never",)], ids=["plain", "with a stop string"])
def test_a_stop_tokens_text_is_there_where_it_is_asked_for(llm, params, whole, include, stop):
    sample = whole[0].outputs[0]
    token = sample.token_ids[5]
    end = sample.token_ids.index(token) + 1
    cut = params.replace(stop_token_ids=[token], stop=stop, include_stop_str_in_output=include)
    *growing, last = [output.outputs[0] for output in llm.stream(PROMPT, cut, key=KEY, cumulative=True)]
    for found in (llm.generate(PROMPT, cut, key=KEY)[0].outputs[0], last):
        assert found.text == sample.text[: end if include else end - 1] and found.token_ids == sample.token_ids[:end]
    assert all(last.text.startswith(output.text) for output in growing)


def test_a_stream_is_generate_piece_by_piece(llm, params, whole):
    outputs = list(llm.stream(PROMPT, params, key=KEY, cumulative=True))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [*range(1, 21)]
    assert [output.outputs[0].text for output in outputs] == [whole[0].outputs[0].text[:n] for n in range(1, 21)]
    assert bits(outputs[-1:]) == bits(whole[:1]) and [output.finished for output in outputs] == [False] * 19 + [True]


def test_deltas_joined_are_the_whole(llm, params, whole):
    *deltas, last = llm.stream(PROMPT, params, key=KEY)
    parts = [part for delta in (*deltas, last) for part in delta.outputs]
    sample = whole[0].outputs[0]
    assert "".join(part.text for part in parts) == sample.text
    assert [token for part in parts for token in part.token_ids] == sample.token_ids
    assert b"".join(part.token_logprobs.tobytes() for part in parts) == sample.token_logprobs.tobytes()
    assert bits([last.output]) == bits(whole[:1]) and parts[-1].finish_reason == sample.finish_reason
    assert not any(delta.finished or delta.output for delta in deltas) and last.finished
    assert len(deltas) > 10 and all(len(part.token_ids) <= 1 for part in parts)


def test_a_chat_is_generate_on_its_tokens(llm, params):
    messages = [{"role": "user", "content": "12+30="}]
    tokens = llm.tokenizer.encode_chat(messages)
    assert len(tokens) > len("12+30=")
    expected = llm.generate([{"prompt_token_ids": tokens}], params, key=KEY)
    for form in (messages, [messages]):
        (found,) = llm.chat(form, params, key=KEY)
        assert found.prompt_token_ids == tokens and bits([found]) == bits(expected)


def test_prompt_logprobs_are_the_same_after_a_cached_prefix(llm, params):
    wanted = params.replace(prompt_logprobs=2, max_tokens=3)
    prompt = {"prompt_token_ids": list(range(1, 80)), "cache_salt": "prompt logprobs"}
    cold, warm = (llm.generate([prompt], wanted, key=KEY)[0] for _ in range(2))
    assert (
        len(cold.prompt_logprobs) == 79
        and cold.prompt_logprobs[0] is None
        and warm.prompt_logprobs == cold.prompt_logprobs
    )
    assert bits([warm]) == bits([cold])


# -- samples that are extended --


def test_extending_with_a_stop_string_that_is_there_already_is_refused(llm, params, whole):
    begun = llm.generate(PROMPT, params.replace(max_tokens=8), key=KEY)
    text = begun[0].outputs[0].text
    with pytest.raises(ValueError, match=rf"stop .*'{text[2:4]}'.* {text.index(text[2:4]) + 1} of sample 0"):
        llm.extend(begun, params.replace(stop=[text[2:4]]))
    assert not llm.engine.requests
    llm.engine.scheduler.check_integrity()
    assert bits(llm.extend(begun, params)) == bits(whole[:1])


def test_extending_changes_nothing_of_a_sample_that_ended(llm, params, whole):
    sample = whole[0].outputs[0]
    for how in (dict(stop_token_ids=[sample.token_ids[5]]), dict(stop=[sample.text[4:6]])):
        ended = llm.generate(PROMPT, params.replace(**how), key=KEY)
        again = llm.extend(
            ended, params.replace(stop_token_ids=how.get("stop_token_ids", ()), stop=[*how.get("stop", ()), "never"])
        )
        assert bits(again) == bits(ended) and again[0].outputs[0].text == ended[0].outputs[0].text


def test_extending_keeps_the_prompts_logprobs(llm, params):
    wanted = params.replace(prompt_logprobs=1)
    begun, at_once = (llm.generate(PROMPT, wanted.replace(max_tokens=n), key=KEY) for n in (8, 20))
    found = llm.extend(begun, wanted)[0]
    assert found.prompt_logprobs == at_once[0].prompt_logprobs and bits([found]) == bits(at_once)
    with pytest.raises(ValueError, match="prompt_logprobs .*request"):
        llm.extend(llm.generate(PROMPT, params.replace(max_tokens=8), key=KEY), wanted)


def test_extending_stops_at_a_limit_that_was_passed(llm, params):
    stream = llm.stream(PROMPT, params, key=KEY, cumulative=True)
    part = [next(stream) for _ in range(6)][-1]
    stream.close()
    sample = llm.extend([part], params.replace(max_tokens=4))[0].outputs[0]
    assert len(sample.token_ids) == 6 and sample.finish_reason == "length"


# -- calls --


def test_a_call_that_is_refused_draws_nothing(tiny):
    """Without a key each call takes the next one; a refused call takes none."""
    first, second = (make_llm(tiny.config, tiny.params) for _ in range(2))
    with pytest.raises(ValueError, match=r"prompts\[1\]"):
        first.generate([[1], []])
    assert bits(first.generate([[1, 2]], SamplingParams(max_tokens=4))) == bits(
        second.generate([[1, 2]], SamplingParams(max_tokens=4))
    )


@pytest.mark.parametrize("shown", [False, True])
def test_the_progress_bar_is_shown_where_use_tqdm_says_so(llm, params, shown, capsys):
    llm.generate([PROMPT, OTHER], params.replace(max_tokens=2), use_tqdm=shown)
    assert ("2/2" in capsys.readouterr().err) == shown


def test_unknown_keywords_and_devices_that_are_not_there_are_refused():
    with pytest.raises(TypeError, match="max_model_length.*max_model_len"):
        LLM("calc", max_model_length=64)
    with pytest.raises(ValueError, match="asks for 4 devices, there are 1"):
        LLM("calc", tensor_parallel_size=4)
