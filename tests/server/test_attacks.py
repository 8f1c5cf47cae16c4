"""What each bad input gets: a status and a field, never a stop of the server, never another request's bits."""

import json

import pytest
from attacks import ATTACKS, COMPLETE, GENERATE, README, WAYS_IN, tables
from serving import running

from jaxengine import SamplingParams


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


@pytest.fixture(scope="module")
def keyless(calc):
    """A server without keys."""
    with running(calc) as found:
        yield found


@pytest.mark.parametrize("name", WAYS_IN)
def test_what_a_way_in_gets(served, keyless, name):
    has_keys, route, headers, status, code = WAYS_IN[name]
    method, path = route.split(" ", 1)
    response = (served if has_keys else keyless).nobody.request(method, path, headers=headers)
    found = response.json()["error"]["code"] if response.content else None
    assert (response.status_code, found) == (status, code), response.text
    assert not served.llm.is_paused


def test_who_may_come_in_without_keys(keyless):
    for host in ("127.0.0.1", "localhost:8000", "[::1]:8000"):
        assert keyless.nobody.get("/v1/models", headers={"Host": host}).status_code == 200
    assert keyless.nobody.get("/health", headers={"Host": "probe.example"}).status_code == 200


def test_the_readme_says_what_each_gets():
    assert len(ATTACKS) >= 40 and len(WAYS_IN) >= 10
    assert README.read_text().endswith(tables()), "python tests/server/attacks.py writes the tables"


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
