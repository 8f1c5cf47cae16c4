"""Qwen3-MoE: Qwen3 with a mixture of experts in the place of every MLP, without shared experts."""

from typing import Any

from jaxengine.base.arguments import flag, integer, items
from jaxengine.config import ModelConfig
from jaxengine.models.hugging_face import given, model_config_of

MODEL_TYPE = "qwen3_moe"
NEEDED = "num_experts_per_tok", "moe_intermediate_size"


def configure(hf: dict[str, Any]) -> ModelConfig:
    """ModelConfig of a parsed config.json. Raises ValueError for layers without experts, which are not computed."""
    count = given(hf, "num_experts", hf.get("num_local_experts"))  # the second is transformers 5's name
    missing = [name for name in NEEDED if name not in hf] + ([] if count else ["num_experts"])
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    step, dense = (
        given(hf, "decoder_sparse_step", 1),
        items("mlp_only_layers", given(hf, "mlp_only_layers", ()), "numbers"),
    )
    if step != 1 or list(dense):
        raise ValueError(
            f"has decoder_sparse_step={step!r} and mlp_only_layers={list(dense)!r}: this decoder computes experts in "
            "every layer only"
        )
    biased = flag("attention_bias", given(hf, "attention_bias", False))
    sizes = {name: integer(name, hf[name], 1) for name in NEEDED}
    return model_config_of(
        hf,
        qk_norm=True,
        qkv_bias=biased,
        out_bias=biased,
        num_experts=count,
        norm_topk_prob=flag("norm_topk_prob", given(hf, "norm_topk_prob", False)),
        **sizes,
    )


def differences(model_config: ModelConfig) -> dict[str, Any]:
    """What this family's config.json says beside what all families' say."""
    same = "num_experts", *NEEDED, "norm_topk_prob"
    of_experts = {name: getattr(model_config, name) for name in same}
    return of_experts | {"attention_bias": model_config.qkv_bias, "decoder_sparse_step": 1, "mlp_only_layers": []}
