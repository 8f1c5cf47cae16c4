"""From a Hugging Face folder to parameters on the device and back, leaf by leaf: never two copies of a model in memory."""
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from checkpoints import key_table
from checkpoints.model_folder import read_config, read_generation_config
from checkpoints.safetensors_files import open_folder
from jaxengine.config import ModelConfig
from jaxengine.models import hugging_face, registry
from jaxengine.models.params import Decoder, map_declared

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def read_model_config(folder: Path, *, dtype: str = "auto", reduction_leaves: int = 1) -> ModelConfig:
    """The configuration of a model folder. End tokens are generation_config.json's where it names some."""
    config = registry.configure(read_config(folder))
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got {dtype!r}")
    eos = read_generation_config(folder).get("eos_token_id")
    ends = config.eos_token_ids if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    return dataclasses.replace(config, dtype=config.dtype if dtype == "auto" else dtype, eos_token_ids=ends,
                               reduction_leaves=reduction_leaves)


def load(folder: Path, config: ModelConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> Decoder:
    """Parameters of a folder, in the configuration's dtype. Raises ValueError listing what does not fit, before memory is taken."""
    leaves: dict[str, jax.Array] = {}
    with open_folder(folder) as tensors:
        table = hugging_face.key_table(config)
        for target, array in key_table.read(tensors, table, ignore=hugging_face.ignored_keys(config)):
            leaves[target] = jax.device_put(np.array(array, DTYPES[config.dtype], order="C"))  # a copy: the file may change or go
            progress(len(leaves), len(table))
    return map_declared(lambda path, _: leaves[path], config)


def save(folder: str | os.PathLike[str], config: ModelConfig, params: Decoder, *, dtype: str | None = None) -> None:
    """Write config.json and safetensors that transformers opens. `dtype` converts on the way out."""
    config = config if dtype is None else dataclasses.replace(config, dtype=dtype)
    paths: dict[str, Any] = {}
    jax.tree_util.tree_map_with_path(lambda path, x: paths.setdefault(jax.tree_util.keystr(path, simple=True, separator="."), x), params)
    key_table.write(folder, hugging_face.key_table(config), lambda target: np.asarray(paths[target]).astype(DTYPES[config.dtype]))
    family = registry.family(config.architecture)
    text = json.dumps(hugging_face.config_json(config, family.MODEL_TYPE) | family.differences(config), indent=2)
    Path(folder, "config.json").write_text(text + "\n")
