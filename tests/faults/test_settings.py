"""Settings of an engine: what cannot be meant is refused by name and value, before memory is taken."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bits, make_llm, random_model

import jaxengine
from jaxengine import LLM, SamplingParams
from jaxengine.config import PROFILES, EngineConfig
from jaxengine.models import loading

ONE = SamplingParams(max_tokens=1)
ROOM = dict(max_model_len=64, max_num_seqs=4, num_pages=20, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    loading.save(path, *random_model(num_hidden_layers=1, vocab_size=300))
    (path / "tokenizer_config.json").write_text("{}")
    return path


# -- the engine's -----------------------------------------------------------------------------------------------------


# One value a field; what values there are is tests/base/test_arguments.py. (field, value, what is allowed)
REFUSED = [
    ("max_num_seqs", 0, "at least 1"),
    ("max_num_batched_tokens", 15, "at least 16"),
    ("max_model_len", 1, "at least 2"),
    ("page_size", "8", "integer"),
    ("page_size", 48, r"\[16, 32, 64\]"),
    ("num_pages", 1, "at least 2"),
    ("gpu_memory_utilization", 0, "greater than 0"),
    ("enable_prefix_caching", None, "True or False"),
    ("decode_steps", 0, "at least 1"),
    ("overlap", "false", "True or False"),
    ("max_logprobs", True, "integer"),
    ("compile_patience", -1, "at least 0"),
    ("max_waiting", 0, "at least 1"),
    ("page_checksums", 1, "True or False"),
    ("compilation_cache", "yes", "True or False"),
    ("kernels", 5, "one of auto, "),
    ("mesh", "2x4", "jax.sharding.Mesh"),
    ("process_timeout", 0, "at least 1"),
]


def shown(field: str, value, allowed: str) -> str:
    """A pattern for an error that names the field, what is allowed and the value, in this order."""
    return f"{field} .*{allowed}.* got {re.escape(repr(value))}"


def test_every_field_of_an_engine_refuses_something():
    assert {field for field, *_ in REFUSED} == {field.name for field in dataclasses.fields(EngineConfig)}


@pytest.mark.parametrize("field, value, allowed", REFUSED)
def test_what_cannot_be_meant_is_refused(field, value, allowed):
    with pytest.raises(ValueError, match=shown(field, value, allowed).replace("got 0", "got 0(\\.0)?")):
        EngineConfig(**{field: value})


def test_numpys_and_jaxs_integers_and_bools_are_pythons():
    given = EngineConfig(page_size=np.int64(16), max_num_seqs=jnp.int32(8), num_pages=np.uint16(100), overlap=np.True_)
    assert given == EngineConfig(page_size=16, max_num_seqs=8, num_pages=100, overlap=True)
    assert type(given.page_size) is type(given.max_num_seqs) is int and given.overlap is True


# -- the model's ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("dtype", "float64", "one of float32, float16, bfloat16"),
        ("dtype", jnp.bfloat16, "one of float32, float16, bfloat16"),
        ("hidden_size", 96.0, "integer"),
        ("reduction_leaves", 0, "at least 1"),
        ("qk_norm", "false", "True or False"),
    ],
)
def test_a_model_that_cannot_be_meant_is_refused(field, value, allowed):
    with pytest.raises(ValueError, match=shown(field, value, allowed)):
        random_model(**{field: value})


# -- an LLM's ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("max_model_len", "128", "integer"),
        ("page_size", 0, r"\[16, 32, 64\]"),
        ("reduction_leaves", "2", "integer"),
        ("seed", None, "integer"),
        ("seed", -1, f"at least 0 and at most {2**64 - 1}"),
        ("dtype", "float8", "'auto' or one of "),
        ("tokenizer", 5, "a folder, a name or a hub id"),
    ],
)
def test_an_llm_that_cannot_be_meant_is_refused_before_its_weights_are_read(folder, field, value, allowed, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match=shown(field, value, allowed)):
        LLM(folder, **ROOM | {field: value})


def test_a_context_longer_than_the_model_goes_is_refused(folder):
    with pytest.raises(ValueError, match="max_model_len=5000 .*max_position_embeddings=4096"):
        LLM(folder, **ROOM | dict(max_model_len=5000))


def test_none_is_an_engine_settings_default(folder):
    assert (
        LLM(folder, **ROOM | dict(page_size=None, seed=np.uint32(3))).engine_config.page_size
        == EngineConfig().page_size
    )


def test_a_seed_over_parameters_in_memory_is_checked(tiny):
    with pytest.raises(ValueError, match=shown("seed", "7", "integer")):
        make_llm(tiny.config, tiny.params, seed="7")


@pytest.mark.parametrize(
    "dtype, name", [("half", "float16"), (jnp.bfloat16, "bfloat16"), ("float", "float32")], ids=str
)
def test_an_llm_in_a_dtype_by_another_name(folder, dtype, name):
    llm = LLM(folder, dtype=dtype, **ROOM)
    assert llm.config.dtype == name and llm.params.norm.dtype == name


# -- a folder without tokenizer.json ----------------------------------------------------------------------------------


def test_a_folder_without_tokenizer_json_takes_token_ids(folder, tmp_path):
    llm = LLM(folder, **ROOM)
    assert llm.tokenizer is None and len(llm.generate([[5, 6, 7]], ONE)[0].outputs[0].token_ids) == 1
    with pytest.raises(ValueError, match="no tokenizer.*prompt_token_ids.* tokenizer="):
        llm.generate("12+30=")
    with pytest.raises(ValueError, match="no tokenizer.*tokenizer="):
        llm.chat([{"role": "user", "content": "hi"}])
    with pytest.raises(ValueError, match="no tokenizer.json.*tokenizer="):
        LLM(folder, tokenizer=tmp_path, **ROOM)


def test_a_folder_without_tokenizer_json_takes_anothers(folder):
    assert LLM(folder, tokenizer="calc", **ROOM).generate("12+30=", ONE)[0].prompt == "12+30="


# -- the functional face ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, then",
    [("max_model_length", ", did you mean 'max_model_len'"), ("seed", r"\. It takes: "), ("guided_json", ".*grammar")],
)
def test_an_unknown_keyword_of_generate_is_generates(name, then, tiny):
    with pytest.raises(TypeError, match=f"^generate has no keyword '{name}'{then}"):
        jaxengine.generate(tiny.params, [[1, 2]], key=jax.random.key(0), config=tiny.config, **{name: 128})


def test_a_profile_is_a_line_of_defaults_that_change_no_bit(folder, capsys):
    expected = LLM(folder, **ROOM).generate([[1, 2, 3]], SamplingParams(max_tokens=9, seed=1))
    for profile, settings in PROFILES.items():
        llm = LLM(folder, **ROOM | dict(progress=True, profile=profile))
        found = dataclasses.asdict(llm.engine_config)
        assert {name: found[name] for name in settings} == settings | {"max_num_seqs": 4}  # what is given counts
        assert f"profile {profile}: max_num_seqs=4" in capsys.readouterr().err
        outputs = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=9, seed=1))
        assert bits(outputs) == bits(expected)
    with pytest.raises(ValueError, match="profile must be one of 'rl', 'serving' or None, got 'fast'"):
        LLM(folder, profile="fast")
