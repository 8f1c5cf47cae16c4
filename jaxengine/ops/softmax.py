"""Softmax over the last axis, from sums whose order is the same for any number of rows (pallas_kernels/pinned_math.py)."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.pinned_math import exp, row_sum


def log_softmax(x: Float[Array, "... n"]) -> Float[Array, "... n"]:
    """x - log Σ exp x in float32; -inf stays -inf."""
    shifted = x - jax.lax.stop_gradient(x.max(-1, keepdims=True))
    return shifted - jnp.log(row_sum(exp(shifted)))[..., None]
