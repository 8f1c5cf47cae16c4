"""The engine with its pinning taken out: what the contract is measured against, and what tests show to break it.

The plain engine is the same code with these pieces replaced: a region is one call of its body on the whole step instead
of a loop over tiles (decode in buckets of 2, 8, 32 and 64 rows, prefill of 32, 128 and 512), sums, exponentials,
softmax and SiLU are XLA's own, and no step has to be proven. Not replaced: attention (both engines loop over the same
tiles of blocks), the float32 head, the embedding's loop.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp

from jaxengine.device import sampler
from jaxengine.engine import engine, step_variants
from jaxengine.ops import heads, in_tiles, kernels, norm, regions, xla
from jaxengine.ops.tiles import Tile
from pallas_kernels import draw_reference, truncation_reference


@dataclasses.dataclass(frozen=True)
class PlainTile(Tile):
    """Not equal to a Tile, so that steps traced with it are compiled again."""


TILES = {
    "decode": tuple(PlainTile(1, rows) for rows in (2, 8, 32, 64)),
    "prefill": tuple(PlainTile(16, blocks) for blocks in (2, 8, 32)),
}
HEAD_TILE = 16  # of a prefill, where it stays a loop; no bucket of decode has this size


def whole(body, tile, weights, rows, count):
    """The body on a step's rows at once."""
    if tile == HEAD_TILE:
        return regions.over_tiles(body, tile, weights, rows, count)
    size = jax.tree.leaves(rows)[0].shape[0]

    def padded(x):
        return jnp.pad(x, ((0, size - x.shape[0]), *((0, 0),) * (x.ndim - 1)))

    return jax.tree.map(padded, body(weights, jax.tree.map(lambda x: x[:tile], rows)))


def with_head_tile(*which):
    """In the place of choose_kernels."""
    return dataclasses.replace(kernels.choose_kernels(*which), head_tile=HEAD_TILE)


def unproven(self, variant, params, cache):
    """In the place of StepVariants._prove."""
    self._proven[variant] = True
    return cache


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Pinning taken out of what is traced inside."""
    total = functools.partial(jnp.sum, axis=-1)
    pieces = [
        (heads, "over_tiles", whole),
        (in_tiles, "over_tiles", whole),
        (kernels, "over_tiles", whole),
        (engine, "choose_kernels", with_head_tile),
        (norm, "row_sum", total),
        (xla, "silu", jax.nn.silu),
        (sampler, "row_sum", total),
        (sampler, "exp", jnp.exp),
        (truncation_reference, "row_sum", total),
        (truncation_reference, "exp", jnp.exp),
        (draw_reference, "row_sum", total),
        (draw_reference, "exp", jnp.exp),
        (draw_reference, "row_cumsum", functools.partial(jnp.cumsum, axis=-1)),
        (step_variants, "TILES", TILES),
        (step_variants, "BASE", TILES["decode"][1]),
        (step_variants.StepVariants, "_prove", unproven),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, piece in pieces:
            stack.enter_context(mock.patch.object(owner, name, piece))
        yield
