"""Models that a plan knows by name, by their config.json; and config.json files."""

import dataclasses
from pathlib import Path
from typing import Any

from checkpoints.json_files import read_object
from checkpoints.model_folder import find_folder, read_config
from jaxengine.config import ModelConfig
from jaxengine.models import registry
from jaxengine.models.loading import dtype_name

LLAMA_3_70B = dict(
    architectures=["LlamaForCausalLM"],
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    dtype="bfloat16",
)
QWEN3_32B = dict(
    architectures=["Qwen3ForCausalLM"],
    vocab_size=151936,
    hidden_size=5120,
    intermediate_size=25600,
    num_hidden_layers=64,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    rope_theta=1000000,
    dtype="bfloat16",
)
QWEN3_8B = QWEN3_32B | dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32)
QWEN3_30B_A3B = QWEN3_32B | dict(
    architectures=["Qwen3MoeForCausalLM"],
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
)
NAMED = {"llama-3-70b": LLAMA_3_70B, "qwen3-32b": QWEN3_32B, "qwen3-8b": QWEN3_8B, "qwen3-30b-a3b": QWEN3_30B_A3B}


def planned_model(model: str, *, dtype: str, reduction_leaves: int | None, devices: int = 1) -> ModelConfig:
    """The configuration of a name in NAMED (in any case), a config.json, its folder, or a hub id, on so many devices.

    Raises ValueError for a model that this project does not run.
    """
    hf = _config_json(model)
    try:
        config = registry.configure(hf)
        config = dataclasses.replace(config, dtype=dtype_name(dtype, config.dtype))
        return config.with_leaves(reduction_leaves, devices)
    except ValueError as error:
        raise ValueError(f"{model}: {error}") from error


def _config_json(model: str) -> dict[str, Any]:
    if model.lower() in NAMED:
        return NAMED[model.lower()]
    if Path(model).is_file():
        return read_object(Path(model))
    return read_config(find_folder(model))
