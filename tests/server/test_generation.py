"""Completions, chats and token generation over HTTP: forms, and the bits of LLM.generate."""

import concurrent.futures
import json

import numpy as np
import pytest

from jaxengine import SamplingParams
from jaxengine.coordinate import Coordinate

PROMPTS = ["12+30=", "7*8=", "9-4="]
SCHEMA = {
    "type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"], "additionalProperties": False,
}  # fmt: skip
BODY = dict(model="calc", max_tokens=6, seed=3, temperature=0.8)


def ok(response):
    assert response.status_code == 200, response.text
    return response.json()


def complete(served, **fields) -> list[dict]:
    """The choices of a completion."""
    return ok(served.user.post("/v1/completions", json=fields))["choices"]


def events(client, path, body) -> list[dict]:
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def logprob_bits(values) -> bytes:
    """Of numbers from JSON: a float32 was written so that it reads back."""
    exact = np.asarray(values, np.float64)
    assert (exact.astype(np.float32).astype(np.float64) == exact).all()
    return exact.astype(np.float32).tobytes()


def test_a_hundred_requests_at_once_have_the_bits_of_generate(served):
    params = [
        SamplingParams(max_tokens=1 + seed % 12, seed=seed, temperature=(0.0, 0.7, 1.0)[seed % 3], n=1 + seed % 2)
        for seed in range(100)
    ]
    prompts = [f"{seed}+{seed * 7 % 31}=" for seed in range(100)]

    def over_http(prompt, sampling):
        body = dict(prompt=prompt, max_tokens=sampling.max_tokens, seed=sampling.seed, n=sampling.n)
        body |= dict(temperature=sampling.temperature, logprobs=0, return_token_ids=True)
        return complete(served, **body)

    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(over_http, prompts, params))
    found = [
        (
            choice["token_ids"],
            logprob_bits(choice["logprobs"]["token_logprobs"]),
            choice["text"],
            choice["finish_reason"],
        )
        for choices in answers
        for choice in choices
    ]
    expected = [
        (sample.token_ids, sample.token_logprobs.tobytes(), sample.text, sample.finish_reason)
        for output in served.llm.generate(prompts, params)
        for sample in output.outputs
    ]
    assert found == expected


def test_choices_are_prompt_major_with_prompt_and_completion_ids(served):
    body = BODY | dict(prompt=PROMPTS, n=2, return_token_ids=True)
    answer = ok(served.user.post("/v1/completions", json=body))
    outputs = served.llm.generate(PROMPTS, SamplingParams(n=2, max_tokens=6, seed=3, temperature=0.8))
    samples = [(output, sample) for output in outputs for sample in output.outputs]
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for choice, (output, sample) in zip(answer["choices"], samples, strict=True):
        assert choice["prompt_token_ids"] == output.prompt_token_ids
        assert choice["token_ids"] == sample.token_ids and choice["text"] == sample.text
    num_drawn = sum(len(sample.token_ids) for _, sample in samples)
    assert answer["usage"]["prompt_tokens"] == sum(len(output.prompt_token_ids) for output in outputs)
    assert answer["usage"]["completion_tokens"] == num_drawn
    assert answer["system_fingerprint"] == outputs[0].digest


def test_token_ids_are_a_prompt(served):
    ids = served.llm.tokenizer.encode(PROMPTS[0])
    forms = [PROMPTS[0], [PROMPTS[0]], ids, [ids]]
    texts = {
        ok(served.user.post("/v1/completions", json=BODY | {"prompt": form}))["choices"][0]["text"] for form in forms
    }
    assert len(texts) == 1


