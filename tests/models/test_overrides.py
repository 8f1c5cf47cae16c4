"""hf_overrides, and how far a stretched rope reaches."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import ENGINE, random_model
from test_hugging_face import HF, write_configs

from jaxengine import LLM
from jaxengine.config import RopeConfig
from jaxengine.engine.settings import resolve_engine_config
from jaxengine.models import loading, registry
from jaxengine.models.overrides import overridden

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CARD = HF | {"max_position_embeddings": 40960, "rope_theta": 1e6}  # as Qwen3's model card has it


def configured(hf: dict[str, Any], overrides: Any = None):
    return registry.configure(overridden(hf, overrides))


# -- the context ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, length",
    [
        ({}, 40960),
        ({"rope_scaling": YARN}, 131072),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}, 131072),
        ({"rope_parameters": YARN | {"rope_theta": 1e6}}, 131072),
        ({"rope_scaling": YARN, "max_position_embeddings": 131072}, 131072),  # stretched already
        ({"rope_scaling": YARN, "max_position_embeddings": 262144}, 262144),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 81920),  # the original is max_position_embeddings
        ({"rope_scaling": YARN | {"factor": 1.5}}, 49152),
        ({"rope_scaling": YARN | {"factor": None}, "max_position_embeddings": 65536}, 65536),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 65536}, 262144),  # beside the rope, it counts
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, 81920),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, 40960),
        ({"rope_scaling": YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}}, 40960),
        ({"rope_scaling": None}, 40960),
    ],
)
def test_the_context_is_what_the_rope_allows(change, length):
    config = configured(CARD | change)
    assert config.context_length == length
    room = dict(num_pages=16, max_num_seqs=1)
    assert resolve_engine_config(config, room).max_model_len == length
    with pytest.raises(ValueError, match=rf"max_model_len={length + 1} is more than the {length} positions .*rope"):
        resolve_engine_config(config, room | {"max_model_len": length + 1})


# -- overrides --------------------------------------------------------------------------------------------------------

STRETCHED = RopeConfig(
    1e6, "yarn", 4.0, 32768, attention_factor=configured(CARD | {"rope_scaling": YARN}).rope.attention_factor
)
OLD = {"rope_theta": 1e6, "rope_scaling": None}
NEW = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
BASE = {key: value for key, value in CARD.items() if key != "rope_theta"}


@pytest.mark.parametrize("file", [OLD, NEW], ids=["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"rope_scaling": YARN},
        {"rope_parameters": YARN},
        {"rope_parameters": YARN | {"rope_theta": 1e6}},
        {"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}},
        {"rope_scaling": {"type": "yarn", "factor": 4}, "original_max_position_embeddings": 32768},
    ],
    ids=str,
)
def test_a_rope_counts_under_either_name(file, overrides):
    found = configured(BASE | file, overrides)
    assert found.rope == STRETCHED and found.context_length == 131072


@pytest.mark.parametrize(
    "file, overrides, field, expected",
    [
        (NEW, {"rope_theta": 5e5}, "theta", 5e5),
        (OLD, {"rope_theta": 5e5}, "theta", 5e5),
        (OLD, {"rope_parameters": {"rope_theta": 5e5}}, "theta", 5e5),
        (OLD | {"rope_scaling": YARN}, {"rope_scaling": {"factor": 2.0}}, "factor", 2.0),
        (OLD | {"rope_scaling": YARN}, {"rope_scaling": {"factor": 2.0}}, "original_max_position_embeddings", 32768),
        (OLD | {"rope_scaling": YARN}, {"rope_scaling": {"factor": 2.0}}, "kind", "yarn"),
        (OLD | {"rope_scaling": YARN}, {"rope_scaling": None}, "kind", "default"),
        (NEW | {"rope_parameters": YARN | {"rope_theta": 5e5}}, {"rope_scaling": None}, "theta", 5e5),
        (
            OLD | {"rope_scaling": YARN, "original_max_position_embeddings": 1024},
            {"rope_scaling": {"original_max_position_embeddings": 2048}},
            "original_max_position_embeddings",
            2048,
        ),
        (
            OLD | {"rope_scaling": YARN},
            {"original_max_position_embeddings": 2048},
            "original_max_position_embeddings",
            2048,
        ),
        (
            OLD | {"rope_scaling": YARN | {"attention_factor": 0.5}},
            {"rope_scaling": {"beta_fast": 8}},
            "attention_factor",
            0.5,
        ),
    ],
)
def test_what_an_override_leaves_out_of_a_rope_stays(file, overrides, field, expected):
    assert getattr(configured(BASE | file, overrides).rope, field) == expected


@pytest.mark.parametrize(
    "overrides, field, expected",
    [
        ({"num_hidden_layers": 1}, "num_hidden_layers", 1),
        ({"tie_word_embeddings": True}, "tie_word_embeddings", True),
        ({"torch_dtype": "float16"}, "dtype", "float16"),
        ({"dtype": "float16"}, "dtype", "float16"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps", 1e-3),
        ({"attention_bias": True}, "out_bias", True),
        ({"architectures": ["Qwen3ForCausalLM"]}, "qk_norm", True),
        ({"eos_token_id": [3, 4]}, "eos_token_ids", (3, 4)),
        ({"text_config": {"eos_token_id": 9}}, "eos_token_ids", (2, 9)),
    ],
)
@pytest.mark.parametrize("file", [{"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}], ids=["dtype", "torch_dtype"])
def test_each_value_can_be_another(file, overrides, field, expected):
    assert getattr(configured(CARD | file, overrides), field) == expected


def test_objects_are_merged_and_nothing_of_the_file_changes():
    hf = CARD | {"text_config": {"eos_token_id": 9, "more": {"a": 1}}}
    before = json.dumps(hf)
    assert overridden(hf, {"text_config": {"more": {"b": 2}}})["text_config"] == {
        "eos_token_id": 9,
        "more": {"a": 1, "b": 2},
    }
    overridden(hf, {"rope_scaling": YARN})
    assert json.dumps(hf) == before


@pytest.mark.parametrize("nothing", [None, {}])
def test_no_overrides_change_nothing(nothing):
    assert overridden(CARD, nothing) is CARD


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"rope_scalings": YARN}, "'rope_scalings'.* did you mean 'rope_scaling'"),
        ({"rope_scaling": {"factr": 4.0}}, "'factr'.* did you mean 'factor'"),
        ({"max_model_len": 8}, "'max_model_len', which is no key of config.json"),
        ({3: 4}, "3, which is no key"),
        (lambda config: config, "hf_overrides must be a dict .* got <function"),
        ([("rope_scaling", YARN)], "hf_overrides must be a dict"),
        ("{}", "hf_overrides must be a dict"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object or null, got 'yarn'"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "keep one of them"),
        ({"rope_scaling": YARN | {"rope_type": "dynamic"}}, "rope type 'dynamic' is not supported .supported: default"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be an integer, got '2'"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_the_folder_named(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json with hf_overrides: .*{message}"):
        loading.read_model_config(write_configs(tmp_path, CARD), hf_overrides=overrides)


def test_a_key_of_the_file_that_nothing_reads_may_be_said():
    assert configured(CARD | {"use_cache": True}, {"use_cache": False}) == configured(CARD)


def test_an_llm_takes_them(tmp_path: Path):
    loading.save(tmp_path, *random_model(num_hidden_layers=1, vocab_size=300, max_position_embeddings=256))
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    llm = LLM(tmp_path, progress=False, hf_overrides={"rope_scaling": yarn}, **ENGINE)
    assert llm.config.rope.kind == "yarn" and llm.engine_config.max_model_len == ENGINE["max_model_len"] > 256
    with pytest.raises(ValueError, match="is more than the 256 positions"):
        LLM(tmp_path, progress=False, **ENGINE)
    with pytest.raises(ValueError, match="revision='main' .* is a local folder"):
        LLM(tmp_path, revision="main")
