"""Hugging Face's config.json and tensor names, in both directions.

What the families share; each family file adds its differences.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from checkpoints.key_table import Entry
from jaxengine.base.arguments import integer, items
from jaxengine.config import ModelConfig
from jaxengine.models.generation_config import end_tokens
from jaxengine.models.own_heads import different_copies
from jaxengine.models.rope_parameters import given, rope_config, rope_json

IGNORED_KEYS = ("*.rotary_emb.inv_freq",)  # buffers that old files carry
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
EXPERTS = "num_experts", "num_local_experts", "n_routed_experts"
CONFIG_KEYS = (  # of config.json, beside the rope's
    *NEEDED, "architectures", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "hidden_act",
    "mlp_bias", "attention_bias", "use_sliding_window", "layer_types", "eos_token_id", "bos_token_id", "text_config",
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
    "decoder_sparse_step", "mlp_only_layers",
)  # fmt: skip


def model_config_of(hf: dict[str, Any], **differences: Any) -> ModelConfig:
    """ModelConfig from a parsed config.json. Raises ValueError for what this decoder does not compute."""
    for key, expected in (("hidden_act", "silu"), ("mlp_bias", False), ("use_sliding_window", False)):
        if hf.get(key, expected) != expected:
            raise ValueError(f"has {key}={hf[key]!r}: this decoder computes {key}={expected!r} only")
    experts = [name for name in EXPERTS if given(hf, name, 0)]
    if experts and "num_experts" not in differences:
        raise ValueError(f"has {experts[0]}={hf[experts[0]]!r}: of this architecture no experts are computed")
    other_layers = sorted(
        set(map(str, items("layer_types", given(hf, "layer_types", ()), "a list of names"))) - {"full_attention"}
    )
    if other_layers:
        raise ValueError(f"has layer_types with {', '.join(other_layers)}: this decoder computes full_attention only")
    missing = [name for name in NEEDED if name not in hf]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    sizes = {name: integer(name, hf[name], 1) for name in NEEDED}
    heads = sizes["num_attention_heads"]
    return ModelConfig(
        architecture=hf["architectures"][0],
        **sizes,
        num_key_value_heads=given(hf, "num_key_value_heads", heads),
        head_dim=given(hf, "head_dim", sizes["hidden_size"] // heads),
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope=rope_config(hf),
        tie_word_embeddings=given(hf, "tie_word_embeddings", False),
        eos_token_ids=end_tokens(hf),
        bos_token_id=hf.get("bos_token_id"),
        dtype=said_dtype(hf) or "float32",
        **differences,
    )


def said_dtype(hf: dict[str, Any]) -> Any:
    """The dtype that config.json names, by transformers 5's key or the one before; None where it leaves it open."""
    said = hf.get("dtype") or hf.get("torch_dtype")
    return None if said == "auto" else said


def config_json(model_config: ModelConfig, model_type: str) -> dict[str, Any]:
    """config.json of a model with this configuration, as transformers reads it."""
    same = (
        *NEEDED, "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "dtype"
    )  # fmt: skip
    eos = model_config.eos_token_ids
    return {
        "architectures": [model_config.architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "rope_parameters": rope_json(model_config.rope),
        "eos_token_id": (eos[0] if len(eos) == 1 else list(eos)) if eos else None,
        **{name: getattr(model_config, name) for name in same},
    }


def key_table(model_config: ModelConfig) -> list[Entry]:
    """Where each of our leaves comes from. Our matrices pack Hugging Face's by leaf: `[leaf, N, K]`.

    A key-value head that several leaves hold is copied on the way in, and stands once on the way out.
    """
    width, h = model_config.hidden_size, model_config.head_dim
    query, key_value = model_config.num_attention_heads * h, model_config.num_key_value_heads * h
    attention = "self_attn"
    copies = 1, model_config.key_value_copies, model_config.key_value_copies
    entries = [_vocabulary(model_config, "embed", EMBEDDING)]
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
                copies,
            ),
            _inputs(model_config, f"{ours}.attention.out", f"{theirs}.{attention}.o_proj.weight", (width, query)),
            _vector(f"{ours}.post_norm", f"{theirs}.post_attention_layernorm.weight", width),
            *(_experts if model_config.num_experts else _mlp)(model_config, f"{ours}.mlp", f"{theirs}.mlp"),
        ]
        if model_config.qkv_bias:
            biases = [f"{n}.bias" for n in names]
            shapes = [(query,), (key_value,), (key_value,)]
            entries.append(_outputs(model_config, f"{ours}.attention.qkv_bias", biases, shapes, copies))
        if model_config.out_bias:
            entries.append(_vector(f"{ours}.attention.out_bias", f"{theirs}.{attention}.o_proj.bias", width))
        if model_config.qk_norm:
            entries += [_vector(f"{ours}.attention.{p}_norm", f"{theirs}.{attention}.{p}_norm.weight", h) for p in "qk"]
    entries.append(_vector("norm", "model.norm.weight", width))
    return entries if model_config.tie_word_embeddings else [*entries, _vocabulary(model_config, "head", HEAD)]


