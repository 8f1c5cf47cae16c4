"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from typing import Any

from jaxengine.config import ModelConfig
from jaxengine.models.hugging_face import model_config_of

MODEL_TYPE = "qwen2"


def configure(hf: dict[str, Any]) -> ModelConfig:
    return model_config_of(hf, qkv_bias=True)


def differences(model_config: ModelConfig) -> dict[str, Any]:
    return {}