@pytest.mark.parametrize("asked, count", [(0, 1), (True, 1), (3, 3)])
def test_completion_logprobs_in_each_form(served, asked, count):
    body = BODY | dict(prompt=PROMPTS[0], logprobs=asked, return_tokens_as_token_ids=True, return_token_ids=True)
    (choice,) = complete(served, **body)
    found = choice["logprobs"]
    assert found["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    for name, logprob, top in zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True):
        assert top[name] == logprob and count <= len(top) <= count + 1


@pytest.mark.parametrize("asked", [None, False])
def test_without_logprobs_there_are_none(served, asked):
    (choice,) = complete(served, **BODY, prompt="1+1=", logprobs=asked)
    assert choice["logprobs"] is None


def test_prompt_logprobs_have_every_token_of_the_prompt(served):
    body = BODY | dict(prompt=PROMPTS[0], max_tokens=1, prompt_logprobs=2, return_token_ids=True)
    (choice,) = complete(served, **body)
    entries = choice["prompt_logprobs"]
    assert entries[0] is None and len(entries) == len(choice["prompt_token_ids"])
    (output,) = served.llm.generate(PROMPTS[:1], SamplingParams(max_tokens=1, prompt_logprobs=2))
    for token, entry, own in zip(choice["prompt_token_ids"][1:], entries[1:], output.prompt_logprobs[1:], strict=True):
        assert entry[str(token)]["logprob"] == own[token].logprob and entry[str(token)]["rank"] == own[token].rank


def test_echo_puts_text_and_logprobs_of_the_prompt_first(served):
    body = BODY | dict(prompt=PROMPTS[0], logprobs=1, echo=True, max_tokens=3)
    (choice,) = complete(served, **body)
    (plain,) = ok(served.user.post("/v1/completions", json=body | {"echo": False}))["choices"]
    found, own = choice["logprobs"], plain["logprobs"]
    assert choice["text"] == PROMPTS[0] + plain["text"]
    assert found["tokens"] == list(PROMPTS[0]) + own["tokens"] and found["token_logprobs"][0] is None
    assert found["token_logprobs"][6:] == own["token_logprobs"]
    assert found["text_offset"] == list(range(6)) + [6 + offset for offset in own["text_offset"]]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/inference/v1/generate"])
def test_structured_outputs_on_every_route(served, path):
    pytest.importorskip("llguidance")
    sampling = dict(max_tokens=20, seed=3, structured_outputs={"choice": ["yes", "no"]})
    ids = served.llm.tokenizer.encode(PROMPTS[0])
    bodies = {
        "/v1/completions": sampling | {"prompt": ids},
        "/v1/chat/completions": sampling | {"messages": [{"role": "user", "content": PROMPTS[0]}]},
        "/inference/v1/generate": {"token_ids": ids, "sampling_params": sampling, "output_mode": "text"},
    }
    (choice,) = ok(served.user.post(path, json=bodies[path]))["choices"]
    assert (choice.get("message") or {"content": choice.get("text")})["content"] in ("yes", "no")


@pytest.mark.parametrize(
    "asked", [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}]
)
def test_a_response_format_is_followed(served, asked):
    pytest.importorskip("llguidance")
    body = dict(messages=[{"role": "user", "content": "1+1="}], seed=5, max_tokens=300, n=4, response_format=asked)
    choices = ok(served.user.post("/v1/chat/completions", json=body))["choices"]
    found = [json.loads(choice["message"]["content"]) for choice in choices if choice["finish_reason"] == "stop"]
    assert found and all(isinstance(value, dict) for value in found)
    assert asked["type"] == "json_object" or all(set(value) == {"sum"} for value in found)


def test_a_stream_joined_is_the_whole_answer(served):
    body = BODY | dict(prompt=PROMPTS, n=2, logprobs=2, return_token_ids=True, return_coordinate=True)
    whole = ok(served.user.post("/v1/completions", json=body))
    found = events(served.user, "/v1/completions", body | {"stream_options": {"include_usage": True}})
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    for choice in whole["choices"]:
        own = [each for event in found for each in event["choices"] if each["index"] == choice["index"]]
        assert "".join(each["text"] for each in own) == choice["text"]
        assert [token for each in own for token in each.get("token_ids", [])] == choice["token_ids"]
        for name in choice["logprobs"]:
            joined = [value for each in own if each.get("logprobs") for value in each["logprobs"][name]]
            assert joined == choice["logprobs"][name], name
        assert [each["finish_reason"] for each in own if each["finish_reason"]] == [choice["finish_reason"]]
        assert [each["prompt_token_ids"] for each in own if "prompt_token_ids" in each] == [choice["prompt_token_ids"]]
        assert [each["coordinate"] for each in own if "coordinate" in each] == [choice["coordinate"]]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/inference/v1/generate"])
