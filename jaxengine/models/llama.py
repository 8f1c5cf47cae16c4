"""Llama 3.x: no norms on heads; biases only where the configuration asks for them."""

from typing import Any

from jaxengine.base.arguments import flag
from jaxengine.config import ModelConfig
from jaxengine.models.hugging_face import given, model_config_of

MODEL_TYPE = "llama"


def configure(hf: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a parsed config.json."""
    biased = flag("attention_bias", given(hf, "attention_bias", False))
    return model_config_of(hf, qkv_bias=biased, out_bias=biased)


def differences(model_config: ModelConfig) -> dict[str, Any]:
    """What this family's config.json says beside what all families' say."""
    return {"attention_bias": model_config.qkv_bias, "mlp_bias": False}
