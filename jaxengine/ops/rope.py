"""Rotary position embedding and the ways in which it is stretched, as Hugging Face's configurations name them."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxengine.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Angle per position of each pair of dimensions, in radians, float32 `[h / 2]`."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    plain = (1.0 / rope.theta**exponent).astype(np.float32)
    if rope.kind == "linear":
        plain = plain / np.float32(rope.factor)
    elif rope.kind == "llama3":
        plain = _llama3(rope, plain)
    elif rope.kind == "yarn":
        plain = _yarn(rope, plain, head_dim)
    elif rope.kind != "default":
        raise KeyError(rope.kind)
    return plain.astype(np.float32)


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Long wavelengths divided by factor, short ones kept, a ramp between. Llama 3.1, Meta 2024."""
    wavelength = 2 * math.pi / plain
    turns = rope.original_max_position_embeddings / wavelength
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    ramp = np.clip(ramp, 0.0, 1.0)
    return (1 - ramp) * plain / rope.factor + ramp * plain


def _yarn(rope: RopeConfig, plain: np.ndarray, head_dim: int) -> np.ndarray:
    """Interpolation by parts. Peng et al. 2023, arXiv:2309.00071, section 3.2."""

    def dimension(rotations: float) -> float:
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001  # high < low is as in transformers
    ramp = np.clip((np.arange(head_dim // 2) - low) / width, 0.0, 1.0)
    return plain / rope.factor * ramp + plain * (1 - ramp)


def cos_sin(
    positions: Int[Array, " t"], rope: RopeConfig, head_dim: int
) -> tuple[Float[Array, "t 1 half"], Float[Array, "t 1 half"]]:
    """Cosine and sine of each position's angles, with yarn's attention factor."""
    angles = positions.astype(jnp.float32)[:, None, None] * inverse_frequencies(rope, head_dim)
    return jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor


def rotate(
    x: Float[Array, "t heads h"], cos: Float[Array, "t 1 half"], sin: Float[Array, "t 1 half"]
) -> Float[Array, "t heads h"]:
    """Rotate the pairs (x[i], x[i + h/2]). Su et al. 2021, arXiv:2104.09864, in the half-split form of GPT-NeoX."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
