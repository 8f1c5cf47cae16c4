"""Writes tests/models/golden: tiny random models of transformers, and what it computes with them in float32 on a CPU.
Needs torch.

    pip install torch transformers
    python tests/models/make_golden.py            # every case again
    python tests/models/make_golden.py NAME …     # only these

A case is a folder as save_pretrained writes it, and expected.npz: `tokens` [B, T], `logits` [B, T, V] in float32 for
every position, and `generated` [B, N], the tokens that transformers' generate appends greedily. Most cases keep their
weights in bfloat16, half the bytes; the logits are those of these weights widened to float32, so they are read with
dtype="float32".
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
NUM_GENERATED = 8
# Between the likeliest token and the next one, of the largest logit: greedy tokens must not depend on rounding.
SMALLEST_GAP = 0.01

# Positions for which the stretched ropes were trained; the long cases go past them, and past a key tile of attention.
ORIGINAL = 48
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
WIDE = 1e-3  # an rms_norm_eps that the logits show
SHORT, LONG = (2, 30), (1, 68)  # [B, T]


def sizes(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    head_dim: int,
    vocab: int,
    **more: Any,
) -> dict[str, Any]:
    return (
        dict(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            head_dim=head_dim,
            vocab_size=vocab,
            max_position_embeddings=192,
            rms_norm_eps=1e-6,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        | more
    )


def experts(count: int, per_token: int, inner: int, **more: Any) -> dict[str, Any]:
    return dict(num_experts=count, num_experts_per_tok=per_token, moe_intermediate_size=inner) | more


# name: (settings, [B, T], dtype of the file). A name begins with its family.
CASES: dict[str, tuple[dict[str, Any], tuple[int, int], torch.dtype]] = {
    "qwen3-tied": (
        sizes(48, 48, 2, 2, 2, 32, 211, tie_word_embeddings=True, rope_parameters=PLAIN),
        SHORT,
        torch.float32,
    ),
    "qwen3-untied-group-2": (
        sizes(48, 56, 3, 4, 2, 20, 227, rms_norm_eps=WIDE, rope_parameters=PLAIN),
        SHORT,
        torch.bfloat16,
    ),
    "qwen3-bias-group-3": (
        sizes(48, 64, 2, 6, 2, 20, 229, tie_word_embeddings=True, attention_bias=True, rope_parameters=PLAIN),
        SHORT,
        torch.bfloat16,
    ),
    "qwen3-yarn-group-4": (
        sizes(48, 64, 2, 4, 1, 32, 205, tie_word_embeddings=True, rope_parameters=YARN),
        LONG,
        torch.bfloat16,
    ),
    "qwen3-linear-group-7": (sizes(56, 48, 2, 7, 1, 20, 201, rope_parameters=LINEAR), LONG, torch.bfloat16),
    "qwen2-tied-group-7": (
        sizes(56, 48, 2, 14, 2, 20, 223, tie_word_embeddings=True, rope_parameters=PLAIN),
        SHORT,
        torch.bfloat16,
    ),
    "qwen2-untied": (sizes(64, 48, 2, 4, 4, 20, 211, rms_norm_eps=WIDE, rope_parameters=PLAIN), SHORT, torch.bfloat16),
    "qwen2-group-2": (sizes(48, 48, 2, 8, 4, 20, 219, rope_parameters=PLAIN), SHORT, torch.bfloat16),
    "qwen2-yarn-attention-factor": (
        sizes(48, 64, 2, 3, 1, 40, 233, tie_word_embeddings=True, rope_parameters=YARN | {"attention_factor": 0.8}),
        LONG,
        torch.bfloat16,
    ),
    "llama-llama3-tied": (
        sizes(48, 64, 2, 4, 2, 40, 219, tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters=LLAMA3),
        LONG,
        torch.bfloat16,
    ),
    "llama-llama3-untied-group-3": (
        sizes(48, 48, 2, 12, 4, 20, 203, rms_norm_eps=1e-5, rope_parameters=LLAMA3),
        LONG,
        torch.bfloat16,
    ),
    "llama-bias-group-4": (
        sizes(
            48,
            48,
            2,
            8,
            2,
            20,
            239,
            attention_bias=True,
            rms_norm_eps=WIDE,
            rope_parameters=PLAIN | {"rope_theta": 1e4},
        ),
        SHORT,
        torch.bfloat16,
    ),
    "llama-linear-tied-group-7": (
        sizes(56, 48, 2, 7, 1, 24, 207, tie_word_embeddings=True, rope_parameters=LINEAR),
        LONG,
        torch.bfloat16,
    ),
    "llama-yarn-mscale": (
        sizes(
            48,
            64,
            2,
            2,
            2,
            20,
            211,
            rope_parameters=YARN
            | {"beta_fast": 4.0, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False},
        ),
        LONG,
        torch.bfloat16,
    ),
    "qwen3moe-3-of-6": (
        sizes(48, 96, 2, 4, 2, 20, 213, rope_parameters=PLAIN, **experts(6, 3, 24, norm_topk_prob=True)),
        SHORT,
        torch.bfloat16,
    ),
    "qwen3moe-bias-tied-1-of-4": (
        sizes(
            48,
            64,
            2,
            4,
            4,
            24,
            209,
            tie_word_embeddings=True,
            attention_bias=True,
            rope_parameters=YARN,
            **experts(4, 1, 40),
        ),
        LONG,
        torch.float32,
    ),
}


def build(family: str, settings: dict[str, Any], seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """A random model whose weights are exact in `dtype`, held in float32.

    Norms and biases are random too: ones and zeros hide mistakes.
    """
    config_class, model_class = FAMILIES[family]
    model = model_class(config_class(**settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                values = 1 + 0.3 * values
            elif parameter.ndim > 1:
                values = values * (1.0 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5)
            parameter.copy_(values.to(dtype))
    return model


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] of all positions."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


def generated(model: Any, tokens: np.ndarray) -> np.ndarray:
    """[B, N] tokens that greedy decoding appends. Raises ValueError where one of them was a near tie."""
    ids = torch.from_numpy(tokens.astype(np.int64))
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_GENERATED, do_sample=False
    ).numpy()
    chosen = logits(model, out)[:, tokens.shape[1] - 1 : -1]
    best, second = np.sort(chosen, axis=-1)[..., -1], np.sort(chosen, axis=-1)[..., -2]
    if ((best - second) / np.abs(chosen).max() < SMALLEST_GAP).any():
        raise ValueError("a near tie among the likeliest tokens: take another seed")
    return out[:, tokens.shape[1] :]


def make(name: str) -> None:
    settings, (batch, length), dtype = CASES[name]
    folder = GOLDEN / name
    for seed in range(100 * list(CASES).index(name), 100 * list(CASES).index(name) + 100):
        model = build(name.split("-")[0], settings, seed, dtype)
        tokens = np.random.default_rng(seed).integers(0, settings["vocab_size"], (batch, length))
        try:
            continuation = generated(model, tokens)
            break
        except ValueError:
            continue
    else:
        raise ValueError(f"no seed of 100 gives {name} clear greedy tokens")
    expected = logits(model, tokens)
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(
        folder / "expected.npz",
        tokens=tokens.astype(np.int32),
        logits=expected,
        generated=continuation.astype(np.int32),
    )
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: seed {seed}, {size / 1000:.0f} kB, largest logit {np.abs(expected).max():.1f}")


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        make(case)