def ignored_keys(model_config: ModelConfig) -> tuple[str, ...]:
    """Keys that a file may carry without being read: a tied model's head is its embedding."""
    return (*IGNORED_KEYS, HEAD) if model_config.tie_word_embeddings else IGNORED_KEYS


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


def _mlp(model_config: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    inner, width = model_config.inner_size, model_config.hidden_size
    both = [f"{theirs}.{p}_proj.weight" for p in ("gate", "up")]
    return [
        _outputs(model_config, f"{ours}.gate_up", both, [(inner, width)] * 2),
        _inputs(model_config, f"{ours}.down", f"{theirs}.down_proj.weight", (width, inner)),
    ]


def _experts(model_config: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    """Each expert as an MLP, and stacked behind the leaves: [leaf, E, N, K]."""
    count, width = model_config.num_experts, model_config.hidden_size
    router = Entry(f"{ours}.router", (f"{theirs}.gate.weight",), ((count, width),))
    each = zip(*(_mlp(model_config, ours, f"{theirs}.experts.{expert}") for expert in range(count)), strict=True)
    return [router, *map(_stacked, each)]


def _stacked(entries: Sequence[Entry]) -> Entry:
    """Entries of one target as one, joined along a new second axis."""
    count = len(entries[0].sources)

    def pack(sources):
        parts = [entry.pack(sources[i * count : (i + 1) * count]) for i, entry in enumerate(entries)]
        return np.stack(parts, axis=1)

    def unpack(leaf):
        return [source for i, entry in enumerate(entries) for source in entry.unpack(leaf[:, i])]

    names, shapes = ([x for entry in entries for x in getattr(entry, kind)] for kind in ("sources", "shapes"))
    return Entry(entries[0].target, tuple(names), tuple(shapes), pack, unpack)


def _outputs(
    model_config: ModelConfig,
    target: str,
    sources: list[str],
    shapes: list[tuple[int, ...]],
    copies: Sequence[int] | None = None,
) -> Entry:
    """Matrices [N, K] (or biases [N]) cut along N into leaves, and joined leaf by leaf.

    `copies` says of each how many leaves hold the same part of it; None: each leaf has a part of its own.
    """
    leaves = model_config.reduction_leaves
    counts = [1] * len(sources) if copies is None else list(copies)
    edges = np.cumsum([shape[0] * count // leaves for shape, count in zip(shapes, counts, strict=True)])[:-1]

    def pack(parts):
        return np.concatenate([_cut(x, leaves, count) for x, count in zip(parts, counts, strict=True)], axis=1)

    def unpack(leaf):
        held = list(zip(np.split(leaf, edges, axis=1), counts, strict=True))
        if not all(_is_copied(part, count) for part, count in held):
            raise ValueError(f"{target}: {different_copies(model_config)}")
        return [part[::count].reshape(-1, *part.shape[2:]) for part, count in held]

    return Entry(target, tuple(sources), tuple(shapes), pack, unpack)


def _cut(x: np.ndarray, leaves: int, copies: int) -> np.ndarray:
    """[N, …] as [leaf, N · copies / leaf, …], where so many leaves after each other hold the same."""
    parts = x.reshape(leaves // copies, -1, *x.shape[1:])
    return parts if copies == 1 else parts.repeat(copies, axis=0)


def _is_copied(x: np.ndarray, copies: int) -> bool:
    """Whether so many leaves after each other hold the same bits."""
    return all(x[i::copies].tobytes() == x[::copies].tobytes() for i in range(1, copies))


def _inputs(model_config: ModelConfig, target: str, source: str, shape: tuple[int, int]) -> Entry:
    """[N, K] cut along K into leaves."""
    leaves, (n, k) = model_config.reduction_leaves, shape

    def pack(sources):
        return np.ascontiguousarray(sources[0].reshape(n, leaves, k // leaves).swapaxes(0, 1))

    def unpack(leaf):
        return (leaf.swapaxes(0, 1).reshape(n, k),)

    return Entry(target, (source,), (shape,), pack, unpack)
