"""The rotary embedding in config.json, under its old names and transformers 5's, read and written."""

import math
from typing import Any

from jaxengine.base.arguments import flag, integer, nearest, real
from jaxengine.config import RopeConfig

ROPE_KINDS = ("default", "linear", "llama3", "yarn")
BESIDE = ("rope_theta", "original_max_position_embeddings", "partial_rotary_factor")  # also said outside the object
ROPE_KEYS = (
    *BESIDE, "rope_type", "type", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
    "attention_factor", "mscale", "mscale_all_dim", "truncate",
)  # fmt: skip


def given(hf: dict[str, Any], key: str, default: Any) -> Any:
    """What a configuration says, or the default where it says nothing or null."""
    return default if hf.get(key) is None else hf[key]


def rope_parameters(hf: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the rope, in one object with transformers 5's names.

    Raises ValueError where it says it twice and differently, or of each kind of layer apart.
    """
    new, old = given(hf, "rope_parameters", {}), given(hf, "rope_scaling", {})
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, dict):
            raise ValueError(f"{key} must be an object or null, got {value!r:.80}")
    if new and old and new != old:
        raise ValueError(f"has rope_parameters={new} and rope_scaling={old}: keep one of them")
    found = dict(new or old)
    if any(isinstance(value, dict) for value in found.values()):
        raise ValueError(
            f"gives each kind of layer a rope of its own ({', '.join(found)}): this decoder has one for all"
        )
    kind = found.pop("type", None)
    found["rope_type"] = found.get("rope_type") or kind or "default"
    for key in BESIDE:
        # As in transformers: the original context that stands beside the object counts, of the others those inside.
        inside, beside = found.pop(key, None), hf.get(key)
        said = beside or inside if key == "original_max_position_embeddings" else beside if inside is None else inside
        if said is not None:
            found[key] = said
    return found


def rope_config(hf: dict[str, Any]) -> RopeConfig:
    """RopeConfig of a config.json. Raises ValueError for a kind of rope that this decoder does not compute."""
    scaling = rope_parameters(hf)
    kind = scaling["rope_type"]
    if kind not in ROPE_KINDS:
        raise ValueError(
            f"rope type {kind!r} is not supported (supported: {', '.join(ROPE_KINDS)}){nearest(str(kind), ROPE_KINDS)}"
        )
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is not supported")

    def number(name: str, default: float) -> float:
        return real(name, given(scaling, name, default), 0.0, open_low=True)

    theta, length = number("rope_theta", 10_000.0), hf["max_position_embeddings"]
    original = integer("original_max_position_embeddings", scaling.get("original_max_position_embeddings", length), 1)
    factor = number("factor", length / original)
    return RopeConfig(
        theta,
        kind,
        factor if kind != "default" else 1.0,
        original if kind in ("llama3", "yarn") else 0,
        low_freq_factor=number("low_freq_factor", 1.0),
        high_freq_factor=number("high_freq_factor", 4.0),
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(scaling, factor) if kind == "yarn" else 1.0,
        truncate=flag("truncate", given(scaling, "truncate", True)),
    )


def _yarn_attention_factor(scaling: dict[str, Any], factor: float) -> float:
    """How much yarn scales the rotations. Peng et al. 2023, arXiv:2309.00071, equation 22."""
    if scaling.get("attention_factor") is not None:
        return real("attention_factor", scaling["attention_factor"], 0.0, open_low=True)

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = (real(name, given(scaling, name, 0.0), 0.0) for name in ("mscale", "mscale_all_dim"))
    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)


def rope_json(rope: RopeConfig) -> dict[str, Any]:
    """The object `rope_parameters` that says this rope."""
    parameters: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": rope.kind}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.kind == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        parameters |= {name: getattr(rope, name) for name in ("beta_fast", "beta_slow", "attention_factor", "truncate")}
    return parameters
