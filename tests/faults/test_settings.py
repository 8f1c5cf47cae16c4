"""Settings of an engine: what cannot be meant is refused by name, with the value and what is allowed, before memory is taken."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_llm, random_model

import jaxengine
from jaxengine import LLM, SamplingParams
from jaxengine.config import EngineConfig
from jaxengine.models import loading

ONE = SamplingParams(max_tokens=1)
ROOM = dict(max_model_len=64, max_num_seqs=4, num_pages=20, progress=False)
INTEGERS = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "page_size",
    "num_pages",
    "decode_steps",
    "max_logprobs",
    "compile_patience",
    "max_waiting",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    loading.save(path, *random_model(num_hidden_layers=1, vocab_size=300))
    (path / "tokenizer_config.json").write_text("{}")
    return path


# -- the engine's ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["8", None, 1.5, 64.0, True, np.float32(64), [64]], ids=repr)
@pytest.mark.parametrize("name", INTEGERS)
def test_what_is_no_integer_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer, got "):
        EngineConfig(**{name: value})


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(page_size=0), r"page_size must be one of \[16, 32, 64\], got 0"),
        (dict(page_size=-16), r"of \[16, 32, 64\], got -16"),
        (dict(page_size=48), r"page_size must be one of \[16, 32, 64\], got 48"),
        (dict(max_num_seqs=0), "max_num_seqs must be at least 1, got 0"),
        (dict(max_waiting=0), "max_waiting must be at least 1, got 0"),
        (dict(num_pages=1), "num_pages must be at least 2, got 1"),
        (dict(max_model_len=1), "max_model_len must be at least 2, got 1"),
        (dict(max_num_batched_tokens=15), "max_num_batched_tokens must be at least 16, got 15"),
        (dict(max_logprobs=0), "max_logprobs must be at least 1, got 0"),
        (dict(decode_steps=0), "decode_steps must be at least 1, got 0"),
        (dict(compile_patience=-1), "compile_patience must be at least 0, got -1"),
        (dict(overlap="false"), "overlap must be True or False, got 'false'"),
        (dict(page_checksums=1), "canary must be True or False, got 1"),
        (dict(enable_prefix_caching=None), "enable_prefix_caching must be True or False, got None"),
        (dict(kernels=5), "kernels must be one of auto, .*, got 5"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**settings)


def test_numpys_and_jaxs_integers_and_bools_are_pythons():
    given = EngineConfig(page_size=np.int64(16), max_num_seqs=jnp.int32(8), num_pages=np.uint16(100), overlap=np.True_)
    assert given == EngineConfig(page_size=16, max_num_seqs=8, num_pages=100, overlap=True)
    assert type(given.page_size) is type(given.max_num_seqs) is int and given.overlap is True


# -- the model's -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dtype="float64"), "dtype must be one of float32, float16, bfloat16, got 'float64'"),
        (dict(dtype=jnp.bfloat16), "dtype must be one of float32, float16, bfloat16, got <class 'jax.numpy.bfloat16'>"),
        (dict(hidden_size=96.0), "hidden_size must be an integer, got 96.0"),
        (dict(reduction_leaves=0), "reduction_leaves must be at least 1, got 0"),
        (dict(qk_norm="false"), "qk_norm must be True or False, got 'false'"),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        random_model(**changes)


# -- an LLM's ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(max_model_len="128"), "max_model_len must be an integer, got '128'"),
        (dict(max_model_len=5000), "max_model_len=5000 is more than the model's max_position_embeddings=4096"),
        (dict(page_size=0), r"page_size must be one of \[16, 32, 64\], got 0"),
        (dict(reduction_leaves="2"), "reduction_leaves must be an integer"),
        (dict(seed=None), "seed must be an integer, got None"),
        (dict(seed=-1), "seed must be at least 0 and at most 18446744073709551615"),
        (dict(seed="7"), "seed must be an integer, got '7'"),
        (dict(dtype="float8"), "dtype must be 'auto' or one of .*, got 'float8'"),
        (dict(tokenizer=5), "tokenizer must be a folder, a name or a hub id, got 5"),
    ],
    ids=str,
)
def test_an_llm_that_cannot_be_meant_is_refused_before_its_weights_are_read(folder, settings, message, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match=message):
        LLM(folder, **ROOM | settings)


def test_none_is_an_engine_settings_default(folder):
    assert (
        LLM(folder, **ROOM | dict(page_size=None, seed=np.uint32(3))).engine_config.page_size
        == EngineConfig().page_size
    )


@pytest.mark.parametrize("seed", [None, "7", 1.5])
def test_a_seed_over_parameters_in_memory_is_checked(seed, tiny):
    with pytest.raises(ValueError, match="seed must be an integer, got"):
        make_llm(tiny.config, tiny.params, seed=seed)


@pytest.mark.parametrize(
    "dtype, name", [("half", "float16"), (jnp.bfloat16, "bfloat16"), ("float", "float32")], ids=str
)
def test_an_llm_in_a_dtype_by_another_name(folder, dtype, name):
    llm = LLM(folder, dtype=dtype, **ROOM)
    assert llm.config.dtype == name and llm.params.norm.dtype == name
    assert llm.generate([[5, 6]], ONE)[0].outputs[0].finish_reason == "length"


# -- a folder without tokenizer.json -----------------------------------------------------------------------------------------------


def test_a_folder_without_tokenizer_json_takes_token_ids(folder, tmp_path):
    llm = LLM(folder, **ROOM)
    assert llm.tokenizer is None and len(llm.generate([[5, 6, 7]], ONE)[0].outputs[0].token_ids) == 1
    with pytest.raises(
        ValueError, match=r"is text, but the model has no tokenizer: give \{'prompt_token_ids': .*, or .* tokenizer="
    ):
        llm.generate("12+30=")
    with pytest.raises(
        ValueError, match="no tokenizer, so there is no chat: give LLM one as tokenizer=, or token ids to generate"
    ):
        llm.chat([{"role": "user", "content": "hi"}])
    with pytest.raises(ValueError, match="has no tokenizer.json.*leave tokenizer= out and give prompts as token ids"):
        LLM(folder, tokenizer=tmp_path, **ROOM)


def test_a_folder_without_tokenizer_json_takes_anothers(folder):
    assert LLM(folder, tokenizer="calc", **ROOM).generate("12+30=", ONE)[0].prompt == "12+30="


# -- the functional face -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, then",
    [
        ("max_model_length", ", did you mean 'max_model_len'"),
        ("seed", r"\. It takes: "),
        ("guided_json", ": output that follows a grammar"),
    ],
)
def test_an_unknown_keyword_of_generate_is_generates(name, then, tiny):
    with pytest.raises(TypeError, match=f"^generate has no keyword '{name}'{then}"):
        jaxengine.generate(tiny.params, [[1, 2]], key=jax.random.key(0), config=tiny.config, **{name: 128})
