"""Matrix products with weights `[leaf, N, K]`: outputs by rows, as Hugging Face stores them and as a CPU reads them
fastest.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sharding.leaves import spread, tree_sum


def dot(x: Float[Array, "leaf t K"], w: Float[Array, "leaf N K"]) -> Float[Array, "leaf t N"]:
    """One dot per leaf at one shape, accumulated in float32.

    A float32 weight asks for full precision, on every device.
    """
    precision = jax.lax.Precision.HIGHEST if w.dtype == jnp.float32 else None
    numbers = (((2,), (2,)), ((0,), (0,)))
    if w.shape[0] > 1:
        return jax.lax.dot_general(x.astype(w.dtype), w, numbers, precision, jnp.float32)
    return jax.lax.dot_general(x[0].astype(w.dtype), w[0], (((1,), (1,)), ((), ())), precision, jnp.float32)[None]


def split_outputs(x: Float[Array, "t K"], w: Float[Array, "leaf N K"]) -> Float[Array, "leaf t N"]:
    """x @ w.T for every leaf's outputs."""
    return dot(spread(x, w.shape[0]), w)


def join_leaves(outputs: Float[Array, "leaf t N"]) -> Float[Array, "t leaf*N"]:
    """Each row's outputs of all leaves, one leaf after another."""
    return outputs.swapaxes(0, 1).reshape(outputs.shape[1], -1)


def with_bias(y: Float[Array, "t N"], bias: Float[Array, "..."] | None) -> Float[Array, "t N"]:
    """Each row with the bias added, in float32; as it is where there is none. The bias' values are N in all.

    Its gradient is the sum of the rows' by a tree, because the order of XLA's own reduction follows how many outputs a
    device has.
    """
    return y if bias is None else _with_bias(y, bias.astype(jnp.float32).reshape(-1))


def _over_rows(cotangent: Float[Array, "t N"]) -> Float[Array, " N"]:
    size = 1 << max(cotangent.shape[0] - 1, 1).bit_length()
    return tree_sum(jnp.pad(cotangent, ((0, size - cotangent.shape[0]), (0, 0))))


_with_bias: Any = jax.custom_vjp(lambda y, bias: y + bias)
_with_bias.defvjp(lambda y, bias: (y + bias, None), lambda _, cotangent: (cotangent, _over_rows(cotangent)))


def by_leaf(rows: Float[Array, "t leaf*K"], leaves: int) -> Float[Array, "leaf t K"]:
    """Each leaf's own columns of the rows."""
    return rows.reshape(rows.shape[0], leaves, -1).swapaxes(0, 1)
