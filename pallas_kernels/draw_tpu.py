"""The draw's TPU body: one row of logits in VMEM, as blocks of 128 ids, one to a sublane.

Sums are dots with ones or triangles, each of one shape, so that their order is that of the matrix unit. Blocks are
taken CHUNK at a time, and their masses are in VMEM as [chunks, CHUNK].
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.draw_reference import Draw, first_above
from pallas_kernels.numbers import ceil_to
from pallas_kernels.pinned_math import exp
from pallas_kernels.sizes import VOCAB_BLOCK

CHUNK = 128  # blocks
SUBLANES = 8
VMEM_LIMIT = 48 * 2**20  # bytes: three quarters of the smallest generation's VMEM


def _dot(a: Array, b: Array, contract_b: int) -> Array:
    return jax.lax.dot_general(a, b, (((1,), (contract_b,)), ((), ())), jax.lax.Precision.HIGHEST, jnp.float32)


def _ones(rows: int) -> Array:
    return jnp.ones((rows, VOCAB_BLOCK), jnp.float32)


def _upper_triangle(n: int, strict: bool) -> Array:
    """1 where row < column, or ≤."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (n, n), axis) for axis in (0, 1))
    return (row < column if strict else row <= column).astype(jnp.float32)


def _chunk(x_ref, i: Array, num_blocks: int) -> Float[Array, "CHUNK VOCAB_BLOCK"]:
    """One chunk of logits, -inf past the vocabulary."""
    row = i * CHUNK + jax.lax.broadcasted_iota(jnp.int32, (CHUNK, VOCAB_BLOCK), 0)
    return jnp.where(row < num_blocks, x_ref[pl.ds(i * CHUNK, CHUNK), :], -jnp.inf)


def _pick_block(masses: Float[Array, "C CHUNK"], u: Array) -> tuple[Array, Array]:
    """(block, total mass). Chunks are added in order, and so are the blocks within a chunk."""
    chunks = masses.shape[0]
    row, lane = (jax.lax.broadcasted_iota(jnp.int32, masses.shape, axis) for axis in (0, 1))
    inside = _dot(masses, _upper_triangle(CHUNK, strict=False), 0)
    totals = _dot(masses, jnp.ones((CHUNK, CHUNK), jnp.float32), 0)
    before = jax.lax.dot_general(
        _upper_triangle(chunks, strict=True), totals, (((0,), (0,)), ((), ())), jax.lax.Precision.HIGHEST, jnp.float32
    )
    cumulative = before + inside
    total = jnp.max(jnp.where((row == chunks - 1) & (lane == CHUNK - 1), cumulative, 0.0))
    return first_above(masses, cumulative, row * CHUNK + lane, u * total), total


def _pick_in_block(weights: Float[Array, "SUBLANES VOCAB_BLOCK"], u: Array) -> Array:
    cumulative = _dot(weights, _upper_triangle(VOCAB_BLOCK, strict=False), 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, weights.shape, 1)
    total = jnp.max(jnp.where(lane == VOCAB_BLOCK - 1, cumulative, 0.0))
    return first_above(weights, cumulative, lane, u * total)


def _kernel(
    uniform_ref, given_ref, x_ref, token_ref, logprob_ref, high_ref, log_mass_ref, mass_ref, *, num_blocks: int
) -> None:
    row, chunks = pl.program_id(0), pl.cdiv(num_blocks, CHUNK)

    def raise_high(i, high):
        return jnp.maximum(high, jnp.max(_chunk(x_ref, i, num_blocks), axis=0, keepdims=True))

    high = jnp.max(jax.lax.fori_loop(0, chunks, raise_high, jnp.full((1, VOCAB_BLOCK), -jnp.inf)))
    mass_ref[...] = jnp.zeros_like(mass_ref)

    def measure(i, carry):
        weights = exp(_chunk(x_ref, i, num_blocks) - high)
        mass_ref[pl.ds(i, 1), :] = _dot(_ones(SUBLANES), weights, 1)[:1]
        return carry

    jax.lax.fori_loop(0, chunks, measure, 0)
    block, total = _pick_block(mass_ref[...], uniform_ref[row, 0])

    def spread(block):
        return jnp.broadcast_to(x_ref[pl.ds(block, 1), :], (SUBLANES, VOCAB_BLOCK))

    drawn = block * VOCAB_BLOCK + _pick_in_block(exp(spread(block) - high), uniform_ref[row, 1])
    token = jnp.where(given_ref[row] >= 0, given_ref[row], drawn)
    lane = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, VOCAB_BLOCK), 1)
    chosen = jnp.max(jnp.where(lane == token % VOCAB_BLOCK, spread(token // VOCAB_BLOCK), -jnp.inf))
    token_ref[...] = jnp.full(token_ref.shape, token)
    high_ref[...] = jnp.full(high_ref.shape, high)
    log_mass_ref[...] = jnp.log(jnp.full(log_mass_ref.shape, total))
    logprob_ref[...] = (chosen - high) - log_mass_ref[...]


def draw_tpu(
    logits: Float[Array, "t V"], uniforms: Float[Array, "t 2"], given: Int[Array, " t"], *, interpret: Any = False
) -> Draw:
    """The draw, a row at a time."""
    t, num_blocks = logits.shape[0], logits.shape[1] // VOCAB_BLOCK
    chunks = pl.cdiv(num_blocks, CHUNK)
    scalars, shape = pl.BlockSpec(memory_space=pltpu.SMEM), (t, 1, VOCAB_BLOCK)
    drawn = pl.pallas_call(
        functools.partial(_kernel, num_blocks=num_blocks),
        grid=(t,),
        in_specs=[scalars, scalars, _of_row(chunks * CHUNK)],
        out_specs=[_of_row(1)] * 4,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32, jnp.float32)],
        scratch_shapes=[pltpu.VMEM((ceil_to(chunks, SUBLANES), CHUNK), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT),
        name="draw_tpu",
        interpret=interpret,
    )(uniforms, given, logits.reshape(t, num_blocks, VOCAB_BLOCK))
    return Draw(*(x[:, 0, 0] for x in drawn))


def _of_row(num_blocks: int) -> pl.BlockSpec:
    """So many blocks of one row."""
    return pl.BlockSpec((None, num_blocks, VOCAB_BLOCK), lambda i: (i, 0, 0))