def test_every_answer_carries_a_coordinate_that_replays(served, path):
    body = {"return_coordinate": True}
    if path.startswith("/inference"):
        body |= dict(token_ids=[16, 10, 16, 28], sampling_params=dict(max_tokens=6, n=2))
    else:
        body |= dict(max_tokens=6, n=2, prompt="1+1=") if "chat" not in path else dict(max_tokens=6, n=2)
        body |= dict(messages=[{"role": "user", "content": "1+1="}]) if "chat" in path else {}
    for choice in ok(served.user.post(path, json=body))["choices"]:
        assert served.llm.replay(Coordinate.from_json(json.dumps(choice["coordinate"]))).holds


def test_calls_without_a_seed_differ_and_so_do_equal_prompts(served):
    body = dict(prompt=["1"] * 2, max_tokens=24, ignore_eos=True)
    texts = [choice["text"] for _ in range(2) for choice in complete(served, **body)]
    assert len(set(texts)) == 4


def test_a_chat_has_messages_logprobs_and_ids(served):
    messages = [{"role": "user", "content": "12+30="}]
    body = BODY | dict(messages=messages, n=2, logprobs=True, top_logprobs=2, return_token_ids=True)
    answer = ok(served.user.post("/v1/chat/completions", json=body))
    (output,) = served.llm.chat(messages, SamplingParams(n=2, max_tokens=6, seed=3, temperature=0.8))
    assert answer["prompt_token_ids"] == output.prompt_token_ids
    for choice, sample in zip(answer["choices"], output.outputs, strict=True):
        assert choice["message"] == {"role": "assistant", "content": sample.text}
        content = choice["logprobs"]["content"]
        assert choice["token_ids"] == sample.token_ids and len(content) == len(sample.token_ids)
        assert logprob_bits([entry["logprob"] for entry in content]) == sample.token_logprobs.tobytes()
        assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    streamed = events(served.user, "/v1/chat/completions", body)
    assert streamed[0]["choices"][0]["delta"]["role"] == "assistant"
    for choice in answer["choices"]:
        own = [each for event in streamed for each in event["choices"] if each["index"] == choice["index"]]
        assert "".join(each["delta"]["content"] for each in own) == choice["message"]["content"]
        content = [entry for each in own for entry in each["logprobs"]["content"]]
        assert content == choice["logprobs"]["content"]


@pytest.mark.parametrize("asked", [0, 1])
def test_tokens_in_and_out_with_both_forms_of_logprobs(served, asked):
    ids = served.llm.tokenizer.encode(PROMPTS[0])
    body = dict(token_ids=ids, sampling_params=dict(max_tokens=6, seed=3, logprobs=asked), return_token_ids=True)
    answer = ok(served.user.post("/inference/v1/generate", json=body | dict(cache_salt="v1", request_id="mine")))
    (output,) = served.llm.generate([ids], SamplingParams(max_tokens=6, seed=3))
    (choice,), (sample,) = answer["choices"], output.outputs
    assert answer["request_id"] == "mine" and answer["prompt_token_ids"] == ids
    assert choice["token_ids"] == sample.token_ids
    assert choice["weight_versions"] == [{"version": 0, "start": 0, "stop": len(sample.token_ids)}]
    content = choice["logprobs"]["content"]
    assert logprob_bits([entry["logprob"] for entry in content]) == sample.token_logprobs.tobytes()
    for token, entry in zip(sample.token_ids, content, strict=True):
        assert entry["token"] == f"token_id:{token}" and entry["token_id"] == token and entry["rank"] >= 1
        assert [top["rank"] for top in entry["top_logprobs"]] == list(range(1, asked + 1))
    streamed = events(served.user, "/inference/v1/generate", body)
    assert [token for event in streamed for token in event["choices"][0]["token_ids"]] == sample.token_ids


NAMED = [3, 18, 250]


