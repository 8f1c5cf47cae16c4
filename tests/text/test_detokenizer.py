"""Detokenizer: in any chunks, the joined deltas are the text decoded whole, cut where a naive search finds a stop."""

import itertools
from collections import Counter

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from jaxengine.sampling_params import SamplingParams
from jaxengine.text.detokenizer import Detokenizer, detokenizer_for
from jaxengine.text.pieces import byte_of_character
from jaxengine.text.tokenizer import Tokenizer

MERGES = [("a", "b"), ("ab", "c"), ("b", "c"), ("Ġ", "a"), ("ð", "Ł"), ("â", "Ĥ"), ("âĤ", "¬"), ("¬", "a"), ("c", "ð")]


def byte_level() -> tokenizers.Tokenizer:
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {left + right: len(vocab) + index for index, (left, right) in enumerate(MERGES)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return backend


BACKEND = byte_level()
TOKENIZER = Tokenizer(BACKEND)
END = TOKENIZER.encode("<|end|>", allow_special_tokens=True)


def ids_of(*tokens: str) -> list[int]:
    return [BACKEND.token_to_id(token) for token in tokens]


def bytes_of(text: str | bytes) -> list[int]:
    """One token for each byte."""
    table = {byte: BACKEND.token_to_id(character) for character, byte in byte_of_character().items()}
    return [table[byte] for byte in (text.encode() if isinstance(text, str) else text)]


def run(chunks, **options) -> tuple[Detokenizer, list[str], tuple[int, str] | None]:
    """Pushes chunk after chunk and takes every delta. The stop comes with the number of tokens since the beginning."""
    text, deltas, before = Detokenizer(TOKENIZER, **options), [], 0
    for chunk in chunks:
        found = text.push(chunk)
        deltas.append(text.take_delta())
        assert "".join(deltas) == text.text
        if found:
            return text, deltas, (before + found[0], found[1])
        before += len(chunk)
    text.finish()
    deltas.append(text.take_delta())
    return text, deltas, None


def complete(ids: list[int], skip: bool) -> str:
    """The decoded text without a last character whose bytes are not all there: some byte after it would change it."""
    text = BACKEND.decode(ids, skip_special_tokens=skip)
    grows = [
        BACKEND.decode([*ids, *bytes_of(bytes([byte]))], skip_special_tokens=skip) for byte in (0x80, 0x90, 0xA0, 0xBF)
    ]
    return text[:-1] if any(len(longer) == len(text) for longer in grows) else text


def reference(ids, *, stop, include_stop_str_in_output, skip_special_tokens, min_tokens):
    """(text, (number of tokens, stop string) or None), decoding everything again for every token."""
    done = 0
    for count in range(1, len(ids) + 1):
        text = complete(ids[:count], skip_special_tokens)
        ends = [
            (end, -len(string), string)
            for string in stop
            for end in range(done + 1, len(text) + 1)
            if text[:end].endswith(string)
        ]
        if ends and count > min_tokens:
            end, minus_length, string = min(ends)
            return text[: end if include_stop_str_in_output else end + minus_length], (count, string)
        done = len(text)
    return BACKEND.decode(ids, skip_special_tokens=skip_special_tokens), None


PIECES = st.sampled_from(["a", "b", "c", "ab", "abc", " a", "€", "😀", "é", "<|end|>"]).map(
    lambda text: TOKENIZER.encode(text, allow_special_tokens=True)
)
BYTES = st.sampled_from([b"\xf0", b"\x9f", b"\x98", b"\x80", b"\xe2\x82", b"\xff", b"a", "\ufffd".encode()]).map(
    bytes_of
)
ANY = st.integers(0, TOKENIZER.vocab_size + 1).map(lambda token: [token])
TOKENS = st.lists(st.one_of(PIECES, BYTES, ANY), max_size=12).map(lambda parts: list(itertools.chain(*parts)))
STOPS = st.lists(st.text("abc €😀\ufffd", min_size=1, max_size=4), max_size=4)


@settings(max_examples=600, deadline=None)
@given(TOKENS, STOPS, st.lists(st.integers(0, 5), max_size=40), st.booleans(), st.booleans(), st.integers(0, 6))
def test_any_chunks_give_the_whole_text_cut_at_the_stop(ids, stop, sizes, include, skip, min_tokens):
    cuts = [0, *itertools.takewhile(lambda cut: cut < len(ids), itertools.accumulate(sizes)), len(ids)]
    options = dict(stop=stop, include_stop_str_in_output=include, skip_special_tokens=skip, min_tokens=min_tokens)
    text, deltas, found = run([ids[start:end] for start, end in itertools.pairwise(cuts)], **options)
    assert ("".join(deltas), found) == reference(ids, **options)
    assert text.text == "".join(deltas)


@settings(max_examples=200, deadline=None)
@given(TOKENS, STOPS)
def test_what_was_shown_is_never_taken_back(ids, stop):
    text, deltas, _ = run([[token] for token in ids], stop=stop)
    for shown in itertools.accumulate(deltas):
        assert text.text.startswith(shown)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 13), max_size=20), st.booleans())
