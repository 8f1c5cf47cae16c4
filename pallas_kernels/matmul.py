"""Matrix products with one fixed order along K for any number of rows: a row's bits depend on it and the weights
alone."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.implementations import Implementation, bodies
from pallas_kernels.matmul_gpu import matmul_gpu
from pallas_kernels.matmul_reference import matmul_reference, plain
from pallas_kernels.matmul_tpu import matmul_tpu
from pallas_kernels.sizes import matmul_sizes

BODIES = bodies(matmul_reference, matmul_tpu, matmul_gpu)


def matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "N K"],
    *,
    implementation: Implementation,
    bias: Float[Array, " N"] | None = None,
    residual: Float[Array, "M R"] | None = None,
    gated: bool = False,
    out_dtype: jnp.dtype = jnp.float32,
) -> Float[Array, "M R"]:
    """residual + (x @ w.T + bias) in float32, rounded once to `out_dtype`. x is rounded to the weights' dtype first.

    Gated: the first half of the N outputs are gates, and silu(gate) · up is returned, N / 2 wide; otherwise R is N.
    Differentiable in x, w, bias and residual: the value is the kernel's, gradients are XLA's of the same expression.
    Raises ValueError for shapes that do not fit and for weights in a dtype that the device has no sizes for.
    """
    parts = 2 if gated else 1
    _check(x, w, bias, residual, parts)
    w = w.reshape(parts, w.shape[0] // parts, w.shape[1])
    bias = None if bias is None else bias.reshape(parts, -1)
    return _matmul(implementation, jnp.dtype(out_dtype), x.astype(w.dtype), w, bias, residual)


def _check(x: Array, w: Array, bias: Array | None, residual: Array | None, parts: int) -> None:
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"matmul takes x [M, K] and w [N, K], got {x.shape} and {w.shape}")
    if w.shape[0] % parts:
        raise ValueError(f"gated weights are gates, then as many ups: N must be even, got {w.shape[0]}")
    if bias is not None and bias.shape != (w.shape[0],):
        raise ValueError(f"bias must be [{w.shape[0]}], one for each output, got {bias.shape}")
    if residual is not None and residual.shape != (x.shape[0], w.shape[0] // parts):
        raise ValueError(f"residual must be {[x.shape[0], w.shape[0] // parts]} as the result, got {residual.shape}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(implementation: Implementation, out_dtype: jnp.dtype, x, w, bias, residual):
    sizes = matmul_sizes(implementation.device, w.dtype, w.shape[1], w.shape[2])
    return BODIES[implementation.name](x, w, bias, residual, sizes, out_dtype)


def _forward(implementation, out_dtype, *operands):
    return _matmul(implementation, out_dtype, *operands), operands


def _backward(implementation, out_dtype, operands, cotangent):
    _, pullback = jax.vjp(plain, *operands)
    return pullback(cotangent.astype(jnp.float32))


_matmul.defvjp(_forward, _backward)
