"""Products of rows with weights, by the matrix product's TPU body. x has the weights' dtype."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.matmul_tpu import matmul_tpu, sum_of_leaves_tpu, sum_of_parts_tpu
from pallas_kernels.sizes import matmul_sizes


def outputs(
    x: Float[Array, "M K"],
    w: Float[Array, "N K"],
    device: str,
    live: Int[Array, ""] | None = None,
    *,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """x @ w.T."""
    sizes, dtype = matmul_sizes(device, w.dtype, *w.shape), jnp.dtype(jnp.float32)
    return matmul_tpu(x, w[None, None], None, None, sizes, dtype, live=live, interpret=interpret)[0]


def finished(
    x: Float[Array, "P M K"], w: Float[Array, "N K"], device: str, *, interpret: Any = False
) -> Float[Array, "M N"]:
    """Σ_p x[p] @ w.T, the last part's product first, so that the smallest numbers come first: the head."""
    return sum_of_parts_tpu(x, w, matmul_sizes(device, w.dtype, *w.shape), None, interpret=interpret)


def summed(
    x: Float[Array, "M leaf*K"],
    w: Float[Array, "leaf N K"],
    device: str,
    live: Int[Array, ""] | None = None,
    *,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """The sum of each leaf's own columns of x times its w, by the tree."""
    own = x.reshape(x.shape[0], w.shape[0], -1).swapaxes(0, 1)
    return sum_of_leaves_tpu(own, w, matmul_sizes(device, w.dtype, *w.shape[1:]), live, interpret=interpret)


def gated(
    x: Float[Array, "M K"],
    w: Float[Array, "leaf F2 K"],
    device: str,
    live: Int[Array, ""] | None = None,
    *,
    interpret: Any = False,
) -> Float[Array, "M leaf*F"]:
    """silu(gate) · up in the weights' dtype, by leaves' columns. A leaf has its gates, then its ups."""
    leaves, both, inputs = w.shape
    sizes = matmul_sizes(device, w.dtype, both // 2, inputs, 2)
    y = matmul_tpu(x, w.reshape(leaves, 2, -1, inputs), None, None, sizes, w.dtype, live=live, interpret=interpret)
    return y.swapaxes(0, 1).reshape(x.shape[0], -1)
