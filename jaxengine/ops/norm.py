"""Normalisation in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.pinned_math import row_sum


def rms_norm(x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """x / sqrt(mean(x²) + eps) · scale, in float32. Zhang and Sennrich 2019, arXiv:1910.07467."""
    x = x.astype(jnp.float32)
    mean = row_sum(x * x)[..., None] / x.shape[-1]
    return x * jax.lax.rsqrt(mean + eps) * scale.astype(jnp.float32)
