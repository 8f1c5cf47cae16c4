"""Tokenizer: ids as the tokenizers library makes them, except that text never makes a control token."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from jaxengine.text.tokenizer import Tokenizer

SPECIAL = ["<|begin|>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> tokenizers.Tokenizer:
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("Ġ", "hello"),
        ("<", "|"),
        ("<", "ï"),
        ("ð", "Ł"),
        ("âĤ", "¬"),
        ("â", "Ĥ"),
    ]
    vocab |= {left + right: len(vocab) + index for index, (left, right) in enumerate(merges)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=sorted(merges, key=lambda pair: len(pair[0] + pair[1])))
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(["<think>", AddedToken("<｜User｜>", normalized=False)])
    begin = ("<|begin|>", vocab_id(backend, "<|begin|>"))
    backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[begin])
    return backend


def sentencepiece() -> tokenizers.Tokenizer:
    """As Llama 2's: ▁ for a space, one before the first word, unknown characters as bytes."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
        "▁b",
        "▁ab",
        "é",
        "<",
        "/",
        "s",
        ">",
    ]
    vocab = {word: index for index, word in enumerate(words)}
    merges = [("▁", "a"), ("▁", "b"), ("▁a", "b")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def word_level(words: str = "a b [EOS] c") -> tokenizers.Tokenizer:
    vocab = {word: index for index, word in enumerate(["[UNK]", *words.split()])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab=vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["[UNK]", "[EOS]"])
    return backend


def vocab_id(backend: tokenizers.Tokenizer, token: str) -> int:
    token_id = backend.token_to_id(token)
    assert token_id is not None
    return token_id


def save(folder: Path, backend: tokenizers.Tokenizer, **config: object) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return folder


def test_load_reads_a_hugging_face_folder(tmp_path):
    backend = byte_level()
    tokenizer = Tokenizer.load(save(tmp_path, backend, eos_token="<|im_end|>", bos_token="<|begin|>"))
    assert tokenizer.encode("hello hello") == backend.encode("hello hello").ids
    assert tokenizer.encode("hello", add_special_tokens=False) == [vocab_id(backend, "hello")]
    assert tokenizer.eos_token_id == vocab_id(backend, "<|im_end|>")
    assert tokenizer.special_ids == {vocab_id(backend, token) for token in SPECIAL}
    assert tokenizer.vocab_size == backend.get_vocab_size()


def test_named_tokens_are_special_even_where_the_file_does_not_flag_them(tmp_path):
    backend = byte_level()
    loaded = Tokenizer.load(save(tmp_path, backend, eos_token="<think>"))
    for tokenizer in (loaded, Tokenizer(backend, named_tokens={"eos_token": "<think>"})):
        assert tokenizer.eos_token_id in tokenizer.special_ids
        assert tokenizer.eos_token_id not in tokenizer.encode("<think>")
        assert tokenizer.decode(tokenizer.encode("<think>", allow_special_tokens=True)) == ""


def test_saved_truncation_and_padding_do_not_cut_prompts(tmp_path):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=20)
    tokenizer = Tokenizer.load(save(tmp_path, backend))
    assert len(tokenizer.encode("0123456789", add_special_tokens=False)) == 10


def test_a_spelled_control_token_is_text_unless_allowed():
    backend = byte_level()
    tokenizer, text_only = Tokenizer(backend), tokenizers.Tokenizer(backend.model)
    text_only.pre_tokenizer = backend.pre_tokenizer
    for token in [*SPECIAL, "<｜User｜>"]:
        text = f"a{token} b"
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert vocab_id(backend, token) not in ids
        assert ids == text_only.encode(text).ids  # as if there were no such token: nothing is cut
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert vocab_id(backend, token) in tokenizer.encode(text, allow_special_tokens=True)


@pytest.mark.parametrize(
    "single, text, right",
    [
        ("<|begin|> $A", "a", ["<|begin|>", "a"]),
        ("<|begin|> $A", "<|begin|>a", ["<|begin|>", "a"]),
        ("<|begin|> $A", "\n<|begin|>a", ["\n", "<|begin|>", "a"]),
        ("<|begin|> $A", "a<|begin|>a", ["<|begin|>", "a", "<|begin|>", "a"]),
        ("<|begin|> $A <|im_end|>", "<|begin|>a", ["<|begin|>", "a", "<|im_end|>"]),
        ("<|begin|> $A <|im_end|>", "a<|im_end|>\n", ["<|begin|>", "a", "<|im_end|>", "\n"]),
        ("<|begin|> $A <|im_end|>", "<|begin|><|im_end|>", ["<|begin|>", "<|im_end|>"]),
        ("<|begin|> $A", "", ["<|begin|>"]),
        ("$A", "<|begin|>a", ["<|begin|>", "a"]),  # a tokenizer without marks, as Qwen's
    ],
)
def test_marks_that_a_rendered_text_has_are_not_added_again(single, text, right):
    backend = byte_level()
    marks = [(token, vocab_id(backend, token)) for token in ("<|begin|>", "<|im_end|>")]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode(text, allow_special_tokens=True)
    assert [tokenizer.token_text(token) for token in ids] == right
    without = tokenizer.encode(text, allow_special_tokens=True, add_special_tokens=False)
    assert tokenizer.decode(without, skip_special_tokens=False) == text


