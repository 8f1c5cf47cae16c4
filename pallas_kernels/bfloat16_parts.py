"""Float32 numbers as sums of bfloat16 numbers, so that products with bfloat16 weights are exact."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def bfloat16_parts(y: Float[Array, "..."], count: int) -> list[Float[Array, "..."]]:
    """Float32 numbers that bfloat16 holds, the largest first, with y as their sum; y as it is where one is wanted."""
    if count == 1:
        return [y]
    parts = []
    for _ in range(count):
        parts.append(_as_bfloat16(y))
        y = y - parts[-1]
    return parts


def _as_bfloat16(y: Array) -> Array:
    """Rounded to even by its bits, because a compiler may fold a conversion and its inverse away."""
    bits = jax.lax.bitcast_convert_type(y, jnp.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
