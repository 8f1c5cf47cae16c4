"""Hostile chat templates, folders without text, strange text, stop strings."""

import itertools
import json
import tracemalloc
from pathlib import Path

import neighbours
import pytest
import tokenizers
from conftest import make_llm
from tokenizers import decoders, models, pre_tokenizers

from jaxengine import SamplingParams
from jaxengine.text import chat_template
from jaxengine.text.detokenizer import Detokenizer
from jaxengine.text.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": "hi"}]
PLAIN = "{% for message in messages %}<|user|>{{ message.content }}<|end|>{% endfor %}"


def byte_level() -> tokenizers.Tokenizer:
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|user|>", "<|end|>"])
    return backend


def folder(path: Path, config: dict[str, object] | None = None, template: str | None = None) -> Path:
    byte_level().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", **(config or {})}))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


TOKENIZER = Tokenizer(byte_level(), named_tokens={"eos_token": "<|end|>"}, chat_template=PLAIN)


# -- a chat template that escapes, loops or explodes --

ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by filter": "{{ (''|attr('__class__')).__mro__ }}",
    "class by item": "{{ ''['__class__']['__mro__'] }}",
    "globals of a helper": "{{ raise_exception.__globals__['json'] }}",
    "environment": "{{ self._TemplateReference__context.environment }}",
    "builtins": "{{ range.__self__.open('x') }}",
    "class by format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "class by format_map": "{{ '{x.__class__.__mro__}'.format_map({'x': 1}) }}",
    "mutation": "{{ messages.append(1) }}",
    "dunder of a namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__.__mro__ }}",
    "file": "{% include 'tokenizer_config.json' %}",
    "import": "{% import 'os' as os %}",
}
TOO_MUCH = {
    "range": ("{% for i in range(10 ** 12) %}x{% endfor %}", "OverflowError"),
    "macro": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "block": ("{% block a %}{{ self.a() }}{% endblock %}", "RecursionError"),
    "depth": ("{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}", "cannot be compiled, RecursionError"),
    "length": ("x" * 65_537, "65536 .* 65537"),
    "digits": ("{{ " + "9" * 60_000 + " }}", "cannot be compiled, ValueError"),
    "memory": ("{% set s = 'a' * 10 ** 9 %}", "512 MiB"),
    "output": ("{% for i in range(9999) %}{{ 'y' * 1000 }}{% endfor %}", "more than 1000120 characters"),
}


def doubled(first: str, again: str) -> str:
    """Made twice as large 64 times, and shown."""
    loop = f"{{% for i in range(64) %}}{{% set ns.x = {again} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(x={first}) %}}{loop}{{{{ ns.x }}}}"


EXPLOSIONS = {
    "nested loops": "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
    "lazy filters": "{% for i in range(99) %}{% if range(90000)"
    + " | select" * 40
    + " | list %}{% endif %}{% endfor %}",
    "slow searches": "{% for i in range(90000) %}{% if 'ba' * 90000 in 'a' * 900000 %}{% endif %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 8) }}",
    "squares": doubled("3", "ns.x * ns.x"),
    "text": "{{ 'a' * 10 ** 8 }}",
    "list": "{{ [0] * 10 ** 8 }}",
    "lorem ipsum": "{{ lipsum(n=10 ** 9) }}",
    "doubled by +": doubled("'a'", "ns.x + ns.x"),
    "doubled by ~": doubled("'a'", "ns.x ~ ns.x"),
    "doubled by a list": doubled("['ab', 1]", "[ns.x, ns.x]"),
    "doubled by dict()": doubled("['ab', 1]", "dict(a=ns.x, b=ns.x)"),
    "doubled by macros": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}" + doubled("'a'", "m(ns.x)"),
    "% width": "{{ '%100000000d' % 1 }}",
    "format width as argument": "{{ '{:>{}}'.format(1, 10 ** 8) }}",
    "replace filter": "{% set s = 'a' * 9000 %}{{ s | replace('a', s) }}",
    "join": "{% set s = 'a' * 9000 %}{{ s.join(s) }}",
    "indent": "{{ ('a\n' * 9000) | indent(10000) }}",
    "json indent": "{{ [1] | tojson(indent=10 ** 8) }}",
    "set block": "{% set s %}{% for i in range(90000) %}{{ 'z' * 10000 }}{% endfor %}{% endset %}",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_template_cannot_escape(name):
    with pytest.raises(ValueError, match="the chat template (was stopped|failed)"):
        TOKENIZER.encode_chat(CHAT, chat_template=ESCAPES[name])


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_template_that_asks_for_too_much_is_told_what(name):
    template, reason = TOO_MUCH[name]
    with pytest.raises(ValueError, match=reason):
        TOKENIZER.encode_chat(CHAT, chat_template=template)


