"""Elementary functions and sums whose bits do not depend on the size of the array around them.

Elementary functions are spelled out in multiplications, additions and bit operations, because XLA compiles the
exponential of a small array with scalar code and that of a large one with vector code, which round differently: a few
results in a thousand differ in the last bit. A polynomial that is written out is compiled to the same roundings either
way.

Sums along the last axis are dots with ones, because XLA's own reduce changes its order with the shape (on CPU the sum
of a row differs between 2, 8 and 128 rows). A dot whose right side is `[N, K]`, as every weight is, keeps its order;
one with `[K, N]` does not. Rows are summed in blocks of SUM_BLOCK, then the sums of the blocks are, which also keeps
the rounding small.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

LOG2_E, LN2 = 1.442695040888963, 0.6931471805599453
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # ln 2 in two parts, so that n · LN2_HIGH is exact
COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
SUM_BLOCK = 128
SUM_COLUMNS = 8  # equal columns of ones, because XLA takes another algorithm for a dot with one output
LOWEST, HIGHEST = -87.0, 88.0  # 2^n stays a normal number in between


def _two_to(n: Float[Array, "..."]) -> Float[Array, "..."]:
    """2^n for whole n between -126 and 127, from its bits."""
    return jax.lax.bitcast_convert_type((n.astype(jnp.int32) + 127) << 23, jnp.float32)


def _exp_of_small(r: Float[Array, "..."]) -> Float[Array, "..."]:
    """e^r for |r| ≤ ln 2 / 2: the polynomial of expf in Moshier's Cephes library. Exactly 1 at 0."""
    p = jnp.full_like(r, COEFFICIENTS[0])
    for coefficient in COEFFICIENTS[1:]:
        p = p * r + coefficient
    return p * (r * r) + r + 1.0


@jax.custom_jvp
def exp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """e^x in float32 to 1 unit in the last place or so; 0 below -87, e^88 above 88. NaN stays NaN.

    x = n ln 2 + r with |r| ≤ ln 2 / 2.
    """
    clipped = jnp.clip(x, LOWEST, HIGHEST)
    n = jnp.floor(clipped * LOG2_E + 0.5)
    r = clipped - n * LN2_HIGH - n * LN2_LOW
    return jnp.where(x < LOWEST, 0.0, _exp_of_small(r) * _two_to(n))


@exp.defjvp
def _exp_jvp(primals, tangents):
    y = exp(primals[0])
    return y, y * tangents[0]


def exp2(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """2^x in float32 for x ≤ 127; 0 below -126. Whole numbers give exact powers. NaN stays NaN."""
    clipped = jnp.clip(x, -126.0, 127.0)
    n = jnp.floor(clipped + 0.5)
    return jnp.where(x < -126.0, 0.0, _exp_of_small((clipped - n) * LN2) * _two_to(n))


@jax.custom_jvp
def rounded(x: Float[Array, "..."], nothing: UInt32[Array, "..."]) -> Float[Array, "..."]:
    """x, which may be a product, as a number in memory has it; `nothing` is 0 at run time, unknown to a compiler.

    Where a processor has fused multiply-adds, a compiler takes them for a product that is added to something, and does
    not round the product; elsewhere it cannot.
    """
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint32) ^ nothing, jnp.float32)


@rounded.defjvp
def _rounded_jvp(primals, tangents):
    return rounded(*primals), tangents[0]


def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x · sigmoid(x)."""
    return x / (1.0 + exp(-x))


@jax.custom_vjp
def row_quotient(x: Float[Array, "t n"], divisors: Float[Array, " t"]) -> Float[Array, "t n"]:
    """Each row divided by its own number, which has no gradient: multiplied by its reciprocal, rounded to float32.

    Both roundings are written out, because XLA turns a division by a row's number into that in some programs and leaves
    it in others.
    """
    return x * (1.0 / divisors)[:, None]


row_quotient.defvjp(
    lambda x, divisors: (row_quotient(x, divisors), divisors),
    lambda divisors, cotangent: (cotangent * (1.0 / divisors)[:, None], jnp.zeros_like(divisors)),
)


def row_sum(x: Float[Array, "... n"]) -> Float[Array, "..."]:
    """Sum over the last axis in float32. There must be at least two rows: XLA takes another path for a dot with one."""
    if x.shape[-1] > SUM_BLOCK:
        return row_sum(row_sum(_blocks(x)))
    return _dot(x, jnp.ones((SUM_COLUMNS, x.shape[-1]), jnp.float32))[..., 0]


def row_cumsum(x: Float[Array, "... n"]) -> Float[Array, "... n"]:
    """Inclusive running sum along the last axis, in blocks too. Values must be finite."""
    n = x.shape[-1]
    if n > SUM_BLOCK:
        blocks = _blocks(x)
        sums = row_sum(blocks)
        inside, before = row_cumsum(blocks), row_cumsum(sums) - sums
        return (inside + before[..., None]).reshape(*x.shape[:-1], -1)[..., :n]
    return _dot(x, (jnp.arange(max(n, SUM_COLUMNS))[:, None] >= jnp.arange(n)).astype(jnp.float32))[..., :n]


def _blocks(x: Array) -> Array:
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % SUM_BLOCK)])
    return padded.reshape(*x.shape[:-1], -1, SUM_BLOCK)


def _dot(x: Array, w: Array) -> Array:
    flat = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    out = jax.lax.dot_general(flat, w, (((1,), (1,)), ((), ())), jax.lax.Precision.HIGHEST, jnp.float32)
    return out.reshape(*x.shape[:-1], w.shape[0])
