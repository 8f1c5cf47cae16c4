"""Judged by the clients' own code, unmodified: openai, TRL's VLLMClient, renderers."""

import asyncio
import json
import math
from unittest import mock

import numpy as np
import pytest
from serving import ADMIN, KEY

from jaxengine import SamplingParams
from jaxengine.coordinate import Coordinate

pytestmark = pytest.mark.wire
MESSAGES = [{"role": "user", "content": "12+30="}]


@pytest.fixture
def openai(served):
    module = pytest.importorskip("openai")
    with module.OpenAI(base_url=f"{served.address}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def float32(values) -> bytes:
    return np.asarray(values, np.float32).tobytes()


# -- openai -----------------------------------------------------------------------------------------------------------


def test_openai_lists_the_model(openai):
    (model,) = openai.models.list().data
    assert model.id == "calc" and model.max_model_len == 512


def test_openai_completes(openai, served):
    params = SamplingParams(n=2, max_tokens=8, seed=1, temperature=0.7, top_p=0.9, stop=["9"])
    prompts = ["12+30=", "7*8="]
    answer = openai.completions.create(
        model="calc", prompt=prompts, n=2, max_tokens=8, seed=1, temperature=0.7, top_p=0.9, stop=["9"], logprobs=2,
        extra_body={"return_token_ids": True, "return_coordinate": True},
    )  # fmt: skip
    samples = [sample for output in served.llm.generate(prompts, params) for sample in output.outputs]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice, sample in zip(answer.choices, samples, strict=True):
        assert (choice.text, choice.token_ids) == (sample.text, sample.token_ids)
        assert float32(choice.logprobs.token_logprobs) == sample.token_logprobs.tobytes()
        assert served.llm.replay(Coordinate.from_json(json.dumps(choice.coordinate))).holds
    assert answer.usage.completion_tokens == sum(len(sample.token_ids) for sample in samples)


def test_openai_streams(openai):
    asked = dict(model="calc", prompt="12+30=", n=2, max_tokens=12, seed=2, extra_body={"ignore_eos": True})
    whole = openai.completions.create(**asked)
    chunks = list(openai.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        own = [each.text for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(own) == choice.text and len(own) > 3
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 24


def test_openai_chats_streaming_and_not(openai, served):
    asked = dict(model="calc", messages=MESSAGES, n=2, max_completion_tokens=8, seed=3, logprobs=True, top_logprobs=2)
    whole = openai.chat.completions.create(**asked)
    (output,) = served.llm.chat(MESSAGES, SamplingParams(n=2, max_tokens=8, seed=3))
    for choice, sample in zip(whole.choices, output.outputs, strict=True):
        assert choice.message.content == sample.text and choice.finish_reason == sample.finish_reason
        assert float32([entry.logprob for entry in choice.logprobs.content]) == sample.token_logprobs.tobytes()
        assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    chunks = list(openai.chat.completions.create(**asked, stream=True))
    for choice in whole.choices:
        own = [each.delta.content for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(own) == choice.message.content


def test_openai_asks_for_a_schema(openai):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    schema |= {"additionalProperties": False}
    answer = openai.chat.completions.create(
        model="calc", messages=MESSAGES, n=4, seed=5, max_completion_tokens=200,
        response_format={"type": "json_schema", "json_schema": {"name": "sum", "schema": schema}},
    )  # fmt: skip
    found = [json.loads(choice.message.content) for choice in answer.choices if choice.finish_reason == "stop"]
    assert found and all(set(value) == {"sum"} for value in found)


def test_openai_calls_tools(openai):
    pytest.importorskip("llguidance")
    schema = {"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "add", "parameters": schema | {"type": "object"}}}]
    asked = dict(
        model="calc", messages=MESSAGES, seed=5, tools=tools, tool_choice="required", parallel_tool_calls=False
    )
    (choice,) = openai.chat.completions.create(**asked).choices
    (call,) = choice.message.tool_calls
    assert call.function.name == "add" and set(json.loads(call.function.arguments)) == {"a"}
    assert choice.finish_reason == "tool_calls"
    with openai.chat.completions.stream(**asked) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert streamed.function.arguments == call.function.arguments


def test_openai_raises_its_own_errors(openai, served):
    module = pytest.importorskip("openai")
    with pytest.raises(module.BadRequestError, match="temperature") as caught:
        openai.completions.create(model="calc", prompt="1", temperature=-1)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(module.NotFoundError, match="gpt-4"):
        openai.completions.create(model="gpt-4", prompt="1")
    with pytest.raises(module.AuthenticationError):
        openai.with_options(api_key="wrong").models.list()
    with pytest.raises(module.BadRequestError, match="response_format"):
        openai.chat.completions.create(model="calc", messages=MESSAGES, response_format={"type": "x"})


# -- trl --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trl(served):
    """TRL's client. It knows no keys, so they are put into its session; and it wants vllm to be installed."""
    module = pytest.importorskip("trl.generation.vllm_client")
    with mock.patch.object(module, "is_vllm_available", lambda *_: True), mock.patch("requests.Session") as session:
        import requests.sessions

        made = requests.sessions.Session()
        made.headers["Authorization"] = f"Bearer {ADMIN}"
        session.return_value = made
        yield module.VLLMClient(base_url=served.address)
        made.close()


def test_trl_generates(trl, served):
    prompts = ["12+30=", "7*8="]
    found = trl.generate(prompts, n=2, max_tokens=8, temperature=0.8, logprobs=2, generation_kwargs={"seed": 4})
    outputs = served.llm.generate(prompts, SamplingParams(n=2, max_tokens=8, temperature=0.8, seed=4))
    samples = [sample for output in outputs for sample in output.outputs]
    assert found["prompt_ids"] == [output.prompt_token_ids for output in outputs]
    assert found["completion_ids"] == [sample.token_ids for sample in samples]
    for ids, tokens, logprobs, sample in zip(
        found["completion_ids"], found["logprob_token_ids"], found["logprobs"], samples, strict=True
    ):
        own = [row[names.index(token)] for token, names, row in zip(ids, tokens, logprobs, strict=True)]
        assert float32(own) == sample.token_logprobs.tobytes()


def test_trl_generates_with_the_drawn_tokens_logprobs_alone(trl, served):
    ids = served.llm.tokenizer.encode("12+30=")
    found = trl.generate([ids], n=1, max_tokens=8, logprobs=0, generation_kwargs={"seed": 5})
    (output,) = served.llm.generate([ids], SamplingParams(max_tokens=8, seed=5))
    assert found["prompt_ids"] == [ids]
    assert float32([row[0] for row in found["logprobs"][0]]) == output.outputs[0].token_logprobs.tobytes()


def test_trl_chats(trl, served):
    found = trl.chat([MESSAGES] * 3, n=2, max_tokens=8, logprobs=0, generation_kwargs={"seed": 6})
    (output,) = served.llm.chat(MESSAGES, SamplingParams(n=2, max_tokens=8, seed=6))
    assert found["prompt_ids"] == [output.prompt_token_ids] * 3
    assert found["completion_ids"] == [sample.token_ids for sample in output.outputs] * 3


def test_trl_scores(trl, served):
    """Of a prompt the logprobs are the model's own; a completion at temperature 1 has the same."""
    (output,) = served.llm.generate(["12+30="], SamplingParams(max_tokens=8, seed=7))
    sample = output.outputs[0]
    found = trl.get_sequence_logprobs(
        [output.prompt_token_ids + sample.token_ids], [len(output.prompt_token_ids)], top_logprobs=5
    )
    (own,) = found["actual_logprobs"]
    assert float32([row[0] for row in own]) == sample.token_logprobs.tobytes()
    assert all(len(row) == 5 and math.isfinite(row[0]) for row in found["logprobs"][0])


def test_trl_asks_for_the_server_and_resets_its_cache(trl):
    assert trl.model == "calc" and trl.get_world_size() == 1
    assert trl.get_server_info()["model_config"]["logprobs_mode"] == "processed_logprobs"
    trl.reset_prefix_cache()
    with pytest.raises(Exception, match="NCCL"):
        trl._post(f"{trl.base_url}/init_weight_transfer_engine", json={"init_info": {"master_port": 1}})


# -- renderers --------------------------------------------------------------------------------------------------------


class OneTurn:
    """A renderer that the client is given the tokens of: what it sends and takes back is the client's own doing."""

    supports_tools = False

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer

    def get_stop_token_ids(self) -> list[int]:
        return [258]

    def parse_response(self, token_ids, **_):
        base = pytest.importorskip("renderers.base")
        return base.ParsedResponse(content=self._tokenizer.decode(token_ids))


def test_renderers_take_tokens_and_logprobs(served):
    client, openai = pytest.importorskip("renderers.client"), pytest.importorskip("openai")
    ids = served.llm.tokenizer.encode("12+30=")

    async def call():
        async with openai.AsyncOpenAI(base_url=f"{served.address}/v1", api_key=KEY) as connection:
            return await client.generate(
                client=connection,
                renderer=OneTurn(served.llm.tokenizer),
                messages=[],
                model="calc",
                prompt_ids=ids,
                sampling_params={"max_tokens": 8, "seed": 8, "temperature": 1.0},
                cache_salt="policy 0",
            )

    found = asyncio.run(call())
    (output,) = served.llm.generate([ids], SamplingParams(max_tokens=8, seed=8, stop_token_ids=[258]))
    (sample,) = output.outputs
    assert (found["prompt_ids"], found["completion_ids"]) == (ids, sample.token_ids)
    assert float32(found["completion_logprobs"]) == sample.token_logprobs.tobytes()
    assert found["finish_reason"] == sample.finish_reason
