"""How much of a step's arrays there is to compute."""

import dataclasses

from jaxtyping import Array, Int


@dataclasses.dataclass(frozen=True)
class Live:
    """Rows that stand for tokens: the first `count`, a number that is known at run time only. An implementation that
    works in tiles takes `tile` rows at a time; what comes after the last tile with a live row may be anything.
    """

    tile: int
    count: Int[Array, ""]
