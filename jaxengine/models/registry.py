"""The architectures that this project runs: a line each."""

from types import ModuleType
from typing import Any

from jaxengine.base.arguments import nearest
from jaxengine.config import ModelConfig
from jaxengine.models import llama, qwen2, qwen3, qwen3_moe

FAMILIES: dict[str, ModuleType] = {
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "Qwen2ForCausalLM": qwen2,
    "LlamaForCausalLM": llama,
}


def family(architecture: str) -> ModuleType:
    """The family file of an architecture; raises ValueError listing what is supported."""
    if architecture not in FAMILIES:
        raise ValueError(
            f"architecture {architecture!r} is not supported (supported: {', '.join(sorted(FAMILIES))})"
            f"{nearest(architecture, FAMILIES)}"
        )
    return FAMILIES[architecture]


def configure(hf: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a parsed config.json, by its first architecture."""
    architectures = hf.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise ValueError(f"names no architecture; supported: {', '.join(sorted(FAMILIES))}")
    return family(architectures[0]).configure(hf)
