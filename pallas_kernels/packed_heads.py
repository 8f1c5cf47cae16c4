"""A packed projection, from which kernels make the heads that attention takes."""

from typing import Any, NamedTuple

from jaxtyping import Array, Float

QUERIES, KEYS, VALUES = range(3)  # kinds of heads, in the order in which a leaf has them


class Geometry(NamedTuple):
    """Heads of a model; a leaf has its queries, its keys and its values one after another."""

    queries: int
    keys: int
    width: int
    leaves: int
    eps: float
    rope_factor: float  # of cosine and sine (yarn)

    def column(self, kind: int, own: Any) -> Any:
        """Which head of the packed projection is head `own` of its kind."""
        queries, keys = self.queries // self.leaves, self.keys // self.leaves
        each = (queries, keys, keys)[kind]
        leaf, before = own // each, (0, queries, queries + keys)[kind]
        return leaf * (queries + 2 * keys) + before + own % each


class Projection(NamedTuple):
    """The packed projection before its splits are added, and what is applied to it."""

    sums: Float[Array, "S R N"]
    bias: Float[Array, " N"] | None
    q_norm: Float[Array, " h"] | None
    k_norm: Float[Array, " h"] | None
    frequencies: Float[Array, " half"]  # radians a position
