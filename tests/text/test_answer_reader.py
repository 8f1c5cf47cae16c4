"""An answer's parts: thoughts, text and calls, however the text is cut into pieces."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxengine.text.answer_parts import Said, Thought, ToolCall
from jaxengine.text.answer_reader import AnswerReader
from jaxengine.text.tool_calls import TOOL_FORMS, tools_of

HERMES, LLAMA = TOOL_FORMS["hermes"], TOOL_FORMS["llama3_json"]
ONE = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
CALL = ToolCall("add", '{"a": 1}')
# what is read, and its parts
WITH_HERMES = {
    "no call": ("7 + 8 = 15", [Said("7 + 8 = 15")]),
    "nothing": ("", []),
    "a call": (ONE, [CALL]),
    "text before": (f"Wait.\n{ONE}", [Said("Wait.\n"), CALL]),
    "several": (f"{ONE}\n{ONE}{ONE}\n", [CALL, CALL, CALL]),
    "text after": (f"{ONE}\nDone.", [CALL, Said("Done.")]),
    "half a tag": ("a <tool_ca", [Said("a <tool_ca")]),
    "a tag that is another": ("a <tool_cart>{}", [Said("a <tool_cart>{}")]),
    "a tag and no object": ("<tool_call>no</tool_call>", [Said("<tool_call>no</tool_call>")]),
    "an object that is no call": ('<tool_call>{"a": 1}</tool_call>', [Said('<tool_call>{"a": 1}</tool_call>')]),
    "no JSON": ("<tool_call>{name: add}</tool_call>", [Said("<tool_call>{name: add}</tool_call>")]),
    "a call that is cut": (ONE[:40], [Said(ONE[:40])]),
    "without its closing tag": (ONE.removesuffix("</tool_call>"), [CALL]),
    "half its closing tag": (ONE[:-3], [CALL, Said("\n</tool_ca")]),
    "braces in strings": (
        '<tool_call>{"name": "f", "arguments": {"x": "}</tool_call>{\\"", "y": [{"z": {}}]}}</tool_call>!',
        [ToolCall("f", json.dumps({"x": '}</tool_call>{"', "y": [{"z": {}}]})), Said("!")],
    ),
    "letters of all kinds": (
        '<tool_call>{"name": "f", "arguments": {"x": "é\\ud83d\\ude00你"}}</tool_call>',
        [ToolCall("f", '{"x": "é😀你"}')],
    ),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', [ToolCall("f", "{}")]),
    "arguments that are a list": (
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        [Said('<tool_call>{"name": "f", "arguments": [1]}</tool_call>')],
    ),
    "a tag in a tag": (f"<tool_call><tool_call>{ONE}", [Said("<tool_call><tool_call>"), CALL]),
    "deep": ("<tool_call>" + '{"a":' * 3000, [Said("<tool_call>" + '{"a":' * 3000)]),
}  # fmt: skip
WITH_LLAMA = {
    "a call": ('{"name": "add", "parameters": {"a": 1}}', [CALL]),
    "after a python tag": ('<|python_tag|>{"name": "add", "parameters": {"a": 1}}', [CALL]),
    "several": ('{"name": "add", "parameters": {"a": 1}}; {"name": "add", "arguments": {"a": 1}}', [CALL, CALL]),
    "no call": ('The object {"name": "add", "parameters": {}}', [Said('The object {"name": "add", "parameters": {}}')]),
    "an object that is no call": ('{"sum": 3} and more', [Said('{"sum": 3} and more')]),
    "text after": ('{"name": "add", "parameters": {"a": 1}} is it', [CALL, Said(" is it")]),
    "half a python tag": ("<|pyth", [Said("<|pyth")]),
}
WITH_THOUGHTS = {
    "a thought": ("<think>\nIt is 7.\n</think>\n\n7", [Thought("It is 7."), Said("7")]),
    "an empty one": ("<think>\n\n</think>\n\n7", [Said("7")]),
    "none": ("7 <think>8</think>", [Said("7 <think>8</think>")]),
    "one that is cut": ("<think>It\n\nis </thi", [Thought("It\n\nis </thi")]),
    "half a tag": ("<thin", [Said("<thin")]),
    "white space": ("\n ", [Said("\n ")]),
    "a call in a thought": (f"<think>{ONE}</think>{ONE}", [Thought(ONE), CALL]),
    "two ends": ("<think>a</think>b</think>", [Thought("a"), Said("b</think>")]),
}


def joined(parts) -> list:
    """The parts, with what is said or thought in one piece as one."""
    found: list = []
    for part in parts:
        if found and type(found[-1]) is type(part) and not isinstance(part, ToolCall):
            part = type(part)(found.pop().text + part.text)
        found.append(part)
    return found


def read(pieces, form, thinks) -> list:
    reader = AnswerReader(form, thinks)
    parts = [part for piece in pieces for part in reader.push(piece)]
    assert all(isinstance(part, ToolCall) or part.text for part in parts)
    return joined(parts + reader.finish())


CASES = {f"hermes: {name}": (*case, HERMES, None) for name, case in WITH_HERMES.items()}
CASES |= {f"llama: {name}": (*case, LLAMA, None) for name, case in WITH_LLAMA.items()}
CASES |= {f"thoughts: {name}": (*case, HERMES, False) for name, case in WITH_THOUGHTS.items()}
CASES["thoughts: begun by the prompt"] = ("It is.\n</think>\n7", [Thought("It is."), Said("7")], HERMES, True)
CASES["neither"] = (f"<think>{ONE}", [Said(f"<think>{ONE}")], None, None)


@pytest.mark.parametrize("name", CASES)
def test_parts_of_an_answer(name):
    text, expected, form, thinks = CASES[name]
    assert read([text], form, thinks) == expected
    assert read(text, form, thinks) == expected  # a character at a time


TAGS = ["<tool_call>", "</tool_call>", "<think>", "</think>", ONE, '{"name": "f", "parameters": {}}', "{", "}", '"']
TEXTS = st.lists(st.sampled_from([*TAGS, "<", "\n", " ", ";", "\\", "a", "😀", "<tool_", "</th"]), max_size=12).map(
    "".join
)


@settings(max_examples=300, deadline=None)
@given(
    TEXTS,
    st.lists(st.integers(0, 200), max_size=6),
    st.sampled_from([HERMES, LLAMA, None]),
    st.sampled_from([None, False, True]),
)
def test_pieces_do_not_matter_and_nothing_is_lost(text, cuts, form, thinks):
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
    whole = read([text], form, thinks)
    assert read(pieces, form, thinks) == whole
    if form is None and thinks is None:
        assert whole == joined([Said(text)] if text else [])
    if not any(isinstance(part, ToolCall) for part in whole) and thinks is None:
        assert "".join(part.text for part in whole) == text


def test_a_long_call_is_read_once():
    """Each character of an object is looked at once, however many pieces it comes in."""
    text = '<tool_call>{"name": "f", "arguments": {"x": "' + "a" * 100_000 + '"}}</tool_call>'
    assert read([text[i : i + 100] for i in range(0, len(text), 100)], HERMES, None)[0].name == "f"


@pytest.mark.parametrize(
    "wrong", [[{}], [{"type": "function"}], [{"type": "function", "function": {"name": "a b"}}], [3], [{"type": "x"}]]
)
def test_wrong_tools_are_named(wrong):
    with pytest.raises(ValueError, match=r"tools\[0\]"):
        tools_of(wrong)
    with pytest.raises(ValueError, match="at most"):
        tools_of([{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)])
