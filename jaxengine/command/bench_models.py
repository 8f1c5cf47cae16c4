"""The models that the bench opens: folders, or random weights of a known shape."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from checkpoints.model_folder import find_folder
from jaxengine.command.workloads import Decode, Workload
from jaxengine.config import EngineConfig, ModelConfig, RopeConfig
from jaxengine.llm import LLM
from jaxengine.models import hugging_face, loading, registry
from jaxengine.models.params import initialise

QWEN3_06B = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    rope=RopeConfig(1e6),
    tie_word_embeddings=True,
    qk_norm=True,
    dtype="bfloat16",
)
QWEN3_8B = dataclasses.replace(
    QWEN3_06B,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    tie_word_embeddings=False,
)
PAGE_SIZE = EngineConfig().page_size
SHAPES = {"qwen3-0.6b-shape": QWEN3_06B, "qwen3-8b-shape": QWEN3_8B}  # their weights are random, made in place
ENGINE = dict(max_model_len=2048, max_num_seqs=64, num_pages=1025)  # room for decode and group at 64 sequences


def open_model(
    model: str, *, dtype: str = "auto", reduction_leaves: int | None = None, progress: bool = False, **engine: Any
) -> LLM:
    """An LLM with room for the workloads; `model` and `reduction_leaves` as LLM takes them, or a name in SHAPES for
    random weights of that shape.
    """
    if model not in SHAPES:
        config = loading.read_model_config(find_folder(model), dtype=dtype)
        engine = _room(config) | engine
        return LLM(model, dtype=dtype, reduction_leaves=reduction_leaves, progress=progress, **engine)
    config = dataclasses.replace(SHAPES[model], dtype=loading.dtype_name(dtype, SHAPES[model].dtype))
    config = config.with_leaves(reduction_leaves)
    return LLM.from_params(config, initialise(config, jax.random.key(0)), progress=progress, **_room(config) | engine)


def room(workloads: Sequence[Workload]) -> dict[str, int]:
    """What of ENGINE is too little for workloads, as much as they want."""
    sequences = [workload.batch for workload in workloads if isinstance(workload, Decode)]
    pages = [workload.tokens // PAGE_SIZE + 1 + ENGINE["max_num_seqs"] for workload in workloads]
    wanted = {
        "max_model_len": max(workload.context for workload in workloads),
        "max_num_seqs": max(sequences, default=0),
        "num_pages": max(pages),
    }
    return {name: size for name, size in wanted.items() if size > ENGINE[name]}


def _room(config: ModelConfig) -> dict[str, Any]:
    return ENGINE | {"max_model_len": min(ENGINE["max_model_len"], config.context_length)}


def write_config(folder: Path, config: ModelConfig) -> None:
    """config.json alone: a peer fills such a folder's model with random weights."""
    family = registry.family(config.architecture)
    content = hugging_face.config_json(config, family.MODEL_TYPE) | family.differences(config)
    (folder / "config.json").write_text(json.dumps(content))
