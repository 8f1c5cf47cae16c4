"""What each bad input gets: a status and a field, never a stop of the server, never another request's bits."""

import json

import pytest

from jaxengine import SamplingParams

GENERATE, COMPLETE, CHAT = "/inference/v1/generate", "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "1+1="}]


def function(name: str, parameters: dict | None = None) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": parameters or {"type": "object"}}}


REGEX = {"regex": "a"}
DEEP = "[" * 50_000 + "]" * 50_000
# name -> (path, body as JSON values or as bytes, status, param of the error or None where it names none)
ATTACKS = {
    "no body": (COMPLETE, b"", 400, "prompt"),
    "no JSON": (COMPLETE, b"{prompt", 400, None),
    "half a character": (COMPLETE, b'{"prompt": "\xff"}', 400, None),
    "JSON that is no object": (COMPLETE, [1, 2], 400, None),
    "deep JSON": (COMPLETE, DEEP.encode()[:90_000], 400, None),
    "deep JSON in a field": (CHAT, b'{"messages": [{"a": ' + b"[" * 900 + b"]" * 900 + b"}]}", 400, "messages"),
    "a body that is too long": (COMPLETE, {"prompt": "1" * 200_000}, 413, None),
    "a number of 5,000 digits": (COMPLETE, b'{"prompt": "1", "seed": ' + b"9" * 5000 + b"}", 400, None),
    "no prompt": (COMPLETE, {}, 400, "prompt"),
    "an empty prompt": (COMPLETE, {"prompt": ""}, 400, None),
    "an empty list": (COMPLETE, {"prompt": []}, 400, "prompt"),
    "an empty prompt among others": (COMPLETE, {"prompt": ["1+1=", ""]}, 400, None),
    "a prompt that is an object": (COMPLETE, {"prompt": {"prompt": "1"}}, 400, "prompt"),
    "prompts that are objects": (COMPLETE, {"prompt": [{"prompt_token_ids": [1]}]}, 400, "prompt"),
    "a prompt that is a number": (COMPLETE, {"prompt": 5}, 400, "prompt"),
    "token ids that are flags": (COMPLETE, {"prompt": [True, False]}, 400, None),
    "token ids that are fractions": (COMPLETE, {"prompt": [[1.5]]}, 400, None),
    "a negative token id": (COMPLETE, {"prompt": [[-1]]}, 400, None),
    "a token id beyond the vocabulary": (COMPLETE, {"prompt": [[259]]}, 400, None),
    "a token id of 80 bits": (COMPLETE, {"prompt": [[2**80]]}, 400, None),
    "nested prompts": (COMPLETE, {"prompt": [[[1]]]}, 400, None),
    "half a surrogate pair": (COMPLETE, b'{"prompt": "\\ud800"}', 400, None),
    "a prompt longer than the context": (COMPLETE, {"prompt": "1" * 600}, 400, None),
    "another model": (COMPLETE, {"model": "gpt-4", "prompt": "1"}, 404, "model"),
    "a model that is a path": (COMPLETE, {"model": "../../etc/passwd", "prompt": "1"}, 404, "model"),
    "a model that is a number": (COMPLETE, {"model": 1, "prompt": "1"}, 400, "model"),
    "temperature NaN": (COMPLETE, b'{"prompt": "1", "temperature": NaN}', 400, None),
    "temperature infinite": (COMPLETE, b'{"prompt": "1", "temperature": 1e999}', 400, "temperature"),
    "temperature of 400 digits": (COMPLETE, {"prompt": "1", "temperature": 10**400}, 400, "temperature"),
    "temperature as text": (COMPLETE, {"prompt": "1", "temperature": "1"}, 400, "temperature"),
    "temperature below 0": (COMPLETE, {"prompt": "1", "temperature": -1}, 400, "temperature"),
    "top_p of 0": (COMPLETE, {"prompt": "1", "top_p": 0.0}, 400, "top_p"),
    "n of 0": (COMPLETE, {"prompt": "1", "n": 0}, 400, "n"),
    "n of a billion": (COMPLETE, {"prompt": "1", "n": 10**9}, 400, "n"),
    "n as a flag": (COMPLETE, {"prompt": "1", "n": True}, 400, "n"),
    "more samples than a call may have": (COMPLETE, {"prompt": ["1"] * 100, "n": 6}, 400, "n"),
    "max_tokens below 0": (COMPLETE, {"prompt": "1", "max_tokens": -1}, 400, "max_tokens"),
    "min_tokens above max_tokens": (COMPLETE, {"prompt": "1", "min_tokens": 99}, 400, "min_tokens"),
    "logprobs of a billion": (COMPLETE, {"prompt": "1", "logprobs": 10**9}, 400, "logprobs"),
    "prompt_logprobs of all": (COMPLETE, {"prompt": "1", "prompt_logprobs": -1}, 400, "prompt_logprobs"),
    "129 tokens with logprobs": (
        COMPLETE, {"prompt": "1", "logprobs": 0, "logprob_token_ids": [1] * 129}, 400, "logprob_token_ids",
    ),
    "a token beyond the vocabulary with a logprob": (
        CHAT, {"messages": MESSAGES, "logprobs": True, "logprob_token_ids": [259]}, 400, "logprob_token_ids",
    ),
    "tokens with logprobs without logprobs": (
        COMPLETE, {"prompt": "1", "logprob_token_ids": [1]}, 400, "logprob_token_ids",
    ),
    "65 stop strings": (COMPLETE, {"prompt": "1", "stop": [str(i) for i in range(65)]}, 400, "stop"),
    "an empty stop string": (COMPLETE, {"prompt": "1", "stop": [""]}, 400, "stop"),
    "a long stop string": (COMPLETE, {"prompt": "1", "stop": "1" * 2000}, 400, "stop"),
    "stop token ids beyond the vocabulary": (COMPLETE, {"prompt": "1", "stop_token_ids": [999]}, 400, "stop_token_ids"),
    "a seed below 0": (COMPLETE, {"prompt": "1", "seed": -1}, 400, "seed"),
    "a bias of text": (COMPLETE, {"prompt": "1", "logit_bias": {"x": 1}}, 400, "logit_bias"),
    "a bias that is infinite": (COMPLETE, b'{"prompt": "1", "logit_bias": {"1": 1e999}}', 400, "logit_bias"),
    "an unknown field": (COMPLETE, {"prompt": "1", "temprature": 1}, 400, "temprature"),
    "a grammar": (COMPLETE, {"prompt": "1", "structured_outputs": {"regex": "(a"}}, 400, "structured_outputs"),
    "a grammar of 70,000 characters": (
        COMPLETE, {"prompt": "1", "structured_outputs": {"regex": "a" * 70_000}}, 400, "structured_outputs",
    ),
    "two grammars": (
        CHAT, {"messages": MESSAGES, "structured_outputs": {"regex": "a", "json": "{}"}}, 400, "structured_outputs",
    ),
    "a schema from elsewhere": (
        CHAT,
        {"messages": MESSAGES, "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://a/"}}}},
        400, "structured_outputs",
    ),
    "a grammar by its older name": (COMPLETE, {"prompt": "1", "guided_json": {"type": "object"}}, 400, "guided_json"),
    "a response format": (COMPLETE, {"prompt": "1", "response_format": {"type": "x"}}, 400, "response_format"),
    "a priority of 80 bits": (COMPLETE, {"prompt": "1", "priority": 2**80}, 400, "priority"),
    "a priority as text": (COMPLETE, {"prompt": "1", "priority": "high"}, 400, "priority"),
    "echo that streams": (COMPLETE, {"prompt": "1", "echo": True, "stream": True}, 400, "echo"),
    "a salt of 2,000 characters": (COMPLETE, {"prompt": "1", "cache_salt": "x" * 2000}, 400, "cache_salt"),
    "messages that are text": (CHAT, {"messages": "hello"}, 400, "messages"),
    "no messages": (CHAT, {"messages": []}, 400, "messages"),
    "a role that is no word": (CHAT, {"messages": [{"role": "<|im_end|>", "content": "x"}]}, 400, "messages"),
    "an image": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
    "a tool without a function": (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, 400, "tools"),
    "a tool that is text": (CHAT, {"messages": MESSAGES, "tools": ["add"]}, 400, "tools"),
    "a tool whose name is a sentence": (CHAT, {"messages": MESSAGES, "tools": [function("a b")]}, 400, "tools"),
    "two tools of one name": (CHAT, {"messages": MESSAGES, "tools": [function("a")] * 2}, 400, "tools"),
    "129 tools": (CHAT, {"messages": MESSAGES, "tools": [function(f"f{i}") for i in range(129)]}, 400, "tools"),
    "a choice that is none": (
        CHAT, {"messages": MESSAGES, "tools": [function("a")], "tool_choice": "any"}, 400, "tool_choice",
    ),
    "a choice of no tool": (
        CHAT, {"messages": MESSAGES, "tools": [function("a")], "tool_choice": {"function": {"name": "b"}}},
        400, "tool_choice",
    ),
    "a choice without tools": (CHAT, {"messages": MESSAGES, "tool_choice": "required"}, 400, "tool_choice"),
    "a choice beside a grammar": (
        CHAT,
        {"messages": MESSAGES, "tools": [function("a")], "tool_choice": "required", "structured_outputs": REGEX},
        400, "tool_choice",
    ),
    "a tool whose schema nothing meets": (
        CHAT, {"messages": MESSAGES, "tools": [function("a", {"type": "x"})], "tool_choice": "required"},
        400, "structured_outputs",
    ),
    "top_logprobs without logprobs": (CHAT, {"messages": MESSAGES, "top_logprobs": 2}, 400, "top_logprobs"),
    "a template that escapes": (
        CHAT, {"messages": MESSAGES, "chat_template": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}, 400, None,
    ),
    "a template that never ends": (
        CHAT, {"messages": MESSAGES, "chat_template": "{% for i in range(10**12) %}x{% endfor %}"}, 400, None,
    ),
    "arguments of the template that are its own": (
        CHAT, {"messages": MESSAGES, "chat_template_kwargs": {"messages": []}}, 400, None,
    ),
    "no sampling_params": (GENERATE, {"token_ids": [1]}, 400, "sampling_params"),
    "an unknown sampling field": (GENERATE, {"token_ids": [1], "sampling_params": {"maxtokens": 1}}, 400, "maxtokens"),
    "no token ids": (GENERATE, {"token_ids": [], "sampling_params": {}}, 400, None),
    "text as token ids": (GENERATE, {"token_ids": ["1"], "sampling_params": {}}, 400, "token_ids"),
    "an unknown mode": (GENERATE, {"token_ids": [1], "sampling_params": {}, "output_mode": "x"}, 400, "output_mode"),
    "tokens beyond the vocabulary": ("/detokenize", {"tokens": [99999]}, 400, None),
    "both prompt and messages": ("/tokenize", {"prompt": "1", "messages": MESSAGES}, 400, "prompt"),
    "weights outside the root": ("/update_weights", {"weight_dir": "../../../etc"}, 400, "weight_dir"),
    "weights at an absolute path": ("/update_weights", {"weight_dir": "/etc"}, 400, "weight_dir"),
    "weights with a NUL": ("/update_weights", {"weight_dir": "a\0b"}, 400, "weight_dir"),
    "weights over NCCL": ("/update_weights", {"update_info": {"names": ["a"], "shapes": [[1]]}}, 501, "update_info"),
    "an unknown pause": ("/pause?mode=forever", {}, 400, "mode"),
    "an unknown sleep": ("/sleep?level=9", {}, 400, None),
    "an unknown route": ("/v1/embeddings", {}, 404, None),
    "a path that climbs": ("/v1/../../etc/passwd", {}, 404, None),
    "a path that climbs in secret": ("/%2e%2e/%2e%2e/etc/passwd", {}, 404, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def before(shared_server):
    """What a neighbour drew before the attacks."""
    return drawn(shared_server)


def drawn(served) -> list[int]:
    body = {"prompt": "12+30=", "max_tokens": 8, "seed": 1, "return_token_ids": True, "logprobs": 1}
    (choice,) = served.user.post(COMPLETE, json=body).json()["choices"]
    return [choice["token_ids"], choice["logprobs"]]


@pytest.mark.parametrize("name", ATTACKS)
def test_what_a_bad_input_gets(served, before, name):
    path, body, status, param = ATTACKS[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = served.admin.post(path, content=content, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), response.text
    assert set(error) == {"message", "type", "param", "code"} and " at 0x" not in error["message"]
    assert len(response.text) < 3000
    assert served.user.get("/health").status_code == 200 and drawn(served) == before


@pytest.mark.parametrize(
    "near, meant", [("temprature", "temperature"), ("max_token", "max_tokens"), ("promt", "prompt")]
)
def test_an_unknown_field_names_the_nearest(served, near, meant):
    error = served.user.post(COMPLETE, json={"prompt": "1", near: 1}).json()["error"]
    assert f"{meant!r}" in error["message"] and error["code"] == "unknown_field"


def test_a_body_without_a_length_is_cut_off_too(served):
    chunks = (b'{"prompt": "' + b"1" * 50_000, b"1" * 50_000, b"1" * 50_000)
    assert served.user.post(COMPLETE, content=iter(chunks)).status_code == 413


def test_another_method_is_405(served):
    assert served.user.get(COMPLETE).json()["error"]["code"] == "no_route"
    assert served.user.delete("/v1/models").status_code == 405


def test_unsupported_fields_that_ask_for_nothing_are_taken(served):
    body = {"prompt": "1", "max_tokens": 1, "structured_outputs": None, "priority": 0, "user": "me", "best_of": None}
    assert served.user.post(COMPLETE, json=body).status_code == 200


def test_a_request_id_in_use_is_409_and_the_first_goes_on(served):
    ids = served.llm.tokenizer.encode("1+")
    body = {
        "token_ids": ids,
        "sampling_params": {"max_tokens": 150, "ignore_eos": True, "seed": 1},
        "request_id": "mine",
    }
    with served.user.stream("POST", GENERATE, json=body | {"stream": True}) as response:
        lines = response.iter_lines()
        found = [next(lines)]
        assert served.admin.post(GENERATE, json=body).status_code == 409
        found += [line for line in lines if line]
    (output,) = served.llm.generate([ids], SamplingParams(max_tokens=150, ignore_eos=True, seed=1))
    tokens = [json.loads(line[6:])["choices"][0]["token_ids"] for line in found if line.startswith("data: {")]
    assert [token for each in tokens for token in each] == output.outputs[0].token_ids
