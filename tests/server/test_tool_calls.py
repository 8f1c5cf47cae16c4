"""Tools and thoughts on the chat route, whole and streamed. A grammar forces what is drawn: `calc` knows no tools."""

import json

import pytest
from serving import KEY, running
from test_generation import events, ok

from jaxengine import LLM

pytest.importorskip("llguidance")
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "1+1="}]
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "stop"}},
]
CALLS = (
    'Well.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": true}}\n</tool_call>\n'
    '<tool_call>{"name": "stop"}</tool_call>'
)
BODY = dict(messages=MESSAGES, seed=3, max_tokens=300)


def forced(text: str) -> dict:
    return BODY | {"structured_outputs": {"choice": [text]}}


def message_of(choice: dict) -> tuple:
    message = choice["message"]
    calls = [
        (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message.get("tool_calls", [])
    ]
    return message["content"], message.get("reasoning_content"), calls, choice["finish_reason"]


def streamed(client, body) -> tuple:
    """The same from a stream's chunks."""
    choices = [choice for event in events(client, CHAT, body) for choice in event["choices"]]
    deltas = [choice["delta"] for choice in choices]
    content = "".join(delta.get("content") or "" for delta in deltas)
    thoughts = "".join(delta.get("reasoning_content", "") for delta in deltas)
    calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["index"] for call in calls] == list(range(len(calls))) and len({call["id"] for call in calls}) == len(
        calls
    )
    named = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
    (reason,) = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
    return content or None if calls else content, thoughts or None, named, reason


def answered(served, body) -> tuple:
    """Of the whole answer; the streamed one says the same."""
    (choice,) = ok(served.user.post(CHAT, json=body))["choices"]
    assert streamed(served.user, body) == message_of(choice)
    return message_of(choice)


def test_calls_are_told_from_text(served):
    expected = "Well.\n", None, [("add", {"a": 1, "b": True}), ("stop", {})], "tool_calls"
    assert answered(served, forced(CALLS) | {"tools": TOOLS}) == expected
    assert answered(served, forced(CALLS) | {"tools": TOOLS, "tool_choice": "none"}) == (CALLS, None, [], "stop")
    assert answered(served, forced(CALLS)) == (CALLS, None, [], "stop")
    assert answered(served, forced("No.") | {"tools": TOOLS}) == ("No.", None, [], "stop")


def test_a_call_that_is_required_is_made(served):
    body = BODY | {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "add"}}, "temperature": 1.0}
    for seed in range(5):
        content, _, ((name, arguments),), reason = answered(served, body | {"seed": seed})
        assert (content, name, reason) == (None, "add", "tool_calls") and set(arguments) == {"a", "b"}
    only = {"tool_choice": "required", "parallel_tool_calls": False}
    _, _, ((name, _),), _ = answered(served, body | only)
    assert name in ("add", "stop")


def test_llama_calls_are_objects(calc: LLM):
    with running(calc, api_key=KEY, tool_call_parser="llama3_json") as served:
        text = '{"name": "add", "parameters": {"a": 1, "b": true}}'
        assert answered(served, forced(text) | {"tools": TOOLS}) == (
            None,
            None,
            [("add", {"a": 1, "b": True})],
            "tool_calls",
        )
        body = BODY | {"tools": TOOLS[:1], "tool_choice": "required", "parallel_tool_calls": False}
        assert answered(served, body)[2][0][0] == "add"


def test_thoughts_are_told_from_text(calc: LLM):
    with running(calc, api_key=KEY, reasoning_parser="think") as served:
        text = "<think>\nIt is 2.\n</think>\n\nTwo. "
        assert answered(served, forced(text)) == ("Two. ", "It is 2.", [], "stop")
        thought = "<think>\nHm.\n</think>\n" + CALLS
        expected = "Well.\n", "Hm.", [("add", {"a": 1, "b": True}), ("stop", {})], "tool_calls"
        assert answered(served, forced(thought) | {"tools": TOOLS}) == expected


def test_what_follows_a_form_is_no_thought_though_the_prompt_has_begun_one(calc: LLM):
    """The form holds from the first token on, so that no </think> comes before it."""
    begun = {"chat_template": "{{ messages[0].content }}<think>\n"}
    with running(calc, api_key=KEY, reasoning_parser="think") as served:
        assert answered(served, forced("Two.") | begun) == ("Two.", None, [], "stop")
        asked = {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": 2}}}}
        assert answered(served, BODY | begun | asked) == ("2", None, [], "stop")
        content, thoughts, ((name, _),), _ = answered(
            served, BODY | begun | {"tools": TOOLS[:1], "tool_choice": "required", "parallel_tool_calls": False}
        )
        assert (content, thoughts, name) == (None, None, "add")  # its form has the </think>


def test_token_ids_and_logprobs_are_those_of_the_whole_text(served):
    body = forced(CALLS) | {"tools": TOOLS, "return_token_ids": True, "logprobs": True}
    (choice,) = ok(served.user.post(CHAT, json=body))["choices"]
    ids = served.llm.tokenizer.encode(CALLS, add_special_tokens=False)
    assert choice["token_ids"][: len(ids)] == ids and len(choice["logprobs"]["content"]) == len(choice["token_ids"])
