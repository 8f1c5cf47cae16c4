"""Where a folder says how to draw: end tokens from three places, and sampling defaults."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from conftest import ENGINE, random_model
from test_hugging_face import HF, write_configs
from tokenizers import models

from jaxengine import LLM, SamplingParams
from jaxengine.models import loading
from jaxengine.models.generation_config import log_defaults_not_taken, sampling_defaults
from jaxengine.text.tokenizer import Tokenizer

END, OUTSIDE = 5, 100  # of word_tokenizer; HF's vocabulary ends at 99


def write_tokenizer(folder: Path, **named: Any) -> Tokenizer:
    """100 words, `<end>` with id 5, and `<outside>` with the first id after the model's vocabulary."""
    words = {("<end>" if i == END else f"w{i}"): i for i in range(100)}
    backend = tokenizers.Tokenizer(models.WordLevel(words, "w0"))
    backend.add_special_tokens(["<outside>"])
    backend.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return Tokenizer.load(folder)


@pytest.mark.parametrize(
    "in_config, generation, eos_token, expected",
    [
        (2, None, None, (2,)),
        ([2, 5], None, None, (2, 5)),
        (None, None, None, ()),
        ([], None, None, ()),
        (0, {}, None, (0,)),
        (2, {"eos_token_id": None}, None, (2,)),
        (2, {"eos_token_id": []}, None, (2,)),
        ([], {"eos_token_id": [0]}, None, (0,)),
        (2, {"eos_token_id": 7}, None, (2, 7)),
        (2, {"eos_token_id": [7, 2, 9]}, None, (2, 7, 9)),
        (None, None, "<end>", (END,)),
        (2, {"eos_token_id": 2}, "<end>", (2, END)),  # a base model whose tokenizer is the chat model's
        ([2, END], {"eos_token_id": END}, "<end>", (2, END)),
        ([], {"eos_token_id": []}, {"content": "<end>", "__type": "AddedToken", "special": True}, (END,)),
    ],
)
def test_end_tokens_are_all_that_the_folder_names(tmp_path, in_config, generation, eos_token, expected):
    folder = write_configs(tmp_path, HF | {"eos_token_id": in_config}, generation)
    tokenizer = write_tokenizer(folder, **{} if eos_token is None else {"eos_token": eos_token})
    assert loading.read_model_config(folder, tokenizer=tokenizer).eos_token_ids == expected


def test_end_tokens_in_a_nested_configuration_count(tmp_path):
    folder = write_configs(tmp_path, HF | {"eos_token_id": 2, "text_config": {"eos_token_id": [3, 2]}})
    assert loading.read_model_config(folder).eos_token_ids == (2, 3)


@pytest.mark.parametrize("where", ["config.json", "generation_config.json", "the tokenizer"])
def test_an_end_token_outside_the_vocabulary_is_said_and_left_out(tmp_path, where, caplog):
    in_config = [2, OUTSIDE] if where == "config.json" else 2
    generation = {"eos_token_id": [OUTSIDE, 2] if where == "generation_config.json" else None}
    folder = write_configs(tmp_path, HF | {"eos_token_id": in_config}, generation)
    tokenizer = write_tokenizer(folder, **{"eos_token": "<outside>"} if where == "the tokenizer" else {})
    with caplog.at_level(logging.WARNING, "jaxengine"):
        assert loading.read_model_config(folder, tokenizer=tokenizer).eos_token_ids == (2,)
    (message,) = caplog.messages
    assert where in message and f"end token {OUTSIDE}" in message and "0 … 99" in message


def test_an_llm_stops_at_its_tokenizers_end_token(tmp_path):
    """The set is in the config, so that sampling, `min_tokens` in scoring and the contract know the same one."""
    model = tmp_path / "model"
    loading.save(model, *random_model(num_hidden_layers=1, vocab_size=100, eos_token_ids=(7,)))
    write_tokenizer(model, eos_token="<end>")
    llm = LLM(model, progress=False, **ENGINE)
    assert llm.config.eos_token_ids == (7, END)
    for token in (7, END):
        params = SamplingParams(max_tokens=4, temperature=0, logit_bias={token: 1e4})
        (sample,) = llm.generate([[1, 2, 3]], params)[0].outputs
        assert (sample.finish_reason, sample.token_ids) == ("stop", [token])


