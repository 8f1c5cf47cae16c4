"""Shared by the tests of this folder: this project's own forward pass over whole sequences, and how far two logits are
apart.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxengine.config import ModelConfig
from jaxengine.device.trunk import hidden_states
from jaxengine.models import decoder
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import XLA
from jaxengine.ops.tiles import WIDE


@functools.partial(jax.jit, static_argnames="config")
def _logits(config: ModelConfig, params: Decoder, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    x = hidden_states(config, XLA, params, tokens, jnp.full(tokens.shape[0], tokens.shape[1]), WIDE)
    head = params.output_head
    rows = decoder.logits(config, XLA, params.norm, head, x.reshape(-1, config.hidden_size))
    return rows.reshape(*tokens.shape, -1)[..., : config.vocab_size]


def model_logits(config: ModelConfig, params: Decoder, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] of all positions of tokens [B, T]."""
    return np.asarray(_logits(config, params, jnp.asarray(tokens)))


def largest_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of a position's logits, relative to the largest logit of that position: the worst position
    counts.
    """
    assert found.shape == expected.shape and np.isfinite(found).all()
    return float((np.abs(found - expected).max(-1) / np.abs(expected).max(-1)).max())
