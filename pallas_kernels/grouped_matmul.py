"""Matrix products of a mixture of experts: rows are sorted by expert; a row's bits do not depend on the others."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul_gpu import grouped_matmul_gpu
from pallas_kernels.grouped_matmul_reference import grouped_gradients, grouped_matmul_reference
from pallas_kernels.grouped_matmul_tpu import grouped_matmul_tpu
from pallas_kernels.implementations import Implementation, bodies
from pallas_kernels.sizes import matmul_sizes

GRADIENT_ROWS = 16  # of one dot


def each_leaf(body: Callable) -> Callable:
    """For all leaves what `body` is for one; who is in which group is the same for all."""

    def run(x, w, group_sizes, *how, **more):
        def one(x, w):
            return body(x, w, group_sizes, *how, **more)

        return one(x[0], w[0])[None] if w.shape[0] == 1 else jax.vmap(one)(x, w)

    return run


BODIES = bodies(each_leaf(grouped_matmul_reference), grouped_matmul_tpu, each_leaf(grouped_matmul_gpu))


def grouped_matmul(
    x: Float[Array, "... M K"],
    w: Float[Array, "... E N K"],
    group_sizes: Int[Array, " E"],
    *,
    implementation: Implementation,
    gated: bool = False,
    out_dtype: jnp.dtype = jnp.float32,
) -> Float[Array, "... M R"]:
    """x @ w[e].T in float32 for the `group_sizes[e]` rows of each expert e in turn, rounded once to `out_dtype`.

    x is rounded to the weights' dtype first. Rows after the last group may hold anything; their results are 0. Gated:
    the first half of an expert's N outputs are gates, and silu(gate) · up is returned, N / 2 wide; otherwise R is N.
    Leaves are products of their own, as in matmul: then x, w and the result have one more axis in front.

    Differentiable in x and w: the value is the kernel's, gradients are XLA's, visit by visit. The sum of the
    groups must not exceed M, which is not checked because it is known at run time only. Raises ValueError for shapes
    that do not fit and for weights in a dtype that the device has no sizes for.
    """
    fits = w.ndim in (3, 4) and x.ndim == w.ndim - 1 and x.shape[:-2] == w.shape[:-3] and x.shape[-1] == w.shape[-1]
    if not fits or group_sizes.shape != w.shape[-3:-2]:
        raise ValueError(
            "grouped_matmul takes x [M, K], w [E, N, K] and group_sizes [E], with leaves x [leaf, M, K] and w "
            f"[leaf, E, N, K], got {x.shape}, {w.shape} and {group_sizes.shape}"
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes must be integers, got {group_sizes.dtype}")
    parts = 2 if gated else 1
    if w.shape[-2] % parts:
        raise ValueError(f"gated weights are gates, then as many ups: N must be even, got {w.shape[-2]}")
    in_parts = w.reshape(-1, w.shape[-3], parts, w.shape[-2] // parts, w.shape[-1])
    of_leaves = x.astype(w.dtype).reshape(-1, *x.shape[-2:])
    out: Any = _grouped(implementation, jnp.dtype(out_dtype), of_leaves, in_parts, group_sizes.astype(jnp.int32))
    return out.reshape(*x.shape[:-1], out.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped(implementation: Implementation, out_dtype: jnp.dtype, x, w, group_sizes):
    *_, parts, outputs, inputs = w.shape
    sizes = matmul_sizes(implementation.device, w.dtype, outputs, inputs, parts)
    return BODIES[implementation.name](x, w, group_sizes, sizes, out_dtype)


def _forward(implementation, out_dtype, *operands):
    return _grouped(implementation, out_dtype, *operands), operands


def _backward(implementation, out_dtype, operands, cotangent):
    x, w, group_sizes = operands

    def one(x, w, cotangent):
        return grouped_gradients(x, w, group_sizes, cotangent, GRADIENT_ROWS)

    return *jax.vmap(one)(x, w, cotangent), np.zeros(group_sizes.shape, jax.dtypes.float0)


_grouped.defvjp(_forward, _backward)
