"""Query blocks: the unit in which a step hands tokens to the decoder."""

from typing import Any

from jaxtyping import Int

from jaxengine.base.pytree import pytree

Array = Any  # numpy on the host, jax.Array inside a step


@pytree
class QueryBlocks:
    """`counts[b]` consecutive tokens of the sequence in `slots[b]`, the first at position `starts[b]`.

    Padding has count 0. Tokens are rows of what the layers compute: of each block there are equally many, or, where
    `first_rows` are given, as many as the block has tokens, one block's after the other's.
    """

    slots: Int[Array, " B"]
    starts: Int[Array, " B"]
    counts: Int[Array, " B"]
    num_blocks: Int[Array, ""]
    first_rows: Int[Array, " B"] | None = None  # of each block's first token

    def num_rows(self, tokens: int) -> Array:
        """Rows up to the last token; blocks have `tokens` of them, where they have equally many."""
        if self.first_rows is None:
            return self.num_blocks * tokens
        last = self.num_blocks - 1
        return self.first_rows[last] + self.counts[last]
