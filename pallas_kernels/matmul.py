"""Matrix products with one fixed order along K for any number of rows: a row's bits depend on it and the weights
alone."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.implementations import Implementation, bodies
from pallas_kernels.matmul_gpu import matmul_gpu
from pallas_kernels.matmul_reference import matmul_reference, plain
from pallas_kernels.matmul_tpu import matmul_tpu
from pallas_kernels.sizes import matmul_sizes


def matmul(
    x: Float[Array, "... M K"],
    w: Float[Array, "... N K"],
    *,
    implementation: Implementation,
    bias: Float[Array, "... N"] | None = None,
    residual: Float[Array, "... M R"] | None = None,
    gated: bool = False,
    out_dtype: jnp.dtype = jnp.float32,
) -> Float[Array, "... M R"]:
    """residual + (x @ w.T + bias) in float32, rounded once to `out_dtype`. x is rounded to the weights' dtype first.

    Gated: the first half of the N outputs are gates, and silu(gate) · up is returned, N / 2 wide; otherwise R is N.
    Leaves are products of their own, with the bits that each has alone: then w, bias, residual and the result have one
    more axis in front, and x has it too, or is [M, K] and the same for all leaves.

    Differentiable in x, w, bias and residual: the value is the kernel's, gradients are XLA's of the same expression.
    Raises ValueError for shapes that do not fit and for weights in a dtype that the device has no sizes for.
    """
    parts = 2 if gated else 1
    _check(x, w, bias, residual, parts)
    if w.ndim == 2:
        w, bias, residual = w[None], None if bias is None else bias[None], None if residual is None else residual[None]
        how: Any = dict(implementation=implementation, gated=gated, out_dtype=out_dtype)
        return matmul(x, w, bias=bias, residual=residual, **how)[0]
    w = w.reshape(w.shape[0], parts, w.shape[1] // parts, w.shape[2])
    bias = None if bias is None else bias.reshape(w.shape[:3])
    return _matmul(implementation, jnp.dtype(out_dtype), x.astype(w.dtype), w, bias, residual)


def _check(x: Array, w: Array, bias: Array | None, residual: Array | None, parts: int) -> None:
    fits = w.ndim in (2, 3) and x.ndim >= 2 and x.shape[:-2] in ((), w.shape[:-2]) and x.shape[-1] == w.shape[-1]
    if not fits:
        raise ValueError(f"matmul takes x [M, K] and w [N, K], with leaves [leaf, N, K], got {x.shape} and {w.shape}")
    *leaf, outputs, _ = w.shape
    if outputs % parts:
        raise ValueError(f"gated weights are gates, then as many ups: N must be even, got {outputs}")
    if bias is not None and bias.shape != (*leaf, outputs):
        raise ValueError(f"bias must be {[*leaf, outputs]}, one for each output, got {bias.shape}")
    result = (*leaf, x.shape[-2], outputs // parts)
    if residual is not None and residual.shape != result:
        raise ValueError(f"residual must be {list(result)} as the result, got {residual.shape}")


def each_leaf(body: Callable) -> Callable:
    """For all leaves what `body` is for one. One leaf is passed as a view of the weight, because a slice of several
    leaves would be a copy.
    """

    def run(x, w, bias, residual, *how, **more):
        def one(x, w, bias, residual):
            return body(x, w, bias, residual, *how, **more)

        if w.shape[0] == 1:
            return one(x if x.ndim == 2 else x[0], *jax.tree.map(lambda of_leaf: of_leaf[0], (w, bias, residual)))[None]
        return jax.vmap(one, in_axes=(None if x.ndim == 2 else 0, 0, 0, 0))(x, w, bias, residual)

    return run


BODIES = bodies(each_leaf(matmul_reference), matmul_tpu, each_leaf(matmul_gpu))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(implementation: Implementation, out_dtype: jnp.dtype, x, w, bias, residual):
    _, parts, outputs, inputs = w.shape
    sizes = matmul_sizes(implementation.device, w.dtype, outputs, inputs, parts)
    return BODIES[implementation.name](x, w, bias, residual, sizes, out_dtype)


def _forward(implementation, out_dtype, *operands):
    return _matmul(implementation, out_dtype, *operands), operands


def _backward(implementation, out_dtype, operands, cotangent):
    """The gradient of rows that all leaves read is the sum of the leaves', in the order of sharding/leaves.py: whatever
    part of them is here.
    """
    x, w, *others = operands
    of_leaves = x if x.ndim == 3 else jnp.broadcast_to(x, (w.shape[0], *x.shape))
    _, pullback = jax.vjp(each_leaf(plain), of_leaves, w, *others)
    of_x, *rest = pullback(cotangent.astype(jnp.float32))
    while x.ndim == 2 and of_x.shape[0] > 1:
        of_x = of_x[0::2] + of_x[1::2]
    return of_x.reshape(x.shape), *rest


_matmul.defvjp(_forward, _backward)
