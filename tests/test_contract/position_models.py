"""Two models made by hand whose outputs say which positions attention read. One layer, one head, no MLP.

Rotations are made negligible, not switched off: `theta` 1 gives every pair of dimensions the same frequency, and the
linear stretch divides it by 10^9, so that the angle at position 40,000 is 4e-5.
"""

import jax.numpy as jnp
import numpy as np

from jaxengine.config import ModelConfig, RopeConfig
from jaxengine.models.params import Decoder, map_declared

STILL = RopeConfig(theta=1.0, kind="linear", factor=1e9)
BITS = 16  # of a token's code
SHARP = 80.0  # a key that differs in one bit of its code has e^-40 of the weight
CLASSES = 14  # of tokens that the counting model tells apart
UNIT, BLANK = CLASSES, CLASSES + 1  # its tokens whose logits are the yardstick: those of a count of 1 in 1, and of 0
GAIN = 4.0


def model(vocab: int, width: int, head_dim: int, length: int, dtype: str) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=length,
        rope=STILL,
        dtype=dtype,
    )


def filled(config: ModelConfig, **arrays: np.ndarray) -> Decoder:
    """Parameters with the given arrays by the last word of their path, zeros elsewhere; norms are ones unless given."""

    def value(path, declared):
        name = path.split(".")[-1]
        start = np.ones if declared.init == "ones" else np.zeros
        whole = start(declared.shape, config.dtype)
        if name in arrays:
            rows = arrays[name]
            whole.reshape(-1, *rows.shape[1:])[: len(rows)] = rows
        return jnp.array(whole)

    return map_declared(value, config)


def needle(targets: np.ndarray, length: int, dtype: str) -> tuple[ModelConfig, Decoder]:
    """Token v looks for token `targets[v]`, and the likeliest token at each position is the one that it attended to.

    A token's code is its number in bits, ±1. The stream holds three codes: the token's own (key and value), that of its
    target (query), and after attention that of the token attended to, which is all that the head reads.
    """
    code = 2.0 * (np.arange(len(targets))[:, None] >> np.arange(BITS) & 1) - 1
    none, eye = np.zeros_like(code), np.eye(BITS)
    own, target, found = np.split(np.eye(3 * BITS), 3)
    config = model(len(targets), 3 * BITS, BITS, length, dtype)
    return config, filled(
        config,
        embed=np.hstack([code, code[targets], none]),
        head=np.hstack([none, none, code]),
        qkv=np.vstack([SHARP * target, own, own]),
        out=found.T @ eye,
        input_norm=np.full(3 * BITS, (2 / 3) ** 0.5),
    )


def counting(length: int) -> tuple[ModelConfig, Decoder]:
    """All queries are 0, so attention is the mean over all that it reads: the share of each class of tokens.

    The stream holds 1, the shares (× GAIN), and the token's own class. `counts` reads them from the logprobs. Only
    float32 tells a share from its neighbour.
    """
    width, eye = 2 * CLASSES + 1, np.eye(CLASSES)
    embed = np.zeros((CLASSES + 2, width))
    embed[:, 0], embed[:CLASSES, 1 + CLASSES :] = 1, eye
    head = np.vstack([np.eye(width)[1 : 1 + CLASSES], np.eye(width)[:1], np.zeros((1, width))])
    qkv, out = np.zeros((3 * CLASSES, width)), np.zeros((width, CLASSES))
    qkv[2 * CLASSES :, 1 + CLASSES :], out[1 : 1 + CLASSES] = eye, GAIN * eye
    config = model(CLASSES + 2, width, CLASSES, length, "float32")
    return config, filled(
        config, embed=embed, head=head, qkv=qkv, out=out, input_norm=np.full(width, (2 / width) ** 0.5)
    )


def counts(entry: dict, num_tokens: int) -> np.ndarray:
    """How many tokens of each class attention read, from the logprobs of all tokens after `num_tokens`."""
    logprobs = np.array([entry[token].logprob for token in range(CLASSES + 2)], np.float64)
    shares = (logprobs[:CLASSES] - logprobs[BLANK]) / (logprobs[UNIT] - logprobs[BLANK])
    return shares * num_tokens / GAIN
