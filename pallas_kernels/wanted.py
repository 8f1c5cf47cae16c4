"""What rows ask of an op that goes from hidden states to tokens."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

DRAWN, LIKELIEST = -1, -2  # in the place of a given token


class Wanted(NamedTuple):
    """How each row's token is drawn. A temperature is positive; a top-k of 0, a top-p of 1 and a min-p of 0 are off."""

    fresh: Bool[Array, " t"] | None  # a row that is not has the hidden state of the one before; None: all are
    live: Bool[Array, " t"]  # what is drawn for other rows is not looked at
    temperature: Float[Array, " t"]
    top_k: Int[Array, " t"]
    top_p: Float[Array, " t"]
    min_p: Float[Array, " t"]
    given: Int[Array, " t"]  # a token that is scored, or DRAWN, or LIKELIEST
    uniforms: Float[Array, "t 2"]
