"""Query blocks: the unit in which a step hands tokens to the decoder."""

from typing import Any

from jaxtyping import Int

from jaxengine.base.pytree import pytree

Array = Any  # numpy on the host, jax.Array inside a step


@pytree
class QueryBlocks:
    """`counts[b]` consecutive tokens of the sequence in `slots[b]`, the first at position `starts[b]`.

    Padding has count 0.
    """

    slots: Int[Array, " B"]
    starts: Int[Array, " B"]
    counts: Int[Array, " B"]
    num_blocks: Int[Array, ""]
