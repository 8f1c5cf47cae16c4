"""From a Hugging Face folder to parameters on the device and back.

Leaf by leaf, so that a model is never in memory twice.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints import key_table
from checkpoints.model_folder import read_config, read_generation_config
from checkpoints.safetensors_files import open_folder
from jaxengine.config import DTYPES, ModelConfig
from jaxengine.models import hugging_face, registry
from jaxengine.models.params import Decoder, by_path, declare, map_declared

OTHER_NAMES = {"half": "float16", "float": "float32"}  # of dtypes, in vLLM


def read_model_config(folder: Path, *, dtype: Any = "auto", reduction_leaves: int = 1) -> ModelConfig:
    """The configuration of a model folder. End tokens are generation_config.json's where it names some.

    Raises FileNotFoundError or ValueError naming the file, what it says and what is allowed.
    """
    hf, generation = read_config(folder), read_generation_config(folder)
    with _naming(folder / "config.json"):
        model_config = registry.configure(hf)
    if generation.get("eos_token_id") is not None:
        with _naming(folder / "generation_config.json"):
            model_config = dataclasses.replace(
                model_config, eos_token_ids=hugging_face.end_tokens(generation["eos_token_id"])
            )
    return dataclasses.replace(
        model_config, dtype=dtype_name(dtype, model_config.dtype), reduction_leaves=reduction_leaves
    )


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def dtype_name(dtype: Any, auto: str) -> str:
    """The name of a dtype: one of DTYPES, vLLM's "half" or "float", or numpy's or JAX's own; "auto" means `auto`.

    Raises ValueError for every other.
    """
    known = {"auto": auto, **OTHER_NAMES}
    try:
        name = known[dtype] if isinstance(dtype, str) and dtype in known else jnp.dtype(dtype).name
    except TypeError:  # no dtype at all
        name = None
    if name not in DTYPES:
        raise ValueError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got {dtype!r:.80}")
    return name


def load(folder: Path, model_config: ModelConfig, progress: Callable[[int, int], None] | None = None) -> Decoder:
    """Parameters of a folder, in their declared dtypes.

    Raises ValueError listing what does not fit, before memory is taken.
    """
    declared, leaves = by_path(declare(model_config)), {}
    with open_folder(folder) as tensors:
        table = hugging_face.key_table(model_config)
        for target, array in key_table.read(tensors, table, ignore=hugging_face.ignored_keys(model_config)):
            own = np.array(
                array, jnp.dtype(declared[target].dtype), order="C"
            )  # a copy, because the file may change or go
            leaves[target] = jax.device_put(own)
            if progress is not None:
                progress(len(leaves), len(table))
    return map_declared(lambda path, _: leaves[path], model_config)


def save(
    folder: str | os.PathLike[str], model_config: ModelConfig, params: Decoder, *, dtype: str | None = None
) -> None:
    """Write config.json and safetensors that transformers opens. `dtype` converts on the way out."""
    model_config = model_config if dtype is None else dataclasses.replace(model_config, dtype=dtype)
    declared, leaves = by_path(declare(model_config)), by_path(params)

    def stored(target: str) -> np.ndarray:
        return np.asarray(leaves[target]).astype(jnp.dtype(declared[target].dtype))

    key_table.write(folder, hugging_face.key_table(model_config), stored)
    family = registry.family(model_config.architecture)
    config = hugging_face.config_json(model_config, family.MODEL_TYPE) | family.differences(model_config)
    Path(folder, "config.json").write_text(json.dumps(config, indent=2) + "\n")
