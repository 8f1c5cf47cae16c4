"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from typing import Any

from jaxengine.config import ModelConfig
from jaxengine.models.hugging_face import model_config_of

MODEL_TYPE = "qwen2"


def configure(hf: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a parsed config.json."""
    return model_config_of(hf, qkv_bias=True)


def differences(model_config: ModelConfig) -> dict[str, Any]:
    """What this family's config.json says beside what all families' say."""
    return {}
