"""Weights as other trainers give them: under Hugging Face's names, as a folder, a dict or pairs."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints import key_table
from checkpoints.model_folder import find_folder, read_config
from checkpoints.safetensors_files import open_folder
from jaxengine.config import ModelConfig
from jaxengine.models import hugging_face, registry
from jaxengine.models.agreement import differ
from jaxengine.models.hugging_face import EMBEDDING, HEAD
from jaxengine.models.loading import on_device
from jaxengine.models.params import Decoder, by_path, declare, map_declared
from sharding.mesh import Split

log = logging.getLogger("jaxengine")
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
FORMS = (str, os.PathLike, Mapping, list, tuple, Iterator)


def to_decoder(weights: Any, model_config: ModelConfig, *, cast: bool = False, split: Split | None = None) -> Any:
    """The parameters that `weights` hold, in this project's layout; what has none of the forms is given back.

    `weights` are a folder in Hugging Face format, a dict from names to arrays, or an iterable of (name, array) pairs in
    any order, which is read once and of which one leaf's tensors are held at a time. Names and shapes are those of
    Hugging Face's files (`model.layers.0.mlp.up_proj.weight` `[F, D]`), or a module's where all experts are one tensor
    (`model.layers.0.mlp.experts.gate_up_proj` `[E, 2F, D]`). Arrays are numpy's, JAX's, or of anything that speaks
    DLPack or `__array__`. They are copied; what lies on a device goes through the host's memory. A tied model's
    `lm_head` may be left out or equal the embedding.

    Every name is used once, every leaf filled. Raises ValueError that names what is missing, misshapen, unexpected,
    given twice, of another dtype (unless `cast` rounds it) or a head that is not the embedding; TypeError for what is
    no array.
    """
    if not isinstance(weights, FORMS):
        return weights
    if isinstance(weights, (str, os.PathLike)):
        folder = find_folder(weights, "params")
        _log_other_architecture(folder, model_config)
        with open_folder(folder) as tensors:
            return _decoder(((name, tensors.read(name)) for name in tensors.names), model_config, cast, split)
    pairs = weights.items() if isinstance(weights, Mapping) else weights
    return _decoder(_checked_pairs(pairs), model_config, cast, split)


def _log_other_architecture(folder: Path, model_config: ModelConfig) -> None:
    """What no shape shows is said: the model goes on as it was configured."""
    if not (folder / "config.json").exists():
        return
    theirs = registry.configure(read_config(folder))
    for name in ("architecture", "rope", "rms_norm_eps"):
        there, here = getattr(theirs, name), getattr(model_config, name)
        if there != here:
            log.warning("%s says %s=%s, and its weights will run with %s", folder / "config.json", name, there, here)


def _decoder(pairs: Iterable[tuple[str, Any]], model_config: ModelConfig, cast: bool, split: Split | None) -> Decoder:
    table, ignored = hugging_face.key_table(model_config), hugging_face.ignored_keys(model_config)
    # A tied model's head is no source, and is compared with the embedding as both are rounded.
    known = {HEAD, *(name for entry in table for name in entry.sources)}
    arrays = _arrays(pairs, model_config, known, cast)
    if model_config.tie_word_embeddings:
        arrays = _with_equal_head(arrays)
    declared = by_path(declare(model_config))
    leaves = {
        target: on_device(array, declared[target], split) for target, array in key_table.packed(arrays, table, ignored)
    }
    return map_declared(lambda path, _: leaves[path], model_config)


def _checked_pairs(pairs: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    for index, pair in enumerate(pairs):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise TypeError(f"weights must be pairs of a name and an array, number {index} is {type(pair).__name__}")
        yield pair[0], pair[1]


def _arrays(
    pairs: Iterable[tuple[str, Any]], model_config: ModelConfig, known: set[str], cast: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """The pairs as numpy arrays of the model's dtype."""
    wanted = jnp.dtype(model_config.dtype)
    each = ((name, _as_numpy(name, given)) for name, given in pairs)
    for name, array in (one for pair in each for one in _by_expert(*pair)):
        if name in known and array.dtype != wanted:
            if not cast or not jnp.issubdtype(array.dtype, jnp.floating):
                raise ValueError(
                    f"{name!r} has dtype {array.dtype}, the model runs in {wanted}: "
                    + ("only floating dtypes are cast" if cast else "cast=True rounds it")
                )
            array = array.astype(wanted)
        yield name, array


def _by_expert(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a file that a module of transformers 5 holds as one, with all experts; any other as it is."""
    stem, _, kind = name.rpartition(".")
    if not stem.endswith(".mlp.experts") or kind not in FUSED or array.ndim != 3:
        yield name, array
        return
    for expert, of_expert in enumerate(array):
        parts = np.split(of_expert, len(FUSED[kind])) if len(of_expert) % len(FUSED[kind]) == 0 else [of_expert]
        for part, rows in zip(FUSED[kind], parts, strict=False):
            yield f"{stem}.{expert}.{part}.weight", rows


def _as_numpy(name: str, given: Any) -> np.ndarray:
    """A view of the array where there can be one."""
    if isinstance(given, np.ndarray):
        return given
    try:
        if hasattr(given, "detach"):  # a parameter of PyTorch's is part of a graph, and exports nothing until it is not
            given = given.detach()
        if isinstance(given, jax.Array) or not hasattr(given, "__dlpack__"):
            return _no_object(np.asarray(given))
        # PyTorch's bfloat16 is no dtype of numpy's own: JAX takes the tensor over by DLPack and knows one.
        return np.asarray(jnp.from_dlpack(given))
    except Exception as error:  # each library raises its own
        raise TypeError(f"{name!r} cannot be read as an array ({type(given).__name__}): {error}") from error


def _no_object(array: np.ndarray) -> np.ndarray:
    if array.dtype == object:
        raise TypeError("it holds Python objects")
    return array


def _with_equal_head(arrays: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """The same pairs; raises where there is a head that is not the embedding, since the model runs with one table."""
    tables: dict[str, np.ndarray] = {}
    for name, array in arrays:
        if name in (EMBEDDING, HEAD):
            tables[name] = array
            if len(tables) == 2 and differ(tables[EMBEDDING], tables[HEAD]):
                raise ValueError(
                    f"{HEAD!r} differs from {EMBEDDING!r}, and the model runs with tie_word_embeddings true: build the "
                    "LLM from a folder with that head, or with hf_overrides={'tie_word_embeddings': False}"
                )
        yield name, array