@pytest.mark.parametrize("count", [0, 2])
def test_named_tokens_have_logprobs_on_every_route(served, count):
    asked = dict(max_tokens=6, seed=3, temperature=0.8, logprob_token_ids=NAMED)
    ids, messages = served.llm.tokenizer.encode(PROMPTS[0]), [{"role": "user", "content": PROMPTS[0]}]
    sampling = SamplingParams(**asked, logprobs=count)
    ((plain,),) = [output.outputs for output in served.llm.generate([ids], sampling)]
    ((of_chat,),) = [output.outputs for output in served.llm.chat(messages, sampling)]

    def expected(told) -> set[int]:
        return {token for token, entry in told.items() if entry.rank is not None and entry.rank <= count} | {*NAMED}

    (choice,) = complete(served, prompt=ids, logprobs=count, return_tokens_as_token_ids=True, **asked)
    names = [{f"token_id:{token}": entry.logprob for token, entry in told.items()} for told in plain.logprobs]
    assert choice["logprobs"]["top_logprobs"] == names

    body = asked | dict(messages=messages, logprobs=True, top_logprobs=count, return_tokens_as_token_ids=True)
    (choice,) = ok(served.user.post("/v1/chat/completions", json=body))["choices"]
    for told, entry in zip(of_chat.logprobs, choice["logprobs"]["content"], strict=True):
        found = {top["token"]: top["logprob"] for top in entry["top_logprobs"]}
        assert found == {f"token_id:{token}": told[token].logprob for token in expected(told)}

    body = {"token_ids": ids, "sampling_params": asked | ({"logprobs": count} if count else {})}
    (choice,) = ok(served.user.post("/inference/v1/generate", json=body))["choices"]
    for told, entry in zip(plain.logprobs, choice["logprobs"]["content"], strict=True):
        found = {top["token_id"]: (top["logprob"], top["rank"]) for top in entry["top_logprobs"]}
        assert found == {token: (told[token].logprob, told[token].rank) for token in expected(told)}


def test_stops_and_rules_are_those_of_sampling_params(served):
    rules = dict(stop=["2"], stop_token_ids=[19], min_tokens=2, ignore_eos=True, top_k=20, logit_bias={"18": 2.0})
    rules |= dict(allowed_token_ids=list(range(15, 26)), repetition_penalty=1.1, max_tokens=12, seed=5)
    (choice,) = ok(served.user.post("/v1/completions", json=dict(prompt="1+", return_token_ids=True, **rules)))[
        "choices"
    ]
    (output,) = served.llm.generate(["1+"], SamplingParams(**rules))
    (sample,) = output.outputs
    assert (choice["token_ids"], choice["text"]) == (sample.token_ids, sample.text)
    assert (choice["finish_reason"], choice["stop_reason"]) == (sample.finish_reason, sample.stop_reason)


def test_tokenize_and_detokenize(served):
    found = ok(served.user.post("/tokenize", json={"model": "calc", "prompt": "12+30=", "return_token_strs": True}))
    ids = served.llm.tokenizer.encode("12+30=")
    assert found == {"count": 6, "max_model_len": 512, "tokens": ids, "token_strs": list("12+30=")}
    assert ok(served.user.post("/detokenize", json={"tokens": ids})) == {"prompt": "12+30="}
    messages = [{"role": "user", "content": "1+1="}]
    chat = ok(served.user.post("/tokenize", json={"messages": messages}))
    assert chat["tokens"] == served.llm.tokenizer.encode_chat(messages)


def test_models_and_metrics(served):
    (model,) = ok(served.user.get("/v1/models"))["data"]
    assert (model["id"], model["max_model_len"]) == ("calc", 512)
    name = 'vllm:generation_tokens_total{model_name="calc"} '

    def drawn() -> float:
        lines = served.user.get("/metrics").text.splitlines()
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    before = drawn()
    ok(served.user.post("/v1/completions", json=dict(prompt="1+", max_tokens=7, ignore_eos=True)))
    assert drawn() == before + 7
    assert 'vllm:request_success_total{finished_reason="length",model_name="calc"}' in served.user.get("/metrics").text
