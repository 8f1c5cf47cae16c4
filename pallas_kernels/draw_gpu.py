"""The draw's GPU body (Triton), two kernels: the masses of all blocks side by side, then the draw of each row.

A block's mass is the sum of exp(logit - the block's own maximum).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.draw_reference import Draw, first_above
from pallas_kernels.pinned_math import exp
from pallas_kernels.sizes import VOCAB_BLOCK

BLOCKS_AT_ONCE = 16  # that one program measures
LOWEST_HIGH = -1e30  # in the place of a block's maximum of -inf, so that no difference is NaN


def _measure(x_ref, high_ref, mass_ref, *, vocab: int) -> None:
    row, first = pl.program_id(0), pl.program_id(1) * BLOCKS_AT_ONCE
    inside = (first * VOCAB_BLOCK + jnp.arange(BLOCKS_AT_ONCE * VOCAB_BLOCK)) < vocab
    x = plgpu.load(x_ref.at[row, pl.ds(first * VOCAB_BLOCK, BLOCKS_AT_ONCE * VOCAB_BLOCK)], mask=inside, other=-jnp.inf)
    x = x.reshape(BLOCKS_AT_ONCE, VOCAB_BLOCK)
    high = jnp.maximum(x.max(axis=1), LOWEST_HIGH)
    high_ref[row, pl.ds(first, BLOCKS_AT_ONCE)] = high
    mass_ref[row, pl.ds(first, BLOCKS_AT_ONCE)] = exp(x - high[:, None]).sum(axis=1)


def _draw_row(high_ref, mass_ref, x_ref, uniform_ref, given_ref, token_ref, logprob_ref, top_ref, log_mass_ref) -> None:
    row = pl.program_id(0)
    highs = high_ref[row, :]
    high = highs.max()
    masses = mass_ref[row, :] * exp(highs - high)
    total = masses.sum()
    block = first_above(masses, jnp.cumsum(masses), jnp.arange(masses.shape[0]), uniform_ref[row, 0] * total)
    weights = exp(x_ref[row, pl.ds(block * VOCAB_BLOCK, VOCAB_BLOCK)] - high)
    first = block * VOCAB_BLOCK
    drawn = first + first_above(
        weights, jnp.cumsum(weights), jnp.arange(VOCAB_BLOCK), uniform_ref[row, 1] * weights.sum()
    )
    given = given_ref[row]
    token = jnp.where(given >= 0, given, drawn)
    token_ref[row] = token
    log_mass = jnp.log(total)
    logprob_ref[row] = (x_ref[row, token] - high) - log_mass
    top_ref[row], log_mass_ref[row] = high, log_mass


def draw_gpu(
    logits: Float[Array, "t V"], uniforms: Float[Array, "t 2"], given: Int[Array, " t"], *, interpret: bool = False
) -> Draw:
    """One program for every BLOCKS_AT_ONCE blocks of a row, then one for every row."""
    t, vocab = logits.shape
    # Triton's arrays are powers of two; blocks past V have no mass.
    width = max(pl.next_power_of_2(vocab // VOCAB_BLOCK), BLOCKS_AT_ONCE)
    of_blocks = jax.ShapeDtypeStruct((t, width), jnp.float32)
    parameters = plgpu.CompilerParams(num_warps=4, num_stages=1)
    call = functools.partial(pl.pallas_call, interpret=interpret, compiler_params=parameters)
    measure, grid = functools.partial(_measure, vocab=vocab), (t, width // BLOCKS_AT_ONCE)
    highs, masses = call(measure, grid=grid, out_shape=[of_blocks, of_blocks], name="draw_gpu_masses")(logits)
    out = [jax.ShapeDtypeStruct((t,), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32, jnp.float32)]
    draw = call(_draw_row, grid=(t,), out_shape=out, name="draw_gpu_draw")
    return Draw(*draw(highs, masses, logits, uniforms, given))
