"""What top-k, top-p and min-p keep: the GPU's body (Triton), a program for each row.

The definition is truncation_reference.py's. A row does not fit into a program's registers, so it is read again for each
bit of a threshold, from the cache; what a row does not ask for takes no pass. Sums are those of one program in one
order, which neither XLA's fusions nor its choice among algorithms for a dot can change.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.gpu_call import call
from pallas_kernels.numbers import cdiv
from pallas_kernels.pinned_math import exp
from pallas_kernels.truncation_reference import BITS, SIGN, TINY, ordered

TILE = 4096  # ids that a program looks at together
WARPS = 8
ID_BITS = 24  # more than any vocabulary has


def _kept_row(x_ref, top_k_ref, top_p_ref, min_p_ref, keep_ref, *, vocab: int) -> None:
    row = pl.program_id(0)
    k, p, min_p = top_k_ref[row], top_p_ref[row], min_p_ref[row]
    wants_k, wants_p = (k > 0) & (k < vocab), p < 1
    k = jnp.where(wants_k, k, vocab)

    def tile(i: Array) -> tuple[Array, Array, Array]:
        """(logits, their order, ids) of one tile; past the vocabulary -inf, in the last place."""
        ids = i * TILE + jnp.arange(TILE, dtype=jnp.int32)
        x = plgpu.load(x_ref.at[row, pl.ds(i * TILE, TILE)], mask=ids < vocab, other=-jnp.inf)
        return x, jnp.where(ids < vocab, ordered(x), np.uint32(0)), ids

    def total(of_tile: Callable, nothing: Any) -> Array:
        """The sum over the row of a number for each id, in the order of its tiles."""

        def add(i, sums):
            return sums + of_tile(*tile(i))

        return jax.lax.fori_loop(0, cdiv(vocab, TILE), add, jnp.full(TILE, nothing)).sum()

    count = functools.partial(total, nothing=np.int32(0))
    mass = functools.partial(total, nothing=np.float32(0))

    def ones(chosen: Array) -> Array:
        return chosen.astype(jnp.int32)

    def first_of_edge(edge: Array, missing: Array, wanted: Array) -> Array:
        """The largest bound below which at most `missing` ids lie on the edge."""

        def enough(bound: Array) -> Array:
            return count(lambda x, order, ids: ones((order == edge) & (ids < bound))) <= missing

        return _largest(enough, np.int32(1 << (ID_BITS - 1)), _steps(wanted, ID_BITS))

    # Top-k.
    edge = _largest(
        lambda threshold: count(lambda x, order, ids: ones(order >= threshold)) >= k, SIGN, _steps(wants_k, BITS)
    )
    missing = k - count(lambda x, order, ids: ones(order > edge))
    bound = first_of_edge(edge, missing, wants_k)

    def by_k(order: Array, ids: Array) -> Array:
        return ~wants_k | (order > edge) | ((order == edge) & (ids < bound))

    # What is kept, renormalised.
    def largest(i, high):
        return jnp.maximum(high, tile(i)[0])

    high = jax.lax.fori_loop(0, cdiv(vocab, TILE), largest, jnp.full(TILE, -np.inf, jnp.float32)).max()
    log_mass = jnp.log(mass(lambda x, order, ids: jnp.where(by_k(order, ids), exp(x - high), 0.0)))

    def probability(x: Array, order: Array, ids: Array) -> Array:
        return jnp.where(by_k(order, ids), exp((x - high) - log_mass), 0.0)

    # Top-p.
    least = jnp.maximum(p, TINY)  # a p that rounds to 0 still keeps the likeliest

    def at_least(threshold: Array) -> Array:
        def chosen(x, order, ids):
            return jnp.where(order >= threshold, probability(x, order, ids), 0.0)

        return mass(chosen) >= least

    edge_p = _largest(at_least, SIGN, _steps(wants_p, BITS))
    above = mass(lambda x, order, ids: jnp.where(order > edge_p, probability(x, order, ids), 0.0))

    def on_edge(i, each):
        x, order, ids = tile(i)
        return jnp.maximum(each, jnp.where(order == edge_p, probability(x, order, ids), 0.0))

    each = jax.lax.fori_loop(0, cdiv(vocab, TILE), on_edge, jnp.zeros(TILE, jnp.float32)).max()
    missing = jnp.clip(jnp.ceil((least - above) / jnp.maximum(each, TINY)), 1, vocab).astype(jnp.int32)
    bound_p = first_of_edge(edge_p, missing, wants_p)

    def write(i, _):
        x, order, ids = tile(i)
        nucleus = ~wants_p | (order > edge_p) | ((order == edge_p) & (ids < bound_p))
        likely = probability(x, order, ids) >= min_p * exp(-log_mass)
        keep = by_k(order, ids) & nucleus & likely
        plgpu.store(keep_ref.at[row, pl.ds(i * TILE, TILE)], keep.astype(jnp.int8), mask=ids < vocab)

    jax.lax.fori_loop(0, cdiv(vocab, TILE), write, None)


def _steps(wanted: Array, count: int) -> Array:
    return wanted.astype(jnp.int32) * count  # Triton makes no loop's bound of a selected constant


def _largest(enough: Callable[[Array], Array], first: np.generic, steps: Array) -> Array:
    """The largest number for which `enough` holds, from the bit `first` down; enough is true at 0 and falls once."""

    def step(_, state):
        found, bit = state
        return jnp.where(enough(found | bit), found | bit, found), bit >> bit.dtype.type(1)

    return jax.lax.fori_loop(0, steps, step, (jnp.zeros((), first.dtype), jnp.asarray(first)))[0]


def kept_gpu(
    logits: Float[Array, "t V"],
    top_k: Int[Array, " t"],
    top_p: Float[Array, " t"],
    min_p: Float[Array, " t"],
    *,
    interpret: bool = False,
) -> Bool[Array, "t V"]:
    """One program for every row."""
    out = jax.ShapeDtypeStruct(logits.shape, jnp.int8)
    kernel = functools.partial(_kept_row, vocab=logits.shape[1])
    inputs = logits, top_k, top_p, min_p
    keep = call("truncation", kernel, logits.shape[:1], out, *inputs, interpret=interpret, warps=WARPS, stages=1)
    return keep != 0
