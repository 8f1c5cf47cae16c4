"""Ordered reductions over leaves, on one device and on several.

The hidden, head and vocabulary axes of the weights are cut into `reduction_leaves` equal slices, which are the leading
axis of every weight. Each partial result is computed per leaf at one shape, and partial sums are added here, in one
balanced binary tree in float32. A device that owns a run of leaves owns a subtree, so the order does not depend on how
many devices share the work. Gradients are added in the same tree.

A leaf has key-value heads of its own; where leaves are more than those, several have a copy of the same head each.

Devices exchange numbers by copying alone (or as integers): no sum of floats is left to the runtime, whose order may be
any.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Numbers of a partial sum from which on devices exchange columns: below it a sum that is gathered whole needs one
# collective for two, and latency is all that it costs.
EXCHANGED = 1 << 18
FEWEST_ROWS = 2  # of which each device takes some: XLA may compile what is done with a single one in another way


def tree_sum(partials: Float[Array, "leaf ..."]) -> Float[Array, "..."]:
    """Sum over the leading axis (a power of two long) as ((p0 + p1) + (p2 + p3)) + …"""
    while partials.shape[0] > 1:
        partials = partials[0::2] + partials[1::2]
    return partials[0]


def own_share(x: Array, axis: str, devices: int, along: int = 0) -> Array:
    """This device's part of x, which all the `devices` along a mesh's `axis` have. Inside jax.shard_map."""
    size = x.shape[along] // devices
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * size, size, axis=along)


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

    def to_add(
        self, own: Float[Array, "t N"], added: Callable[[Float[Array, "devices t n"]], Float[Array, "t n"]]
    ) -> Float[Array, "parts t N"]:
        """What a reader has still to add in the order of the tree: every device's own sum, or their sum alone, which
        was `added` in that order.
        """
        return own[None]

    def sharing_rows(self, count: int) -> "Leaves":
        """These for the end of a chain on `count` rows: of the logits each device has whole rows, where they are enough
        to share (RowsOfDevices), else all of them.
        """
        return self

    def own_rows(self, rows: Any) -> Any:
        """A tree of arrays `[t, …]` that every device has, cut to the rows whose logits are here."""
        return rows

    def all_rows(self, own: Any) -> Any:
        """A tree of arrays of 32 bits or booleans, `[t, …]`, from each device's own rows."""
        return own


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

    def to_add(
        self, own: Float[Array, "t N"], added: Callable[[Float[Array, "devices t n"]], Float[Array, "t n"]]
    ) -> Float[Array, "parts t N"]:
        return _to_add(self, added, own)

    def sharing_rows(self, count: int) -> Leaves:
        enough = count % self.degree == 0 and count // self.degree >= FEWEST_ROWS
        return RowsOfDevices(self.axis, self.degree) if enough else self

    def total(self, own: Float[Array, "..."]) -> Float[Array, "..."]:
        """The sum of every device's own by the tree, on every device."""
        return self.by_columns(own, tree_sum) if self.is_exchanged(own) else tree_sum(self.of_all(own))

    def is_exchanged(self, own: Float[Array, "..."]) -> bool:
        """Whether devices exchange columns of a sum: else it is small, and gathered whole."""
        width = own.shape[-1] if own.ndim else 1
        return own.size >= EXCHANGED and width % self.degree == 0

    def of_all(self, own: Float[Array, "..."]) -> Float[Array, "devices ..."]:
        return jax.lax.all_gather(own, self.axis)

    def by_columns(self, own: Float[Array, "..."], added: Callable[[Array], Array]) -> Float[Array, "..."]:
        """Each device adds the columns that are its own to add, and they are gathered: no more bytes than an all-reduce
        of a ring moves.
        """
        last = own.ndim - 1
        parts = own.reshape(*own.shape[:-1], self.degree, own.shape[-1] // self.degree)
        parts = jax.lax.all_to_all(parts, self.axis, split_axis=last, concat_axis=0, tiled=False)
        return jax.lax.all_gather(added(parts), self.axis, axis=last, tiled=True)


# What is the same on every device has the same cotangent on every device, so only `shared` has something to add.
_shared = jax.custom_vjp(lambda leaves, x: x, nondiff_argnums=(0,))
_shared.defvjp(lambda leaves, x: (x, None), lambda leaves, _, cotangent: (leaves.total(cotangent),))

_finished = jax.custom_vjp(lambda leaves, own: leaves.total(own), nondiff_argnums=(0,))
_finished.defvjp(lambda leaves, own: (leaves.total(own), None), lambda leaves, _, cotangent: (cotangent,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _columns(leaves: LeavesOfDevices, x: Float[Array, "t n"]) -> Float[Array, "t N"]:
    return jax.lax.all_gather(x, leaves.axis, axis=x.ndim - 1, tiled=True)


def _own_columns(leaves: LeavesOfDevices, _: None, cotangent: Float[Array, "t N"]) -> tuple[Array]:
    return (own_share(cotangent, leaves.axis, leaves.degree, along=cotangent.ndim - 1),)


_columns.defvjp(lambda leaves, x: (_columns(leaves, x), None), _own_columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _to_add(leaves: LeavesOfDevices, added: Callable, own: Float[Array, "t N"]) -> Float[Array, "parts t N"]:
    return leaves.by_columns(own, added)[None] if leaves.is_exchanged(own) else leaves.of_all(own)


def _own_part(leaves: LeavesOfDevices, added: Callable, _: None, cotangents: Float[Array, "parts t N"]) -> tuple[Array]:
    return (cotangents[jax.lax.axis_index(leaves.axis) if len(cotangents) > 1 else 0],)


_to_add.defvjp(lambda leaves, added, own: (_to_add(leaves, added, own), None), _own_part)


class RowsOfDevices(LeavesOfDevices):
    """The same devices at the end of a chain: each has all columns of its share of the rows.

    What is done with a row of logits (penalties, truncation, the draw) needs all of it and no other row. So devices
    exchange columns for rows, which is a `degree`-th of what gathering all columns would move, and each does a share.
    """

    def columns(self, x: Float[Array, "t n"]) -> Float[Array, "own_t N"]:
        return _whole_rows(self, x)

    def own_rows(self, rows: Any) -> Any:
        return jax.tree.map(lambda x: own_share(x, self.axis, self.degree), rows)

    def all_rows(self, own: Any) -> Any:
        """Two collectives: floats, which have a gradient, and the others as words."""
        arrays, tree = jax.tree.flatten(own)
        floats = [i for i, x in enumerate(arrays) if x.dtype == jnp.float32]
        others = [i for i, x in enumerate(arrays) if x.dtype != jnp.float32]
        for places, gather in ((floats, functools.partial(_all_rows, self)), (others, self._all_words)):
            for i, x in zip(places, _in_one([arrays[i] for i in places], gather), strict=True):
                arrays[i] = x
        return tree.unflatten(arrays)

    def _all_words(self, x: Array) -> Array:
        return jax.lax.all_gather(x, self.axis, tiled=True)


def _in_one(arrays: list[Array], gather: Callable[[Array], Array]) -> list[Array]:
    """Arrays `[t, …]`, each gathered along its rows, by one call; all float32, or each of 32 bits or boolean."""
    if not arrays:
        return []
    flat = [x.reshape(x.shape[0], -1) for x in arrays]
    words = [x if x.dtype == jnp.float32 else _words(x) for x in flat]
    whole = gather(jnp.concatenate(words, axis=1))
    parts = jnp.split(whole, np.cumsum([x.shape[1] for x in flat])[:-1], axis=1)
    shaped = [part.reshape(part.shape[0], *x.shape[1:]) for part, x in zip(parts, arrays, strict=True)]
    return [_from_words(part, x.dtype) for part, x in zip(shaped, arrays, strict=True)]


def _words(x: Array) -> Array:
    return x.astype(jnp.uint32) if x.dtype == bool else jax.lax.bitcast_convert_type(x, jnp.uint32)


def _from_words(x: Array, dtype: Any) -> Array:
    if dtype in (bool, x.dtype):
        return x.astype(dtype)
    return jax.lax.bitcast_convert_type(x, dtype)


_whole_rows = jax.custom_vjp(
    lambda leaves, x: jax.lax.all_to_all(x, leaves.axis, split_axis=0, concat_axis=1, tiled=True), nondiff_argnums=(0,)
)
_whole_rows.defvjp(
    lambda leaves, x: (_whole_rows(leaves, x), None),
    lambda leaves, _, cotangent: (jax.lax.all_to_all(cotangent, leaves.axis, split_axis=1, concat_axis=0, tiled=True),),
)

_all_rows = jax.custom_vjp(lambda leaves, own: jax.lax.all_gather(own, leaves.axis, tiled=True), nondiff_argnums=(0,))
_all_rows.defvjp(
    lambda leaves, own: (_all_rows(leaves, own), None), lambda leaves, _, cotangents: (leaves.own_rows(cotangents),)
)

ALL_HERE = Leaves()
