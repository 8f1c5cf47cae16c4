"""A config.json that says other than the tensors beside it: what the file holds counts, and the difference is said."""

import json
import logging
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import random_model

from checkpoints.safetensors_files import open_folder, save_folder
from jaxengine.models import agreement, loading
from jaxengine.models.hugging_face import EMBEDDING, HEAD

SMALL: dict[str, Any] = dict(num_hidden_layers=1, vocab_size=203, hidden_size=48, intermediate_size=64)
NORM = "model.layers.0.input_layernorm.weight"


def write(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    """A folder with these tensors and a saved small model's config.json, changed."""
    save_folder(folder, tensors.items())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def parts(tmp_path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config.json, tensors) of a tied bfloat16 model."""
    loading.save(tmp_path / "saved", *random_model("Qwen3", dtype="bfloat16", **SMALL))
    with open_folder(tmp_path / "saved") as files:
        tensors = {name: np.array(files.read(name)) for name in files.names}
    return json.loads((tmp_path / "saved" / "config.json").read_text()), tensors


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "jaxengine")
    return caplog


# -- the output head --------------------------------------------------------------------------------------------------


def other(table: np.ndarray, row: int = -1) -> np.ndarray:
    """The table with one number changed."""
    changed = table.copy()
    changed[row, 3] += 1
    return changed


@pytest.mark.parametrize("row", [0, 100, -1])
def test_a_head_that_differs_is_used_whatever_the_flag_says(tmp_path, parts, said, row, monkeypatch):
    monkeypatch.setattr(agreement, "ROWS", 64)  # several parts, the last one short
    config, tensors = parts
    head = other(tensors[EMBEDDING], row)
    folder = write(tmp_path / "m", tensors | {HEAD: head}, **config | {"tie_word_embeddings": True})
    model_config = loading.read_model_config(folder)
    params = loading.load(folder, model_config)
    assert not model_config.tie_word_embeddings
    assert np.array_equal(np.asarray(params.head).reshape(-1, head.shape[1])[:203], head)
    (message,) = said.messages
    assert str(folder) in message and "tie_word_embeddings is true" in message and HEAD in message


def test_a_head_that_is_the_embedding_is_one_table(tmp_path, parts, said):
    config, tensors = parts
    folder = write(tmp_path / "m", tensors | {HEAD: tensors[EMBEDDING]}, **config)
    model_config = loading.read_model_config(folder)
    assert model_config.tie_word_embeddings and loading.load(folder, model_config).head is None
    assert not said.messages


def test_a_head_of_another_dtype_is_compared_by_value(tmp_path, parts, said):
    config, tensors = parts
    wide = tensors[EMBEDDING].astype(np.float32)
    folder = write(tmp_path / "equal", tensors | {HEAD: wide}, **config)
    assert loading.read_model_config(folder, dtype="bfloat16").tie_word_embeddings
    wide[0, 0] *= np.float32(1 + 2**-12)  # less than bfloat16 sees
    folder = write(tmp_path / "other", tensors | {HEAD: wide}, **config)
    assert not loading.read_model_config(folder, dtype="bfloat16").tie_word_embeddings


@pytest.mark.parametrize("nothing", [{"tie_word_embeddings": None}, {}])
def test_where_nothing_is_said_the_file_tells(tmp_path, parts, said, nothing):
    config, tensors = parts
    del config["tie_word_embeddings"]
    folder = write(tmp_path / "none", tensors, **config | nothing)
    model_config = loading.read_model_config(folder)
    assert model_config.tie_word_embeddings and loading.load(folder, model_config).head is None
    folder = write(tmp_path / "other", tensors | {HEAD: other(tensors[EMBEDDING])}, **config | nothing)
    model_config = loading.read_model_config(folder)
    assert not model_config.tie_word_embeddings and loading.load(folder, model_config).head is not None
    assert not said.messages


def test_a_head_that_the_flag_promises_is_not_made_up(tmp_path, parts):
    """It may have been lost; transformers 5.24 would fill it with random numbers."""
    config, tensors = parts
    folder = write(tmp_path / "m", tensors, **config | {"tie_word_embeddings": False})
    with pytest.raises(ValueError, match=f"missing '{HEAD}'(.|\n)*hf_overrides={{'tie_word_embeddings': True}}"):
        loading.load(folder, loading.read_model_config(folder))
    model_config = loading.read_model_config(folder, hf_overrides={"tie_word_embeddings": True})
    assert loading.load(folder, model_config).head is None


def test_an_override_that_agrees_with_the_file_is_silent(tmp_path, parts, said):
    config, tensors = parts
    folder = write(tmp_path / "m", tensors | {HEAD: other(tensors[EMBEDDING])}, **config)
    assert not loading.read_model_config(folder, hf_overrides={"tie_word_embeddings": False}).tie_word_embeddings
    assert not said.messages


def test_an_untied_model_with_equal_tables_keeps_both(tmp_path, parts, said):
    config, tensors = parts
    folder = write(tmp_path / "m", tensors | {HEAD: tensors[EMBEDDING]}, **config | {"tie_word_embeddings": False})
    assert not loading.read_model_config(folder).tie_word_embeddings and not said.messages


def test_a_configuration_that_is_not_the_files_is_refused_by_load(tmp_path, parts):
    config, tensors = parts
    folder = write(tmp_path / "m", tensors | {HEAD: other(tensors[EMBEDDING])}, **config)
    tied, _ = random_model("Qwen3", dtype="bfloat16", **SMALL)
    with pytest.raises(ValueError, match="another lm_head.weight than .*tie_word_embeddings"):
        loading.load(folder, tied)


def test_a_head_without_an_embedding_is_refused(tmp_path, parts):
    config, tensors = parts
    tensors[HEAD] = tensors.pop(EMBEDDING)
    folder = write(tmp_path / "m", tensors, **config)
    with pytest.raises(ValueError, match=f"missing '{EMBEDDING}'"):
        loading.load(folder, loading.read_model_config(folder))


def test_tables_are_compared_without_a_copy_of_either(tmp_path):
    tables = {name: np.zeros((100_000, 64), ml_dtypes.bfloat16) for name in (EMBEDDING, HEAD)}
    save_folder(tmp_path, tables.items())
    tracemalloc.start()
    with open_folder(tmp_path) as files:
        assert not agreement.heads_differ(files)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < tables[HEAD].nbytes / 2


# -- the dtype --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    "in_config, in_file", [("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "bfloat16")]
)
def test_auto_is_the_files_dtype(tmp_path, parts, said, key, in_config, in_file):
    config, tensors = parts
    del config["dtype"]
    tensors = {name: tensor.astype(in_file) for name, tensor in tensors.items()}
    folder = write(tmp_path / "m", tensors, **config | {key: in_config})
    assert loading.read_model_config(folder).dtype == in_file
    (message,) = said.messages
    assert f"dtype is {in_config}" in message and f"holds {in_file}" in message
    said.clear()
    assert loading.read_model_config(folder, dtype=in_config).dtype == in_config
    assert not said.messages  # it was asked for


@pytest.mark.parametrize("nothing", [{}, {"dtype": None}, {"torch_dtype": "auto"}])
def test_a_configuration_without_a_dtype_has_the_files(tmp_path, parts, said, nothing):
    config, tensors = parts
    del config["dtype"]
    folder = write(tmp_path / "m", tensors, **config | nothing)
    assert loading.read_model_config(folder).dtype == "bfloat16" and not said.messages


def test_some_tensors_of_another_dtype_are_said(tmp_path, parts, said):
    config, tensors = parts
    norms = {name: tensor.astype(np.float32) for name, tensor in tensors.items() if "norm" in name}
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32)}
    folder = write(tmp_path / "m", tensors | norms | frequencies, **config)
    assert loading.read_model_config(folder).dtype == "bfloat16"
    (message,) = said.messages
    assert f"{len(norms)} of {len(tensors)} tensors become bfloat16" in message and "is float32" in message


def test_a_quantization_that_the_file_has_not_is_said(tmp_path, parts, said):
    config, tensors = parts
    folder = write(tmp_path / "m", tensors, **config | {"quantization_config": {"quant_method": "fp8"}})
    loading.load(folder, loading.read_model_config(folder))
    (message,) = said.messages
    assert str(folder) in message and "quantization_config" in message


def test_a_folder_without_tensors_is_what_its_configuration_says(tmp_path, parts, said):
    config, _ = parts
    (tmp_path / "config.json").write_text(json.dumps(config | {"dtype": "float16", "tie_word_embeddings": False}))
    model_config = loading.read_model_config(tmp_path)
    assert (model_config.dtype, model_config.tie_word_embeddings) == ("float16", False) and not said.messages


# -- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, line",
    [
        ({"vocab_size": 204}, "vocab_size=204, the file 203"),
        ({"vocab_size": 200}, "vocab_size=200, the file 203"),
        ({"hidden_size": 64}, "hidden_size=64, the file 48"),
        ({"intermediate_size": 128}, "intermediate_size=128, the file 64"),
        ({"num_hidden_layers": 2}, "num_hidden_layers=2, the file 1"),
        ({"head_dim": 16}, "head_dim=16, the file 32"),
        ({"head_dim": None}, "head_dim=6, the file 32"),
        ({"num_attention_heads": 4}, r"num_attention_heads \* head_dim=128, the file 256"),
        ({"num_key_value_heads": 2}, r"num_key_value_heads \* head_dim=64, the file 128"),
        ({"attention_bias": True}, "attention_bias=True, the file False"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "attention_bias=True, the file False"),
    ],
)
def test_a_size_that_the_shapes_speak_against_is_named(tmp_path, parts, change, line):
    config, tensors = parts
    folder = write(tmp_path / "m", tensors, **config | change)
    model_config = loading.read_model_config(folder)
    with pytest.raises(ValueError, match=f"does not fit the model(.|\n)*\nconfig.json says {line}"):
        loading.load(folder, model_config)


def test_fewer_layers_than_the_file_has_are_refused(tmp_path):
    config, params = random_model("Llama", **SMALL | {"num_hidden_layers": 2})
    loading.save(tmp_path, config, params)
    shallow = loading.read_model_config(tmp_path, hf_overrides={"num_hidden_layers": 1})
    with pytest.raises(ValueError, match="unexpected 'model.layers.1.(.|\n)*num_hidden_layers=1, the file 2"):
        loading.load(tmp_path, shallow)


def test_a_folder_that_agrees_says_nothing(tmp_path, said):
    for family in ("Qwen3", "Qwen2", "Llama"):
        config, params = random_model(family, dtype="float16", **SMALL)
        loading.save(tmp_path / family, config, params)
        back = loading.load(tmp_path / family, loading.read_model_config(tmp_path / family, reduction_leaves=1))
        assert all(map(np.array_equal, jax.tree.leaves(back), jax.tree.leaves(params)))
    assert not said.messages
