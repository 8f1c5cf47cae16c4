"""From a Hugging Face folder to parameters on the device and back.

Leaf by leaf, so that a model is never in memory twice.
"""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints import key_table
from checkpoints.key_table import Entry
from checkpoints.model_folder import GENERATION_FILE, TOKENIZER_FILES, copy_files, read_config, read_generation_config
from checkpoints.safetensors_files import TensorFolder, has_tensors, open_folder, save_folder
from jaxengine.config import DTYPES, ModelConfig
from jaxengine.models import agreement, hugging_face, registry
from jaxengine.models.generation_config import end_tokens, stop_set
from jaxengine.models.hugging_face import said_dtype
from jaxengine.models.overrides import overridden
from jaxengine.models.parameter import Parameter
from jaxengine.models.params import Decoder, by_path, declare, map_declared
from jaxengine.text.tokenizer import Tokenizer
from sharding.mesh import Split, on_host
from sharding.rules import spec_of

log = logging.getLogger("jaxengine")
OTHER_NAMES = {"half": "float16", "float": "float32"}  # of dtypes, in vLLM


def read_model_config(
    folder: Path,
    *,
    dtype: Any = "auto",
    reduction_leaves: int | None = None,
    devices: int = 1,
    hf_overrides: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
) -> ModelConfig:
    """The configuration of a model folder, as its tensors bear it out (models/agreement.py), where it has some.

    `reduction_leaves=None` is the most that its key-value heads allow, up to 8, or one for each of `devices` that share
    it, where they are more (ModelConfig.with_leaves), which is logged, because leaves are in the bits.
    `dtype="auto"` is what the file holds. `hf_overrides` change config.json's values before they are read
    (models/overrides.py). End tokens are those of config.json, of generation_config.json and the tokenizer's own
    eos_token, together. Raises FileNotFoundError or ValueError naming the file, what it says and what is allowed.
    """
    hf, generation = read_config(folder), read_generation_config(folder)
    with _naming(f"{folder / 'config.json'}{' with hf_overrides' if hf_overrides else ''}"):
        hf = overridden(hf, hf_overrides)
        model_config = registry.configure(hf)
    with _naming(str(folder / GENERATION_FILE)):
        generated = end_tokens(generation)
    own = [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    sources = [
        (f"{folder / 'config.json'}", model_config.eos_token_ids),
        (f"{folder / GENERATION_FILE}", generated),
        ("the tokenizer", own),
    ]
    model_config = dataclasses.replace(
        model_config,
        eos_token_ids=stop_set(model_config.vocab_size, sources),
        dtype=dtype_name(dtype, model_config.dtype),
    )
    model_config = _with_leaves(folder, model_config, reduction_leaves, devices)
    return _borne_out(folder, model_config, hf, is_auto=isinstance(dtype, str) and dtype == "auto")


def _with_leaves(folder: Path, model_config: ModelConfig, count: int | None, devices: int) -> ModelConfig:
    usual, chosen = model_config.with_leaves(), model_config.with_leaves(count, devices)
    if count is None and chosen != usual:
        log.warning(
            "%s: %d devices share the model, so it has reduction_leaves=%d, and other bits than with the %d that it "
            "has on fewer devices; reduction_leaves=%d there gives the same",
            folder,
            devices,
            chosen.reduction_leaves,
            usual.reduction_leaves,
            chosen.reduction_leaves,
        )
    return chosen


def _borne_out(folder: Path, model_config: ModelConfig, hf: dict[str, Any], *, is_auto: bool) -> ModelConfig:
    """The configuration with what the folder's tensors say otherwise; of a folder without tensors, as it is."""
    if not has_tensors(folder):
        return model_config
    with open_folder(folder) as tensors:
        agreement.log_plain_weights(hf.get("quantization_config"), tensors)
        return dataclasses.replace(
            model_config,
            tie_word_embeddings=agreement.tied_as_the_file(hf.get("tie_word_embeddings"), tensors),
            dtype=agreement.dtype_of_the_file(said_dtype(hf), tensors) if is_auto else model_config.dtype,
        )


@contextlib.contextmanager
def _naming(file: str) -> Iterator[None]:
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


def load(
    folder: Path,
    model_config: ModelConfig,
    progress: Callable[[int, int], None] | None = None,
    split: Split | None = None,
) -> Decoder:
    """Parameters of a folder, in their declared dtypes. On a mesh each device gets its own part alone.

    Raises ValueError listing what does not fit, before memory is taken.
    """
    declared, leaves = by_path(declare(model_config)), {}
    with open_folder(folder) as tensors:
        table = hugging_face.key_table(model_config)
        for target, array in _fitting(tensors, model_config, table):
            leaves[target] = on_device(array, declared[target], split)
            if progress is not None:
                progress(len(leaves), len(table))
    return map_declared(lambda path, _: leaves[path], model_config)


def _fitting(tensors: TensorFolder, model_config: ModelConfig, table: list[Entry]) -> Iterator[tuple[str, np.ndarray]]:
    """`key_table.read`; its error says too what of config.json the shapes speak against."""
    if model_config.tie_word_embeddings and agreement.heads_differ(tensors):
        raise ValueError(
            f"{tensors.path} has another {hugging_face.HEAD} than {hugging_face.EMBEDDING}, and the configuration has "
            "tie_word_embeddings true: read_model_config unties it"
        )
    try:
        return key_table.read(tensors, table, ignore=hugging_face.ignored_keys(model_config))
    except ValueError as error:
        sizes = agreement.differing_sizes(model_config, tensors)
        raise ValueError("\n".join([str(error), *sizes])) from error


def on_device(array: np.ndarray, parameter: Parameter, split: Split | None = None) -> jax.Array:
    """A copy of its own on the device, because the file or the caller's array may change.

    On a mesh each device gets its own part, and no other is read.
    """
    dtype = jnp.dtype(parameter.dtype)
    if split is None:
        return jax.device_put(np.array(array, dtype, order="C"))
    home = split.sharding(spec_of(parameter.axes))
    return jax.make_array_from_callback(array.shape, home, lambda part: np.array(array[part], dtype, order="C"))


def named_tensors(model_config: ModelConfig, params: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """(name, array) pairs of `params` under Hugging Face's names and shapes, in `model_config.dtype`."""
    declared, leaves = by_path(declare(model_config)), by_path(params)

    def stored(target: str) -> np.ndarray:
        return on_host(leaves[target]).astype(jnp.dtype(declared[target].dtype))

    return key_table.unpacked(hugging_face.key_table(model_config), stored)


def save(
    folder: str | os.PathLike[str],
    model_config: ModelConfig,
    params: Decoder,
    *,
    dtype: str | None = None,
    tokenizer_from: Path | None = None,
    generation_from: Path | None = None,
) -> None:
    """Write config.json and safetensors that transformers opens. `dtype` converts on the way out.

    Shards have at most 5 GB. The tokenizer's files and generation_config.json are copied from the folders that are
    given. config.json comes last, and a folder without one does not open: a crash leaves no half model. Raises
    FileExistsError where the folder holds tensors, ValueError where copies of a key-value head differ (config.py).
    """
    model_config = model_config if dtype is None else dataclasses.replace(model_config, dtype=dtype)
    save_folder(folder, named_tensors(model_config, params))
    if tokenizer_from is not None:
        copy_files(tokenizer_from, folder, TOKENIZER_FILES)
    if generation_from is not None:
        copy_files(generation_from, folder, [GENERATION_FILE])
    family = registry.family(model_config.architecture)
    config = hugging_face.config_json(model_config, family.MODEL_TYPE) | family.differences(model_config)
    Path(folder, "config.json").write_text(json.dumps(config, indent=2) + "\n")