# -- sampling defaults ------------------------------------------------------------------------------------------------


def defaults(folder: Path, **generation: Any) -> SamplingParams:
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return sampling_defaults(folder)


def test_sampling_defaults_are_what_the_folder_recommends(tmp_path):
    assert sampling_defaults(tmp_path) == SamplingParams()
    found = defaults(
        tmp_path,
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.95,
        min_p=0.1,
        repetition_penalty=1.05,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        max_new_tokens=77,
        eos_token_id=[1, 2],
        transformers_version="5.0.0",
    )
    assert found == SamplingParams(
        temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.05, presence_penalty=0.5,
        frequency_penalty=-0.5, max_tokens=77,
    )  # fmt: skip
    assert defaults(tmp_path, temperature=0.7) == SamplingParams(
        temperature=0.7
    )  # as vLLM: drawn unless said otherwise
    nulls = dict.fromkeys(("do_sample", "temperature", "top_k", "top_p", "min_p", "max_new_tokens"))
    assert defaults(tmp_path, **nulls) == SamplingParams()


def test_without_sampling_the_defaults_are_greedy(tmp_path):
    """What belongs to drawing is then unused in transformers, whatever it says."""
    greedy = SamplingParams(temperature=0, repetition_penalty=1.1, max_tokens=9)
    found = defaults(tmp_path, do_sample=False, temperature=0.6, top_k=20, repetition_penalty=1.1, max_new_tokens=9)
    assert found == greedy
    assert defaults(tmp_path, do_sample=False, top_p=5.0) == SamplingParams(temperature=0)


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_k", 2.5),
        ("min_p", "0.1"),
        ("repetition_penalty", 0),
        ("presence_penalty", 3.0),
        ("max_new_tokens", 0),
        ("do_sample", "yes"),
    ],
)
def test_a_default_that_cannot_be_meant_is_named_with_its_file(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"{tmp_path}/generation_config\.json: {name} .*got {value!r}"):
        defaults(tmp_path, **{name: value})


def test_what_a_folder_recommends_is_told_once_to_whoever_leaves_it_open(tmp_path, tiny, caplog):
    loading.save(tmp_path, tiny.config, tiny.params)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 20, "max_new_tokens": 1}')
    llm = LLM(tmp_path, progress=False, **ENGINE)
    llm.generate([[1]], SamplingParams(max_tokens=1))
    assert not caplog.records
    for _ in range(2):
        llm.generate([[1] * 500])
    (record,) = caplog.records
    for part in ("temperature=0.5", "top_k=20", "max_tokens=1", "get_default_sampling_params()"):
        assert part in record.getMessage()


@pytest.mark.parametrize("generation", ["{}", '{"temperature": 1.0, "top_k": 0}', '{"top_p": 7}'])
def test_where_there_is_nothing_to_tell_nothing_is(tmp_path, generation, caplog):
    (tmp_path / "generation_config.json").write_text(generation)
    log_defaults_not_taken(tmp_path)
    assert not caplog.records


def test_an_llm_offers_them_and_does_not_take_them(tmp_path, tiny):
    assert tiny.get_default_sampling_params() == SamplingParams()
    loading.save(tmp_path, tiny.config, tiny.params)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "max_new_tokens": 3, "top_p": 7}')
    llm = LLM(tmp_path, progress=False, **ENGINE)  # a bad value is no reason not to load
    with pytest.raises(ValueError, match=r"generation_config\.json: top_p .*got 7"):
        llm.get_default_sampling_params()
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5, "max_new_tokens": 3}')
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.5, max_tokens=3)
    (sample,) = llm.generate([[1] * 500])[0].outputs
    assert sample.coordinate.sampling_params.temperature == 1.0
