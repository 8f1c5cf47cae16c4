"""Ordered reductions over leaves, on one device and on several.

The hidden, head and vocabulary axes of the weights are cut into `reduction_leaves` equal slices, which are the leading
axis of every weight. Each partial result is computed per leaf at one shape, and partial sums are added here, in one
balanced binary tree in float32. A device that owns a run of leaves owns a subtree, so the order does not depend on how
many devices share the work. Gradients are added in the same tree.

Devices exchange numbers by copying alone (or as integers): no sum of floats is left to the runtime, whose order may be
any.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Numbers of a partial sum from which on devices exchange columns: below it a sum that is gathered whole needs one
# collective for two, and latency is all that it costs.
EXCHANGED = 1 << 18


def tree_sum(partials: Float[Array, "leaf ..."]) -> Float[Array, "..."]:
    """Sum over the leading axis (a power of two long) as ((p0 + p1) + (p2 + p3)) + …"""
    while partials.shape[0] > 1:
        partials = partials[0::2] + partials[1::2]
    return partials[0]


def spread(x: Float[Array, "..."], leaves: int) -> Float[Array, "leaf ..."]:
    """x for every leaf. The gradient of x is the sum of the leaves', by the tree."""
    return _spread(x, leaves)


_spread: Any = jax.custom_vjp(lambda x, leaves: jnp.broadcast_to(x, (leaves, *x.shape)), nondiff_argnums=(1,))
_spread.defvjp(lambda x, leaves: (_spread(x, leaves), None), lambda leaves, _, cotangents: (tree_sum(cotangents),))


@dataclasses.dataclass(frozen=True)
class Leaves:
    """Who has the leaves: this one device has all. Hashable, a part of the ops that multiply (jaxengine/ops)."""

    def looked_up(
        self, lookup: Callable[[Array, Array], Array], table: Float[Array, "leaf V D"], ids: Int[Array, " t"]
    ) -> Float[Array, "t D"]:
        """`lookup(table, ids)`: float32 rows of all leaves' table, which has no gradient here (device/embedding.py)."""
        return lookup(table, ids)

    def own_ids(self, table: Float[Array, "leaf V D"], ids: Int[Array, " t"]) -> tuple[Array, Array]:
        """(ids in the part of the table that is here, whether each is here)."""
        return ids, jnp.ones(ids.shape, bool)

    def shared(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """x, which every device has, for all leaves to read. Its gradient is the sum of what the leaves' readers give.

        `spread` is the same for the leaves of one device.
        """
        return x

    def sum(self, partials: Float[Array, "leaf t N"]) -> Float[Array, "t N"]:
        """The sum over all leaves, the same on every device."""
        return tree_sum(partials)

    def columns(self, x: Float[Array, "t n"]) -> Float[Array, "t N"]:
        """The columns of all leaves, from each device's own."""
        return x

    def gathered(self, own: Float[Array, "t N"]) -> Float[Array, "devices t N"]:
        """Every device's own sum over its leaves, for a reader that adds them in the order of the tree."""
        return own[None]


@dataclasses.dataclass(frozen=True)
class LeavesOfDevices(Leaves):
    """Each of the `degree` devices along a mesh's `axis` has a run of the leaves. Inside jax.shard_map."""

    axis: str
    degree: int

    def looked_up(
        self, lookup: Callable[[Array, Array], Array], table: Float[Array, "leaf V D"], ids: Int[Array, " t"]
    ) -> Float[Array, "t D"]:
        """Each row from the device that has it; the others' words are 0, so that their sum as integers is the row, bit
        for bit.
        """
        ids, here = self.own_ids(table, ids)
        words = jax.lax.bitcast_convert_type(lookup(table, ids), jnp.uint32)
        words = jax.lax.psum(jnp.where(here[:, None], words, 0), self.axis)
        return jax.lax.bitcast_convert_type(words, jnp.float32)

    def own_ids(self, table: Float[Array, "leaf V D"], ids: Int[Array, " t"]) -> tuple[Array, Array]:
        rows = table.shape[0] * table.shape[1]
        ids = ids - jax.lax.axis_index(self.axis) * rows
        here = (ids >= 0) & (ids < rows)
        return jnp.where(here, ids, 0), here

    def shared(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return _shared(self, x)

    def sum(self, partials: Float[Array, "leaf t N"]) -> Float[Array, "t N"]:
        """A device's leaves are a subtree: it adds those, and the tree is finished with the others' sums."""
        return _finished(self, tree_sum(partials))

    def columns(self, x: Float[Array, "t n"]) -> Float[Array, "t N"]:
        return _columns(self, x)

    def gathered(self, own: Float[Array, "t N"]) -> Float[Array, "devices t N"]:
        return _gathered(self, own)

    def total(self, own: Float[Array, "..."]) -> Float[Array, "..."]:
        """The sum of every device's own by the tree, on every device.

        Gathered whole where it is small; else each device adds the columns that are its own to add, and they are
        gathered: no more bytes than an all-reduce of a ring moves.
        """
        width = own.shape[-1] if own.ndim else 1
        if own.size < EXCHANGED or width % self.degree:
            return tree_sum(jax.lax.all_gather(own, self.axis))
        parts = own.reshape(*own.shape[:-1], self.degree, width // self.degree)
        parts = jax.lax.all_to_all(parts, self.axis, split_axis=own.ndim - 1, concat_axis=0, tiled=False)
        return jax.lax.all_gather(tree_sum(parts), self.axis, axis=own.ndim - 1, tiled=True)


# What is the same on every device has the same cotangent on every device, so only `shared` has something to add.
_shared = jax.custom_vjp(lambda leaves, x: x, nondiff_argnums=(0,))
_shared.defvjp(lambda leaves, x: (x, None), lambda leaves, _, cotangent: (leaves.total(cotangent),))

_finished = jax.custom_vjp(lambda leaves, own: leaves.total(own), nondiff_argnums=(0,))
_finished.defvjp(lambda leaves, own: (leaves.total(own), None), lambda leaves, _, cotangent: (cotangent,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _columns(leaves: LeavesOfDevices, x: Float[Array, "t n"]) -> Float[Array, "t N"]:
    return jax.lax.all_gather(x, leaves.axis, axis=x.ndim - 1, tiled=True)


def _own_columns(leaves: LeavesOfDevices, _: None, cotangent: Float[Array, "t N"]) -> tuple[Array]:
    width = cotangent.shape[-1] // leaves.degree
    first = jax.lax.axis_index(leaves.axis) * width
    return (jax.lax.dynamic_slice_in_dim(cotangent, first, width, axis=cotangent.ndim - 1),)


_columns.defvjp(lambda leaves, x: (_columns(leaves, x), None), _own_columns)


_gathered = jax.custom_vjp(lambda leaves, own: jax.lax.all_gather(own, leaves.axis), nondiff_argnums=(0,))
_gathered.defvjp(
    lambda leaves, own: (leaves.gathered(own), None),
    lambda leaves, _, cotangents: (cotangents[jax.lax.axis_index(leaves.axis)],),
)

ALL_HERE = Leaves()