def test_a_chat_has_the_marks_that_its_template_prints():
    """Llama 3's template prints the token that its tokenizer puts in front of any text."""
    tokenizer = Tokenizer(byte_level(), named_tokens={"bos_token": "<|begin|>"})
    for template, count in (("{{ bos_token }}{{ messages[0].content }}", 1), ("{{ messages[0].content }}", 0)):
        chat = tokenizer.render_chat([{"role": "user", "content": "<|begin|>a"}], chat_template=template)
        assert chat.token_ids.count(vocab_id(byte_level(), "<|begin|>")) == count


def test_the_first_control_token_of_a_text_is_named():
    tokenizer = Tokenizer(byte_level())
    assert tokenizer.control_token_in("a <think><|im_end|><|begin|>") == "<|im_end|>"
    assert tokenizer.control_token_in("a <think> <|im_end>") is None


def test_added_tokens_that_are_no_control_tokens_stay_vocabulary():
    backend = byte_level()
    assert Tokenizer(backend).encode("a<think>b") == backend.encode("a<think>b").ids


def test_control_tokens_in_the_vocabulary_itself_are_divided():
    backend = word_level()
    tokenizer = Tokenizer(backend)
    assert backend.encode("a [EOS] c").ids == [1, 3, 4]
    assert tokenizer.encode("a [EOS] c") == [1, 0, 0, 4]  # two unknown words
    assert tokenizer.encode("unheard a") == [0, 1]


def test_a_control_token_of_one_character_is_refused():
    backend = word_level("a $")
    backend.add_special_tokens(["$"])
    with pytest.raises(ValueError, match=r"makes a control token of the text '\$'"):
        Tokenizer(backend).encode("a $")


def test_lone_surrogates_are_refused_with_their_position():
    tokenizer = Tokenizer(byte_level())
    with pytest.raises(ValueError, match=r"text has a lone surrogate, U\+D83D, at position 2"):
        tokenizer.encode("ab\ud83d")
    with pytest.raises(ValueError, match="text must be a string, got bytes"):
        tokenizer.encode(b"ab")  # pyright: ignore[reportArgumentType]


def test_token_text_shows_every_token():
    backend = byte_level()
    tokenizer = Tokenizer(backend)
    euro = backend.encode("€", add_special_tokens=False).ids
    assert [tokenizer.token_text(token) for token in euro] == ["€"]
    assert tokenizer.token_text(vocab_id(backend, "Ġhello")) == " hello"
    assert tokenizer.token_text(vocab_id(backend, "âĤ")) == "\ufffd"
    assert tokenizer.token_text(vocab_id(backend, "<|im_end|>")) == "<|im_end|>"
    assert tokenizer.token_text(10**6) == ""


def test_decode_leaves_out_special_tokens_and_unknown_ids():
    backend = byte_level()
    tokenizer = Tokenizer(backend)
    ids = [10**6, vocab_id(backend, "hello"), vocab_id(backend, "<|im_end|>"), vocab_id(backend, "Ġhello")]
    assert tokenizer.decode(ids) == "hello hello"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "hello<|im_end|> hello"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 275), max_size=30), st.booleans())
def test_decode_equals_the_library_for_byte_level_tokens(ids, skip):
    assert TOKENIZERS["byte_level"].decode(ids, skip) == BACKENDS["byte_level"].decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", ["sentencepiece", "word_level"])
@settings(max_examples=200, deadline=None)
@given(text=st.text("ab é€😀 ", max_size=20))
def test_decode_equals_the_library_for_encoded_text(name, text):
    ids = BACKENDS[name].encode(text).ids
    assert TOKENIZERS[name].decode(ids) == BACKENDS[name].decode(ids)


def test_the_first_word_of_a_decoded_text_loses_its_space_as_in_the_library():
    backend = sentencepiece()
    tokenizer = Tokenizer(backend)
    ab, end = vocab_id(backend, "▁ab"), vocab_id(backend, "</s>")
    assert tokenizer.decode([ab, ab]) == "ab ab"
    assert tokenizer.decode([end, ab, end, ab]) == "ab ab"  # a skipped token is not the first one


def test_a_bad_byte_spoils_no_character_before_it():
    backend = sentencepiece()
    euro = [vocab_id(backend, f"<0x{byte:02X}>") for byte in "€".encode()]
    bad = vocab_id(backend, "<0xFF>")
    assert Tokenizer(backend).decode([*euro, bad, *euro]) == "€\ufffd€"


def test_a_decoder_under_which_later_tokens_matter_is_refused():
    vocab = {"a</w>": 0, "b": 1, "c</w>": 2, "d": 3}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    with pytest.raises(ValueError, match="decoder .*BPEDecoder"):
        Tokenizer(backend)


def test_loading_imports_no_torch_and_gives_no_advice(tmp_path):
    save(tmp_path, byte_level())
    code = (
        f"import sys; from jaxengine.text.tokenizer import Tokenizer; assert 'transformers' not in sys.modules; "
        f"Tokenizer.load({str(tmp_path)!r}); assert 'transformers' in sys.modules; assert 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert not logging.getLogger("transformers").filters


BACKENDS = {"byte_level": byte_level(), "sentencepiece": sentencepiece(), "word_level": word_level()}
TOKENIZERS = {name: Tokenizer(backend) for name, backend in BACKENDS.items()}
