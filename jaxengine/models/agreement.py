"""A config.json held against the tensors beside it: what the file holds counts, and every difference is said.

As in transformers 5 and vLLM for a tied flag beside another head; the same for the dtype.
"""

import logging
from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from checkpoints.safetensors_files import TensorFolder
from jaxengine.config import ModelConfig
from jaxengine.models.hugging_face import EMBEDDING, HEAD, IGNORED_KEYS

log = logging.getLogger("jaxengine")
ROWS = 1 << 12  # of two tables that are compared at once


def tied_as_the_file(said: Any, tensors: TensorFolder) -> bool:
    """Whether the output head is the embedding, where config.json says `said` (None: nothing) of tie_word_embeddings.

    A head in the file that is not the embedding is used, and logged where the flag says that there is none. A head that
    is missing is the embedding only where the flag does not say otherwise: it may have been lost, which `load` refuses.
    """
    if said and heads_differ(tensors):
        log.warning(
            "%s: config.json says that tie_word_embeddings is true, and the file has another %s than %s: the file's "
            "is used. hf_overrides={'tie_word_embeddings': False}, or false in config.json, says the same",
            tensors.path,
            HEAD,
            EMBEDDING,
        )
        return False
    return HEAD not in tensors.names if said is None else said


def heads_differ(tensors: TensorFolder) -> bool:
    """Whether the file has both tables and they differ."""
    if not {EMBEDDING, HEAD} <= set(tensors.names):
        return False
    return differ(tensors.read(EMBEDDING), tensors.read(HEAD))


def differ(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two tables differ in shape or, as float32, in a bit; some rows of each are looked at together."""
    if a.shape != b.shape:
        return True
    starts = range(0, len(a), ROWS)
    return any(_bits(a[start : start + ROWS]) != _bits(b[start : start + ROWS]) for start in starts)


def _bits(rows: np.ndarray) -> bytes:
    return rows.astype(np.float32).tobytes()


def dtype_of_the_file(said: Any, tensors: TensorFolder) -> str:
    """The dtype that most numbers of the file have: what "auto" means. Logs where config.json says another (`said`),
    and where tensors of other dtypes are rounded or widened to it.
    """
    names = [name for name in tensors.names if not any(fnmatchcase(name, pattern) for pattern in IGNORED_KEYS)]
    counts: Counter[str] = Counter()
    for name in names:
        counts[tensors.dtype(name).name] += int(np.prod(tensors.shape(name), dtype=np.int64))
    found = counts.most_common(1)[0][0]
    if said is not None and said != found:
        log.warning(
            "%s: config.json says that dtype is %s, and the file holds %s, which is used: dtype=%r converts it",
            tensors.path,
            said,
            found,
            said,
        )
    others = [name for name in names if tensors.dtype(name).name != found]
    if others:
        log.warning(
            "%s: %d of %d tensors become %s, as most are: %s is %s in the file",
            tensors.path,
            len(others),
            len(names),
            found,
            others[0],
            tensors.dtype(others[0]).name,
        )
    return found


def log_plain_weights(quantization: Any, tensors: TensorFolder) -> None:
    """Log a quantization_config that nothing in the file bears out: no packed dtype opens, so its tensors are plain."""
    if quantization:
        log.warning(
            "%s: config.json has a quantization_config, and the file's tensors are plain numbers, which are used as "
            "they are",
            tensors.path,
        )


def differing_sizes(model_config: ModelConfig, tensors: TensorFolder) -> list[str]:
    """Lines that name what of config.json the shapes of the file speak against, to stand below the shapes."""
    held = _sizes_held(tensors)
    heads, groups, h = model_config.num_attention_heads, model_config.num_key_value_heads, model_config.head_dim
    said = {
        **{name: getattr(model_config, name) for name in _PLAIN_SIZES},
        "num_attention_heads * head_dim": heads * h,
        "num_key_value_heads * head_dim": groups * h,
        "attention_bias": model_config.qkv_bias,
    }
    lines = [
        f"config.json says {name}={said[name]}, the file {held[name]}" for name in held if held[name] != said[name]
    ]
    if not model_config.tie_word_embeddings and HEAD not in tensors.names:
        lines.append(
            f"config.json says tie_word_embeddings=False, the file has no {HEAD}: if the embedding is the head, give "
            "hf_overrides={'tie_word_embeddings': True}"
        )
    return lines


_PLAIN_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_experts", "num_hidden_layers",
    "head_dim",
)  # fmt: skip


def _sizes_held(tensors: TensorFolder) -> dict[str, Any]:
    layers = [name.split(".")[2] for name in tensors.names if name.startswith("model.layers.")]
    first = "model.layers.0."
    places = {
        "vocab_size": (EMBEDDING, 0),
        "hidden_size": (EMBEDDING, -1),
        "intermediate_size": (f"{first}mlp.gate_proj.weight", 0),
        "num_experts": (f"{first}mlp.gate.weight", 0),
        "moe_intermediate_size": (f"{first}mlp.experts.0.gate_proj.weight", 0),
        "num_attention_heads * head_dim": (f"{first}self_attn.q_proj.weight", 0),
        "num_key_value_heads * head_dim": (f"{first}self_attn.k_proj.weight", 0),
        "head_dim": (f"{first}self_attn.q_norm.weight", 0),
    }
    names = set(tensors.names)
    held: dict[str, Any] = {
        key: tensors.shape(name)[axis] for key, (name, axis) in places.items() if name in names and tensors.shape(name)
    }
    if layers:
        held["num_hidden_layers"] = 1 + max((int(layer) for layer in layers if layer.isdecimal()), default=0)
        held["attention_bias"] = f"{first}self_attn.q_proj.bias" in names
    return held
