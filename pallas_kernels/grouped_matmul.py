"""Matrix products of a mixture of experts: rows are sorted by expert; a row's bits do not depend on the others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul_gpu import grouped_matmul_gpu
from pallas_kernels.grouped_matmul_reference import grouped_matmul_reference, grouped_plain
from pallas_kernels.grouped_matmul_tpu import grouped_matmul_tpu
from pallas_kernels.implementations import Implementation, bodies
from pallas_kernels.sizes import matmul_sizes

BODIES = bodies(grouped_matmul_reference, grouped_matmul_tpu, grouped_matmul_gpu)


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "E N K"],
    group_sizes: Int[Array, " E"],
    *,
    implementation: Implementation,
    gated: bool = False,
    out_dtype: jnp.dtype = jnp.float32,
) -> Float[Array, "M R"]:
    """x @ w[e].T in float32 for the `group_sizes[e]` rows of each expert e in turn, rounded once to `out_dtype`.

    x is rounded to the weights' dtype first. Rows after the last group may hold anything; their results are 0. Gated:
    the first half of an expert's N outputs are gates, and silu(gate) · up is returned, N / 2 wide; otherwise R is N.
    Differentiable in x and w: the value is the kernel's, gradients are XLA's of the same expression. The sum of the
    groups must not exceed M, which is not checked because it is known at run time only. Raises ValueError for shapes
    that do not fit and for weights in a dtype that the device has no sizes for.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[2] or group_sizes.shape != w.shape[:1]:
        raise ValueError(
            "grouped_matmul takes x [M, K], w [E, N, K] and group_sizes [E], "
            f"got {x.shape}, {w.shape} and {group_sizes.shape}"
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes must be integers, got {group_sizes.dtype}")
    parts = 2 if gated else 1
    if w.shape[1] % parts:
        raise ValueError(f"gated weights are gates, then as many ups: N must be even, got {w.shape[1]}")
    in_parts = w.reshape(w.shape[0], parts, w.shape[1] // parts, w.shape[2])
    return _grouped(implementation, jnp.dtype(out_dtype), x.astype(w.dtype), in_parts, group_sizes.astype(jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(implementation: Implementation, out_dtype: jnp.dtype, x, w, group_sizes):
    _, parts, outputs, inputs = w.shape
    sizes = matmul_sizes(implementation.device, w.dtype, outputs, inputs, parts)
    return BODIES[implementation.name](x, w, group_sizes, sizes, out_dtype)


def _forward(implementation, out_dtype, *operands):
    return _grouped(implementation, out_dtype, *operands), operands


def _backward(implementation, out_dtype, operands, cotangent):
    x, w, group_sizes = operands
    _, pullback = jax.vjp(lambda x, w: grouped_plain(x, w, group_sizes), x, w)
    return *pullback(cotangent.astype(jnp.float32)), np.zeros(group_sizes.shape, jax.dtypes.float0)


_grouped.defvjp(_forward, _backward)
