"""The matrix product's twin in plain XLA, and the arithmetic that all bodies share."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.pinned_math import silu
from pallas_kernels.sizes import MatmulSizes
from pallas_kernels.tiles import by_tiles


def dot(x: Float[Array, "m k"], w: Float[Array, "n k"]) -> Float[Array, "m n"]:
    """x @ w.T with float32 sums. Float32 weights take full precision, on every device."""
    precision = jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision, jnp.float32)


def finish(sums: list[Array], bias: list[Array], residual: Array | None) -> Float[Array, "m n"]:
    """What follows the sum over K, in float32: the bias, then silu(gate) · up if there are two parts, then the
    residual."""
    sums = [s + b.astype(jnp.float32) for s, b in zip(sums, bias, strict=True)] if bias else sums
    y = silu(sums[0]) * sums[1] if len(sums) == 2 else sums[0]
    return y if residual is None else residual.astype(jnp.float32) + y


def plain(
    x: Float[Array, "M K"],
    w: Float[Array, "parts N K"],
    bias: Float[Array, "parts N"] | None,
    residual: Float[Array, "M N"] | None,
) -> Float[Array, "M N"]:
    """The product in one piece, added along K in whatever order XLA takes. Gradients come from here."""
    sums = jnp.split(dot(x, w.reshape(-1, w.shape[-1])), w.shape[0], axis=1)
    return finish(sums, [] if bias is None else [b[None] for b in bias], residual)


def matmul_reference(
    x: Float[Array, "M K"],
    w: Float[Array, "parts N K"],
    bias: Float[Array, "parts N"] | None,
    residual: Float[Array, "M N"] | None,
    sizes: MatmulSizes,
    out_dtype: jnp.dtype,
) -> Float[Array, "M N"]:
    """The product by tiles of rows, each tile's sum over K in one dot."""

    def body(x, residual=None):
        return plain(x, w, bias, residual).astype(out_dtype)

    return by_tiles(body, sizes.rows, x, *([] if residual is None else [residual]))
