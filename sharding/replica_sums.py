"""Sums over terms that the replicas of a mesh have, added one after another in the order of one device that has all.

Terms travel by copying alone: no sum of floats is left to the runtime. A device adds its slice of every term, so that
a sum takes 1 / replicas of its room on each until it is done, and a term moves no more bytes than a ring's
reduce-scatter.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Terms:
    """Who has the terms of a sum: this replica alone has all. Hashable."""

    def start(self, term: Float[Array, "..."]) -> Float[Array, "..."]:
        """The sum before its first term."""
        return jnp.zeros(term.shape, jnp.float32)

    def add(self, total: Float[Array, "..."], own: Float[Array, "..."]) -> Float[Array, "..."]:
        """The float32 sum with the next term of every replica added, the first replica's first."""
        return total + own.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class TermsOfReplicas(Terms):
    """Each of the `replicas` along a mesh's `axis` has one term in turn. Inside jax.shard_map.

    The sum is one device's slice of it, flat, until it is finished.
    """

    axis: str
    replicas: int

    def start(self, term: Float[Array, "..."]) -> Float[Array, " n"]:
        return jnp.zeros(-(-term.size // self.replicas), jnp.float32)

    def add(self, total: Float[Array, " n"], own: Float[Array, "..."]) -> Float[Array, " n"]:
        own = own.astype(jnp.float32).reshape(-1)
        slices = jnp.pad(own, (0, -own.size % self.replicas)).reshape(self.replicas, -1)
        slices = jax.lax.all_to_all(slices, self.axis, split_axis=0, concat_axis=0)
        for replica in range(self.replicas):
            total = total + slices[replica]
        return total

    def finish(self, total: Float[Array, " n"], term: Float[Array, "..."]) -> Float[Array, "..."]:
        """The sum in the shape of a term, the same on every replica."""
        return jax.lax.all_gather(total, self.axis, tiled=True)[: term.size].reshape(term.shape)

    def gathered(self, own: Float[Array, "turn ..."]) -> Float[Array, "term ..."]:
        """What each term came with, in the order of the sum, from what this replica's terms came with."""
        return jax.lax.all_gather(own, self.axis, axis=1).reshape(-1, *own.shape[1:])


ALONE = Terms()