@pytest.mark.parametrize("name", EXPLOSIONS)
def test_a_template_cannot_run_for_ever_or_explode(name, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 1.0)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="was stopped: it (ran .* 1.0 sec|takes .* MiB|makes .* char)"):
            TOKENIZER.encode_chat(CHAT, chat_template=EXPLOSIONS[name])
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.timeout(60)
def test_white_space_before_no_token_takes_linear_time():
    """Tokens may swallow the white space before them, so each run of it is a candidate; it is looked through once."""
    backend = byte_level()
    backend.add_special_tokens([tokenizers.AddedToken("<|left|>", lstrip=True)])
    tokenizer = Tokenizer(backend, chat_template="{{ messages[0].content }}  <|left|>{{ ' ' * 300000 }}x \t<|left|>")
    ids = tokenizer.encode_chat([{"role": "user", "content": "y" + " " * 300_000 + "z"}])
    space, left = backend.token_to_id("Ġ"), backend.token_to_id("<|left|>")
    assert ids == [
        *backend.encode("y").ids,
        *[space] * 300_000,
        *backend.encode("z").ids,
        left,
        *[space] * 300_000,
        *backend.encode("x").ids,
        left,
    ]


@pytest.mark.parametrize(
    "template, error",
    [
        (ESCAPES["class"], "was stopped"),
        TOO_MUCH["macro"],
        TOO_MUCH["memory"],
        ("{{ raise_exception('no') }}", "refused"),
        ("{% if %}", "is not valid"),
    ],
)
def test_a_hostile_template_moves_no_bit_of_requests_that_run(template, error, tiny):
    right = neighbours.run(tiny, neighbours.start(tiny))
    llm = make_llm(tiny.config, tiny.params)
    requests = neighbours.start(llm)
    neighbours.step(llm)
    llm.tokenizer = TOKENIZER
    with pytest.raises(ValueError, match=error):
        llm.chat([CHAT, CHAT], SamplingParams(max_tokens=1), chat_template=template)
    llm.tokenizer = None  # the others are token ids of a larger vocabulary
    assert neighbours.run(llm, requests) == right
    neighbours.assert_idle(llm)


def test_a_template_that_was_stopped_leaves_the_next_chat_alone():
    before = TOKENIZER.encode_chat(CHAT)
    with pytest.raises(ValueError, match="was stopped"):
        TOKENIZER.encode_chat(CHAT, chat_template=TOO_MUCH["memory"][0])
    assert TOKENIZER.encode_chat(CHAT) == before


def test_a_template_says_what_it_refuses_and_where_it_is_wrong():
    with pytest.raises(ValueError, match="the chat template refused the messages: roles must alternate"):
        TOKENIZER.encode_chat(CHAT, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="the chat template is not valid, line 2: "):
        TOKENIZER.encode_chat(CHAT, chat_template="a\n{% if %}")


# -- a folder with auto_map, without tokenizer, without chat template --


