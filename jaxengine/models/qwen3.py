"""Qwen3: norms on queries and keys, biases only where the configuration asks for them."""

from typing import Any

from jaxengine.base.arguments import flag
from jaxengine.config import ModelConfig
from jaxengine.models.hugging_face import given, model_config_of

MODEL_TYPE = "qwen3"


def configure(hf: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a parsed config.json."""
    biased = flag("attention_bias", given(hf, "attention_bias", False))
    hf = {"head_dim": 128} | hf  # transformers' default, whatever the hidden size
    return model_config_of(hf, qk_norm=True, qkv_bias=biased, out_bias=biased)


def differences(model_config: ModelConfig) -> dict[str, Any]:
    """What this family's config.json says beside what all families' say."""
    return {"attention_bias": model_config.qkv_bias}