def test_tokens_that_mean_another_thing_at_the_beginning_of_a_text(ids, skip):
    """▁ is a space but before the first word; 😀 comes as bytes; skipped and unknown ids (13) are no first word."""
    words = ["<s>", "▁", "a", "▁a", "▁▁b", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<0x20>", "<0x0A>", "é", "</s>"]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[], byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = Tokenizer(backend)
    text = Detokenizer(tokenizer, skip_special_tokens=skip)
    deltas = []
    for token in ids:
        text.push([token])
        deltas.append(text.take_delta())
    text.finish()
    whole = "".join(deltas) + text.take_delta()
    assert whole == text.text == tokenizer.decode(ids, skip)
    library = backend.decode(ids, skip_special_tokens=skip)
    assert whole == library or "\ufffd" in library  # which replaces whole runs of bytes around a bad one


def test_half_a_character_is_held_back():
    _, deltas, _ = run([[token] for token in bytes_of("a😀b")])
    assert deltas == ["a", "", "", "", "😀", "b", ""]


def test_finish_shows_an_incomplete_character_as_decode_does():
    ids = bytes_of("a😀")[:-1]
    text, deltas, _ = run([ids])
    assert deltas == ["a", "\ufffd"]
    assert text.text == TOKENIZER.decode(ids) == BACKEND.decode(ids)


def test_finish_twice_changes_nothing_and_nothing_may_follow():
    text = Detokenizer(TOKENIZER)
    text.push(bytes_of("😀")[:2])
    text.finish()
    text.finish()
    assert text.text == "\ufffd"
    with pytest.raises(AssertionError, match="ended"):
        text.push(ids_of("a"))


@pytest.mark.parametrize(
    "stop, expected, consumed, found",
    [
        (["bc"], "a", 1, "bc"),  # inside a token
        (["ca"], "ab", 2, "ca"),  # across tokens
        (["cabc"], "ab", 2, "cabc"),
        (["abcab", "bc"], "a", 1, "bc"),  # the one that ends first, though it begins later
        (["c", "bc", "abc"], "", 1, "abc"),  # all end together: the longest
        (["cab", "abca"], "", 2, "abca"),  # overlapping: abca ends first
        (["abcabcx", "bcab"], "a", 2, "bcab"),  # the longer one that was held for can no longer come
        (["abcabcabcabcx"], "abcabcabc", None, None),
    ],
)
def test_stop_strings(stop, expected, consumed, found):
    text, _, stopped = run([ids_of("abc"), ids_of("abc"), ids_of("abc")], stop=stop)
    assert text.text == expected
    assert stopped == (found and (consumed, found))


def test_a_possible_stop_string_is_held_back_until_it_is_none():
    text = Detokenizer(TOKENIZER, stop=["abcd"])
    shown = []
    for token in ids_of("c", "ab", "c", "b"):
        assert text.push([token]) is None
        shown.append(text.take_delta())
    assert shown == ["c", "", "", "abcb"]


def test_an_included_stop_string_is_not_held_back_and_ends_the_text():
    text = Detokenizer(TOKENIZER, stop=["ca"], include_stop_str_in_output=True)
    assert text.push(ids_of("abc")) is None
    assert text.take_delta() == "abc"
    assert text.push(ids_of("abc", "abc")) == (1, "ca")
    assert (text.take_delta(), text.text) == ("a", "abca")


def test_push_counts_tokens_of_its_own_call():
    text = Detokenizer(TOKENIZER, stop=["c"])
    assert text.push(ids_of("a", "a", "a")) is None
    assert text.push(ids_of("a", "abc", "a")) == (2, "c")
    assert text.text == "aaaaab"


def test_a_stop_string_within_min_tokens_is_text():
    ids = [ids_of("a"), ids_of("b"), ids_of("a"), ids_of("b")]
    assert run(ids, stop=["ab"], min_tokens=1)[2] == (2, "ab")
    text, _, stopped = run(ids, stop=["ab"], min_tokens=2)
    assert (text.text, stopped) == ("ab", (4, "ab"))


def test_the_detokenizer_of_a_sample_follows_its_sampling_parameters():
    sampling = SamplingParams(stop="ab", include_stop_str_in_output=True, skip_special_tokens=False, min_tokens=3)
    text = detokenizer_for(TOKENIZER, sampling)
    assert text.push([*END, *ids_of("a", "b"), *END, *ids_of("ab", "c")]) == (5, "ab")
    assert text.text == "<|end|>ab<|end|>ab"


def test_half_a_character_after_a_stop_string_is_cut_too():
    text = Detokenizer(TOKENIZER, stop=["c"])
    assert text.push(ids_of("a", "cð")) == (2, "c")
    text.finish()
    assert text.text == "a"


def test_special_tokens_are_no_text_and_match_no_stop_string():
    ids = [[*END, *ids_of("a")]]
    assert run(ids, stop=["<|end|>"])[0].text == "a"
    text, _, stopped = run(ids, stop=["end"], skip_special_tokens=False)
    assert (text.text, stopped) == ("<|", (1, "end"))


def test_each_token_is_looked_up_once_and_each_distinct_one_decoded_once(monkeypatch):
    tokenizer, counts = Tokenizer(byte_level()), Counter()
    ids = (bytes_of("\ufffd") + bytes_of(b"\xff") + ids_of("abc")) * 1_000

    def counted(name, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(tokenizer.pieces, "piece", counted("piece", tokenizer.pieces.piece))
    monkeypatch.setattr(tokenizer.pieces, "_decoded", counted("decode", tokenizer.pieces._decoded))
    text = Detokenizer(tokenizer, stop=["aX", "ab" * 500, "\ufffd" * 400])
    for token in ids:
        text.push([token])
    text.finish()
    assert text.text == "\ufffd\ufffdabc" * 1_000
    assert counts["piece"] == len(ids)
    assert counts["decode"] <= len(set(ids)) + 1  # the first token of a text is looked up on its own
