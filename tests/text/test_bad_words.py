"""Bad words as token ids: both spellings of a word, and what is refused."""

import re

import pytest
from test_tokenizer import byte_level

from jaxengine.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, SamplingParams
from jaxengine.text.bad_words import each_with_token_ids, with_token_ids
from jaxengine.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level())  # "hello", "Ġhello" and parts of it are tokens


def ids(tokenizer: Tokenizer, *texts: str) -> set[tuple[int, ...]]:
    return {tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts}


@pytest.mark.parametrize(
    "word, spellings",
    [
        ("hello", ["hello", " hello"]),  # one token each, as vLLM has them
        (" hello", ["hello", " hello"]),
        ("hell", ["hell"]),  # after a space it is a space and the same tokens, which are ruled out already
        ("oh hello", ["oh hello"]),
        ("<|begin|>", ["<|begin|>"]),  # text, not the control token
    ],
)
def test_a_word_is_ruled_out_with_and_without_a_space(word, spellings, tokenizer):
    resolved = with_token_ids(SamplingParams(bad_words=[word]), tokenizer, "it")
    assert set(resolved.bad_words_token_ids) == ids(tokenizer, *spellings) and resolved.bad_words == ()
    control = tokenizer.encode("<|begin|>", allow_special_tokens=True)
    assert tuple(control) not in resolved.bad_words_token_ids


def test_words_and_token_ids_go_together_once(tokenizer):
    (hello,) = ids(tokenizer, "hello")
    resolved = with_token_ids(
        SamplingParams(bad_words=["hello", "hello "], bad_words_token_ids=[hello, [1]]), tokenizer, "it"
    )
    assert len(resolved.bad_words_token_ids) == len(set(resolved.bad_words_token_ids)) == 5
    assert with_token_ids(resolved, None, "it") is resolved, "no tokenizer is needed any more"


def test_what_stands_twice_in_a_list_is_tokenized_once(tokenizer):
    one, plain = SamplingParams(bad_words=["hello"]), SamplingParams()
    first, second, third = each_with_token_ids([one, plain, one], tokenizer)
    assert first is third and second is plain


@pytest.mark.parametrize(
    "words, message",
    [
        (["hello", "  "], r"bad_words\[1\]='  ' of it has no tokens"),
        (["x" * (MAX_BAD_WORD_TOKENS + 1)], rf"bad_words\[0\]='x+' of it has 9 tokens: at most {MAX_BAD_WORD_TOKENS}"),
    ],
)
def test_words_that_cannot_be_ruled_out_are_named(words, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        with_token_ids(SamplingParams(bad_words=words), tokenizer, "it")


def test_spellings_and_token_ids_count_together(tokenizer):
    words = [f"hello{i}" for i in range(100)]  # after a space they begin with another token
    resolved = with_token_ids(SamplingParams(bad_words=words), tokenizer, "it")
    assert len(resolved.bad_words_token_ids) == 200
    more = SamplingParams(bad_words=words, bad_words_token_ids=[[i, 1] for i in range(57)])
    with pytest.raises(ValueError, match=f"bad_words of it are 257 sequences .*at most {MAX_BAD_WORDS}"):
        with_token_ids(more, tokenizer, "it")


def test_without_a_tokenizer_words_are_refused():
    with pytest.raises(ValueError, match=re.escape("it has bad_words, but the model has no tokenizer")):
        with_token_ids(SamplingParams(bad_words=["hello"]), None, "it")
