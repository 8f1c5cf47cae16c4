"""Hugging Face's config.json and tensor names, in both directions.

What the families share; each family file adds its differences.
"""

import math
from typing import Any

import numpy as np

from checkpoints.key_table import Entry
from jaxengine.base.arguments import flag, integer, items, nearest, real
from jaxengine.config import ModelConfig, RopeConfig

IGNORED_KEYS = ("*.rotary_emb.inv_freq",)  # buffers that old files carry
ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def model_config_of(hf: dict[str, Any], **differences: Any) -> ModelConfig:
    """ModelConfig from a parsed config.json. Raises ValueError for what this decoder does not compute."""
    for key, expected in (("hidden_act", "silu"), ("mlp_bias", False), ("use_sliding_window", False)):
        if hf.get(key, expected) != expected:
            raise ValueError(f"has {key}={hf[key]!r}: this decoder computes {key}={expected!r} only")
    other_layers = sorted(
        set(map(str, items("layer_types", given(hf, "layer_types", ()), "a list of names"))) - {"full_attention"}
    )
    if other_layers:
        raise ValueError(f"has layer_types with {', '.join(other_layers)}: this decoder computes full_attention only")
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
    missing = [name for name in names if name not in hf]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    sizes = {name: integer(name, hf[name], 1) for name in names}
    heads = sizes["num_attention_heads"]
    return ModelConfig(
        architecture=hf["architectures"][0],
        **sizes,
        num_key_value_heads=given(hf, "num_key_value_heads", heads),
        head_dim=given(hf, "head_dim", sizes["hidden_size"] // heads),
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope=rope_config(hf),
        tie_word_embeddings=given(hf, "tie_word_embeddings", False),
        eos_token_ids=end_tokens(hf.get("eos_token_id")),
        bos_token_id=hf.get("bos_token_id"),
        dtype=hf.get("dtype") or hf.get("torch_dtype") or "float32",
        **differences,
    )


def given(hf: dict[str, Any], key: str, default: Any) -> Any:
    """What a configuration says, or the default where it says nothing or null."""
    return default if hf.get(key) is None else hf[key]


def end_tokens(eos_token_id: Any) -> tuple[int, ...]:
    """The end tokens that config.json or generation_config.json names: none, one or a list."""
    if eos_token_id is None:
        return ()
    tokens = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    return tuple(integer("eos_token_id", token, 0) for token in tokens)


def rope_config(hf: dict[str, Any]) -> RopeConfig:
    """RopeConfig from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    scaling = _rope_parameters(hf)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ValueError(
            f"rope type {kind!r} is not supported (supported: {', '.join(ROPE_KINDS)}){nearest(str(kind), ROPE_KINDS)}"
        )
    if scaling.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is not supported")

    def number(name: str, default: float) -> float:
        return real(name, given(scaling, name, default), 0.0, open_low=True)

    theta, length = number("rope_theta", given(hf, "rope_theta", 10_000.0)), hf["max_position_embeddings"]
    # In this order, as in transformers: some configurations name the number beside the rope's parameters.
    original = hf.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings") or length
    original = integer("original_max_position_embeddings", original, 1)
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


def _rope_parameters(hf: dict[str, Any]) -> dict[str, Any]:
    new, old = given(hf, "rope_parameters", {}), given(hf, "rope_scaling", {})
    for key, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, dict):
            raise ValueError(f"{key} must be an object or null, got {value!r:.80}")
    if new and old and new != old:
        raise ValueError(f"has rope_parameters={new} and rope_scaling={old}: keep one of them")
    found = new or old
    if any(isinstance(value, dict) for value in found.values()):
        raise ValueError(
            f"gives each kind of layer a rope of its own ({', '.join(found)}): this decoder has one for all"
        )
    return found


def _yarn_attention_factor(scaling: dict[str, Any], factor: float) -> float:
    """How much yarn scales the rotations. Peng et al. 2023, arXiv:2309.00071, equation 22."""
    if scaling.get("attention_factor") is not None:
        return real("attention_factor", scaling["attention_factor"], 0.0, open_low=True)

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = (real(name, given(scaling, name, 0.0), 0.0) for name in ("mscale", "mscale_all_dim"))
    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)


def config_json(model_config: ModelConfig, model_type: str) -> dict[str, Any]:
    """config.json of a model with this configuration, as transformers reads it."""
    rope = model_config.rope
    parameters: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": rope.kind}
    if rope.kind != "default":
        parameters["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        parameters["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.kind == "llama3":
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        parameters |= {name: getattr(rope, name) for name in ("beta_fast", "beta_slow", "attention_factor", "truncate")}
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "bos_token_id",
        "dtype",
    )
    eos = model_config.eos_token_ids
    return {
        "architectures": [model_config.architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "rope_parameters": parameters,
        "eos_token_id": (eos[0] if len(eos) == 1 else list(eos)) if eos else None,
        **{name: getattr(model_config, name) for name in same},
    }


def key_table(model_config: ModelConfig) -> list[Entry]:
    """Where each of our leaves comes from. Our matrices pack Hugging Face's by leaf: `[leaf, N, K]`."""
    width, h = model_config.hidden_size, model_config.head_dim
    query, key_value = model_config.num_attention_heads * h, model_config.num_key_value_heads * h
    attention, mlp = "self_attn", model_config.intermediate_size
    entries = [_vocabulary(model_config, "embed", "model.embed_tokens.weight")]
    for i in range(model_config.num_hidden_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        names = [f"{theirs}.{attention}.{p}_proj" for p in "qkv"]
        entries += [
            _vector(f"{ours}.input_norm", f"{theirs}.input_layernorm.weight", width),
            _outputs(
                model_config,
                f"{ours}.attention.qkv",
                [f"{n}.weight" for n in names],
                [(n, width) for n in (query, key_value, key_value)],
            ),
            _inputs(model_config, f"{ours}.attention.out", f"{theirs}.{attention}.o_proj.weight", (width, query)),
            _vector(f"{ours}.post_norm", f"{theirs}.post_attention_layernorm.weight", width),
            _outputs(
                model_config,
                f"{ours}.mlp.gate_up",
                [f"{theirs}.mlp.{p}_proj.weight" for p in ("gate", "up")],
                [(mlp, width)] * 2,
            ),
            _inputs(model_config, f"{ours}.mlp.down", f"{theirs}.mlp.down_proj.weight", (width, mlp)),
        ]
        if model_config.qkv_bias:
            biases = [f"{n}.bias" for n in names]
            entries.append(
                _outputs(model_config, f"{ours}.attention.qkv_bias", biases, [(query,), (key_value,), (key_value,)])
            )
        if model_config.out_bias:
            entries.append(_vector(f"{ours}.attention.out_bias", f"{theirs}.{attention}.o_proj.bias", width))
        if model_config.qk_norm:
            entries += [_vector(f"{ours}.attention.{p}_norm", f"{theirs}.{attention}.{p}_norm.weight", h) for p in "qk"]
    entries.append(_vector("norm", "model.norm.weight", width))
    return (
        entries if model_config.tie_word_embeddings else [*entries, _vocabulary(model_config, "head", "lm_head.weight")]
    )


def ignored_keys(model_config: ModelConfig) -> tuple[str, ...]:
    """Keys that a file may carry without being read: a tied model's head is its embedding."""
    return (*IGNORED_KEYS, "lm_head.weight") if model_config.tie_word_embeddings else IGNORED_KEYS


def _vector(target: str, source: str, size: int) -> Entry:
    return Entry(target, (source,), ((size,),))


def _vocabulary(model_config: ModelConfig, target: str, source: str) -> Entry:
    """[V, D] padded with zero rows, then cut into leaves."""
    size, padded, width = model_config.vocab_size, model_config.padded_vocab_size, model_config.hidden_size

    def pack(sources):
        out = np.zeros((padded, width), sources[0].dtype)
        out[:size] = sources[0]
        return out.reshape(model_config.reduction_leaves, -1, width)

    def unpack(leaf):
        return (leaf.reshape(-1, width)[:size],)

    return Entry(target, (source,), ((size, width),), pack, unpack)


def _outputs(model_config: ModelConfig, target: str, sources: list[str], shapes: list[tuple[int, ...]]) -> Entry:
    """Matrices [N, K] (or biases [N]) cut along N into leaves, and joined leaf by leaf."""
    leaves = model_config.reduction_leaves
    edges = np.cumsum([shape[0] // leaves for shape in shapes])[:-1]

    def pack(parts):
        return np.concatenate([x.reshape(leaves, x.shape[0] // leaves, *x.shape[1:]) for x in parts], axis=1)

    def unpack(leaf):
        return [part.reshape(-1, *part.shape[2:]) for part in np.split(leaf, edges, axis=1)]

    return Entry(target, tuple(sources), tuple(shapes), pack, unpack)


def _inputs(model_config: ModelConfig, target: str, source: str, shape: tuple[int, int]) -> Entry:
    """[N, K] cut along K into leaves."""
    leaves, (n, k) = model_config.reduction_leaves, shape

    def pack(sources):
        return np.ascontiguousarray(sources[0].reshape(n, leaves, k // leaves).swapaxes(0, 1))

    def unpack(leaf):
        return (leaf.swapaxes(0, 1).reshape(n, k),)

    return Entry(target, (source,), (shape,), pack, unpack)
