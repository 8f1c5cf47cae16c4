"""Messages as OpenAI's interface has them, in the form that templates expect; and a last message that goes on."""

import copy

import pytest
from test_chat_template import CHAT, CHATML, NAMED, backend, chat_ids, text_of

from jaxengine.text.chat_messages import messages_of
from jaxengine.text.tokenizer import Tokenizer

EACH = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.id }}{{ c.function.name }}("
    "{% for name, value in c.function.arguments.items() %}{{ name }}={{ value }}{% endfor %})"
    "{% endfor %};{% endfor %}"
)
WHOLE = "{% for m in messages if m.tool_calls %}{{ m.tool_calls[0].function.arguments | tojson }}{% endfor %}"


def calling(*arguments, **more) -> list[dict]:
    calls = [
        {"id": f"c{index}", "type": "function", "function": {"name": "f", "arguments": each}}
        for index, each in enumerate(arguments)
    ]
    return [{"role": "user", "content": "go"}, {"role": "assistant", "content": None, "tool_calls": calls} | more]


def text(messages, template=EACH) -> str:
    return text_of(chat_ids(messages, template))


@pytest.mark.parametrize("template", [EACH, WHOLE])
@pytest.mark.parametrize("arguments", ['{"a": 1, "b": "é<|im_end|>"}', '\n {"a":1,"b":"\\u00e9<|im_end|>"}'])
def test_arguments_as_json_are_the_object(template, arguments):
    ids = chat_ids(calling(arguments), template)
    assert ids == chat_ids(calling({"a": 1, "b": "é<|im_end|>"}), template)


JOINED = "{% for c in messages[1].tool_calls %}{{ '<|im_start|>' + c.function.arguments }}{% endfor %}"


@pytest.mark.parametrize("arguments, joined", [('{"a":  1}', '{"a":  1}'), ({"a": "é"}, '{"a": "é"}')])
def test_a_template_that_joins_arguments_to_its_text_gets_their_json_as_it_was(arguments, joined):
    assert text(calling(arguments, '{"b": "<|im_end|>"}'), JOINED) == (
        f'<|im_start|>{joined}<|im_start|>{{"b": "<|im_end|>"}}'
    )
    with pytest.raises(ValueError, match="TypeError.*dict"):  # what it says of objects, where neither form will do
        chat_ids(calling(arguments), "{{ 'a' + messages[1].tool_calls[0].function.arguments }}{{ 'a' + 1 }}")


@pytest.mark.parametrize("arguments", ["", " ", "null", "{}", None, {}])
def test_no_arguments_are_an_empty_object(arguments):
    assert text(calling(arguments)) == "user:go;assistant:c0f();"


@pytest.mark.parametrize("arguments", ["{", "[1]", '"x"', "1", '{"a": 1} {}', "[" * 100_000])
def test_what_is_no_object_is_refused_with_its_place(arguments):
    with pytest.raises(ValueError, match=r"messages\[1\]\.tool_calls\[1\]\.function\.arguments .*got '"):
        messages_of(calling("{}", arguments))


@pytest.mark.parametrize("arguments", ['{"a": "\\ud800"}', '{"\\ud800": 1}'])
def test_half_a_character_in_json_is_refused(arguments):
    with pytest.raises(ValueError, match=r"messages\[1\]\.tool_calls\[0\]\.function\.arguments.*U\+D800"):
        messages_of(calling(arguments))


def test_several_calls_and_their_answers():
    answers = [
        {"role": "tool", "tool_call_id": "c0", "name": "f", "content": [{"type": "text", "text": "3"}]},
        {"role": "developer", "content": "brief", "name": "boss"},
    ]
    assert text(calling('{"x": 1}', '{"y": 2}') + answers) == (
        "user:go;assistant:c0f(x=1)c1f(y=2);tool:3;developer:brief;"
    )
    copies = messages_of(calling("{}") + answers)
    assert copies[2]["tool_call_id"] == "c0" and copies[2]["name"] == "f" and copies[3]["name"] == "boss"
    assert copies[1]["tool_calls"][0]["id"] == "c0"


@pytest.mark.parametrize("calls", [[], None])
def test_no_calls_are_left_out(calls):
    (message,) = messages_of([{"role": "assistant", "content": "a", "tool_calls": calls, "refusal": None}])
    assert message == {"role": "assistant", "content": "a"}


@pytest.mark.parametrize("content", [None, "", []])
def test_no_content_is_empty_text_which_templates_can_join(content):
    template = "{% if messages[1]['content'] is not none %}{{ messages[1]['content'] + '|' }}{% endif %}"
    assert text(calling("{}", content=content), template) == "|"


def test_calls_in_the_flat_form_and_calls_that_are_none():
    (message,) = messages_of([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]}])
    assert message["tool_calls"] == [{"name": "f", "arguments": {"a": 1}}]
    with pytest.raises(ValueError, match=r"messages\[0\]\.tool_calls\[0\] .*'f'"):
        messages_of([{"role": "assistant", "tool_calls": ["f"]}])


def test_what_is_given_stays_as_it_was():
    messages = calling('{"a": 1}', "") + [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    before = copy.deepcopy(messages)
    text(messages)
    chat_ids(messages, continue_final_message=True)
    assert messages == before


# -- a last message that goes on --

TRIM = CHATML.replace("'\\n' + content }}", "'\\n' + content | trim }}")


@pytest.mark.parametrize("template", [CHATML, TRIM], ids=["as it is", "trimmed"])
@pytest.mark.parametrize("last", ["yes", " yes \n", "a<|im_end|>b", "yes yes", ""])
def test_the_text_ends_where_transformers_ends_it(template, last):
    from transformers import PreTrainedTokenizerFast

    peer = PreTrainedTokenizerFast(tokenizer_object=backend(), **NAMED)
    messages = [*CHAT, {"role": "assistant", "content": last}]
    expected = peer.apply_chat_template(
        messages, chat_template=template, tokenize=False, continue_final_message=True, add_generation_prompt=False
    )
    chat = Tokenizer(backend(), named_tokens=NAMED, chat_template=template).render_chat(
        messages, continue_final_message=True
    )
    assert chat.text == expected
    assert text_of(chat.token_ids).rstrip().endswith(last.strip())
    if "<|" not in last:
        assert chat.token_ids == backend().encode(expected, add_special_tokens=False).ids


def test_text_that_a_template_leaves_out_cannot_go_on():
    for template in ("{{ messages[0].content }}", "{% for m in messages %}{{ m.content | reverse }}{% endfor %}"):
        with pytest.raises(ValueError, match="continue_final_message: .*'yes'"):
            chat_ids([CHAT[0], {"role": "assistant", "content": "yes"}], template, continue_final_message=True)