def test_a_folder_without_tokenizer_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json.*token ids"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "Unheard"}}', '{"version": "1.0"}'])
def test_a_broken_tokenizer_is_named(tmp_path, content):
    folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_no_code_of_a_folder_runs(tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    assert Tokenizer.load(folder(tmp_path, config)).encode("a") == TOKENIZER.encode("a")
    assert not (tmp_path / "ran").exists()


def test_no_chat_template_says_how_to_pass_one(tmp_path):
    tokenizer = Tokenizer.load(folder(tmp_path))
    with pytest.raises(ValueError, match="chat_template="):
        tokenizer.encode_chat(CHAT)
    assert tokenizer.encode_chat(CHAT, chat_template=PLAIN) == TOKENIZER.encode_chat(CHAT)


@pytest.mark.parametrize(
    "config, template", [({"chat_template": PLAIN}, None), ({}, PLAIN), ({"chat_template": "other"}, PLAIN)]
)
def test_the_chat_template_is_found_in_either_file(tmp_path, config, template):
    assert Tokenizer.load(folder(tmp_path, config, template)).encode_chat(CHAT) == TOKENIZER.encode_chat(CHAT)


# -- lone surrogates, NUL, emoji across tokens, text that spells a special token --


def test_lone_surrogates_are_refused_everywhere():
    with pytest.raises(ValueError, match=r"U\+D800.* 1"):
        TOKENIZER.encode("a\ud800")
    with pytest.raises(ValueError, match=r"messages\[0\]\.content .*U\+DFFF"):
        TOKENIZER.encode_chat([{"role": "user", "content": "\udfff"}])


@pytest.mark.parametrize(
    "text", ["\0", "a\0b", "", "😀👩‍👩‍👧", "\ufffd", "\ufdd0\uffff", "e\u0301", "<|end|>", "<|us<|user|>er|>"]
)
def test_any_text_comes_back_and_makes_no_control_token(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.special_ids.isdisjoint(ids)
    assert TOKENIZER.decode(ids) == text
    chat = TOKENIZER.encode_chat([{"role": "user", "content": text}])
    assert [token for token in chat if token in TOKENIZER.special_ids] == [chat[0], chat[-1]]
    assert TOKENIZER.decode(chat[1:-1], skip_special_tokens=False) == text


def test_streaming_shows_no_half_character_and_joins_to_the_text():
    ids = TOKENIZER.encode("é😀€x👩‍👧")[:-1]
    stream, deltas = Detokenizer(TOKENIZER), []
    for token in ids:
        stream.push([token])
        deltas.append(stream.take_delta())
    assert "".join(deltas) == "é😀€x👩‍"
    stream.finish()
    assert stream.take_delta() == "\ufffd"
    assert stream.text == TOKENIZER.decode(ids)


# -- stop strings --


def stopped(text: str, *stop: str) -> tuple[str, int | None]:
    """(final text, number of tokens used) of a completion whose tokens are bytes, pushed one by one."""
    stream = Detokenizer(TOKENIZER, stop=stop)
    for count, token in enumerate(TOKENIZER.encode(text), 1):
        if stream.push([token]):
            return stream.text, count
    stream.finish()
    return stream.text, None


def test_a_stop_string_across_tokens_is_cut_and_its_tokens_counted():
    assert stopped("ab€END more", "€END") == ("ab", 8)
    assert stopped("ab€EN", "€END") == ("ab€EN", None)


def test_a_stop_string_inside_another():
    assert stopped("xEND", "END", "N") == ("xE", 3)
    assert stopped("xEND", "ENDS", "ND") == ("xE", 4)
    assert stopped("aabaac", "aac") == ("aab", 6)


def test_the_end_of_the_prompt_is_no_part_of_a_stop_string():
    prompt, completion = TOKENIZER.encode("EN"), "D and so on"
    assert TOKENIZER.decode([*prompt, *TOKENIZER.encode(completion)]).startswith("END")
    assert stopped(completion, "END") == (completion, None)


def test_deltas_never_show_what_a_stop_string_cuts():
    text = "aaEaENaENDa"
    for size in range(1, 5):
        stream, shown, ids = Detokenizer(TOKENIZER, stop=["END"]), "", TOKENIZER.encode(text)
        for start in itertools.count(0, size):
            found = stream.push(ids[start : start + size])
            shown += stream.take_delta()
            assert "aaEaENa".startswith(shown)
            if found:
                break
        assert (shown, start + found[0]) == ("aaEaENa", 10)
