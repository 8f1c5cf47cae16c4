"""What is tried against a server and what it gets, and the tables of it in jaxengine/server/README.md.

`python tests/server/attacks.py` writes them anew.
"""

from pathlib import Path

from serving import ADMIN, KEY

README = Path(__file__).parent.parent.parent / "jaxengine" / "server" / "README.md"
GENERATE, COMPLETE, CHAT = "/inference/v1/generate", "/v1/completions", "/v1/chat/completions"
SGLANG = "/generate"
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
    "both text and input_ids": (SGLANG, {"text": "1", "input_ids": [1]}, 400, "text"),
    "neither of them": (SGLANG, {}, 400, "text"),
    "SGLang's stream": (SGLANG, {"text": "1", "stream": True}, 400, "stream"),
    "an unknown field of SGLang's": (SGLANG, {"text": "1", "sampling_params": {"maxtokens": 1}}, 400, "maxtokens"),
    "a request id of 300 characters": (COMPLETE, {"prompt": "1", "request_id": "x" * 300}, 400, "request_id"),
    "a bias for 600 tokens": (
        COMPLETE, {"prompt": "1", "logit_bias": {str(i): 1 for i in range(600)}}, 400, "logit_bias",
    ),
    "no token allowed": (COMPLETE, {"prompt": "1", "allowed_token_ids": []}, 400, "allowed_token_ids"),
    "300 bad words": (COMPLETE, {"prompt": "1", "bad_words": ["x"] * 300}, 400, "bad_words"),
    "a prompt cut to nothing": (COMPLETE, {"prompt": "1", "truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens"),
    "no body for weights": ("/update_weights", {}, 400, "update_info"),
    "SGLang's weights outside the root": ("/update_weights_from_disk", {"model_path": "/etc"}, 400, "weight_dir"),
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
MODELS = "GET /v1/models"
EVIL = "evil.example"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# name -> (whether the server has keys, route, headers, status, code of the error)
WAYS_IN = {
    "no key": (True, MODELS, {}, 401, "invalid_api_key"),
    "another key": (True, MODELS, bearer("wrong"), 401, "invalid_api_key"),
    "the key without its last character": (True, MODELS, bearer(KEY[:-1]), 401, "invalid_api_key"),
    "the key and a character more": (True, MODELS, bearer(KEY + "x"), 401, "invalid_api_key"),
    "the key in capitals": (True, MODELS, bearer(KEY.upper()), 401, "invalid_api_key"),
    "a bearer of nothing": (True, MODELS, {"Authorization": "Bearer"}, 401, "invalid_api_key"),
    "the key without a scheme": (True, MODELS, {"Authorization": KEY}, 401, "invalid_api_key"),
    "the key under another scheme": (True, MODELS, {"Authorization": f"Basic {KEY}"}, 401, "invalid_api_key"),
    "a key of 10,000 characters": (True, MODELS, bearer("x" * 10_000), 401, "invalid_api_key"),
    "the key in another header": (True, MODELS, {"X-API-Key": KEY}, 401, "invalid_api_key"),
    "the key in a cookie": (True, MODELS, {"Cookie": f"api_key={KEY}"}, 401, "invalid_api_key"),
    "the key in the address": (True, "GET /v1/models?api_key=" + KEY.replace(" ", "%20"), {}, 401, "invalid_api_key"),
    "a route that is not there, without a key": (True, "GET /admin", {}, 401, "invalid_api_key"),
    "an upgrade to a websocket, without a key": (
        True, MODELS, {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
                       "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA=="}, 401, "invalid_api_key",
    ),
    "/health by another method": (True, "POST /health", {}, 405, "no_route"),
    "a path under /health": (True, "POST /health/../pause", {}, 401, "invalid_api_key"),
    "an admin's route with the user's key": (True, "POST /pause", bearer(KEY), 401, "invalid_api_key"),
    "the same by another method": (True, "GET /pause", bearer(KEY), 401, "invalid_api_key"),
    "the same, escaped": (True, "POST /%70ause", bearer(KEY), 401, "invalid_api_key"),
    "the same with two slashes": (True, "POST //pause", bearer(KEY), 404, "no_route"),
    "the same with a slash after it": (True, "POST /pause/", bearer(KEY), 307, None),
    "the same in capitals": (True, "POST /PAUSE", bearer(KEY), 404, "no_route"),
    "the same under another name": (
        True, "POST /v1/models", bearer(KEY) | {"X-Original-URL": "/pause"}, 405, "no_route",
    ),
    "an admin's route where there is no admin key": (False, "POST /pause", bearer(ADMIN), 403, "no_admin_key"),
    "a web page, where there is no key": (False, MODELS, {"Origin": f"http://{EVIL}"}, 403, "origin"),
    "a file opened in a browser, where there is no key": (False, MODELS, {"Origin": "null"}, 403, "origin"),
    "a web page's question whether it may": (
        False, "OPTIONS /v1/completions", {"Origin": f"http://{EVIL}", "Access-Control-Request-Method": "POST"},
        403, "origin",
    ),
    "a web page whose name was made to lead here": (False, MODELS, {"Host": f"{EVIL}:8000"}, 403, "host"),
}  # fmt: skip


def tables() -> str:
    """Both tables in Markdown."""
    bad = [f"| {name} | `{path}` | {status} | {_code(param)} |" for name, (path, _, status, param) in ATTACKS.items()]
    ways = [
        f"| {name} | `{route}` | {'yes' if has_keys else 'no'} | {status} | {_code(code)} |"
        for name, (has_keys, route, _, status, code) in WAYS_IN.items()
    ]
    return "\n".join([
        f"### {len(bad)} bad inputs", "", "| what | route | status | field that the error names |", "|---|---|---|---|",
        *bad, "", f"### {len(ways)} ways in", "", "| what | route | the server has keys | status | code |",
        "|---|---|---|---|---|", *ways, "",
    ])  # fmt: skip


def _code(word: str | None) -> str:
    return "" if word is None else f"`{word}`"


if __name__ == "__main__":
    text = README.read_text()
    README.write_text(text[: text.index("### ")] + tables())
