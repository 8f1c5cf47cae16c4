"""Grouped products: experts with no row, one row, many; tiles that several experts share; rows of no expert."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class GroupedCase:
    """x [sum of sizes + rest, inputs], an expert's weights [outputs, inputs]."""

    sizes: tuple[int, ...]
    inputs: int
    outputs: int
    dtype: str = "bfloat16"
    gated: bool = False
    rest: int = 0

    def __str__(self) -> str:
        parts = [f"{len(self.sizes)}experts", f"{self.rows}x{self.inputs}x{self.outputs}", self.dtype]
        return "-".join([*parts, "gated"] if self.gated else parts)

    @property
    def rows(self) -> int:
        return sum(self.sizes) + self.rest

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.outputs // 2 if self.gated else self.outputs

    def operands(self, seed: int = 0) -> tuple[Array, Array, Array]:
        """(x, w, group sizes); rows after the groups are NaN."""
        keys = jax.random.split(jax.random.key(seed), 2)
        x = jax.random.normal(keys[0], (self.rows, self.inputs), jnp.float32)
        x = jnp.where(jnp.arange(self.rows)[:, None] < sum(self.sizes), x, jnp.nan)
        w = jax.random.normal(keys[1], (len(self.sizes), self.outputs, self.inputs), jnp.float32) * self.inputs**-0.5
        return x.astype(self.dtype), w.astype(self.dtype), jnp.array(self.sizes, jnp.int32)


SMALL = tuple(
    GroupedCase(sizes, inputs, outputs, dtype, gated, rest)
    for dtype in ("bfloat16", "float32")
    for sizes, inputs, outputs, gated, rest in (
        ((5, 0, 17, 1, 20), 320, 200, False, 0),
        ((0, 15, 17, 0, 0, 3), 200, 272, True, 0),
        ((1, 2, 3, 4), 256, 96, False, 33),
        ((0, 0, 0), 130, 48, False, 5),
    )
)

# Qwen3-30B-A3B: 128 experts of 768, 8 of them a token.
DECODER = tuple(
    GroupedCase((tokens * 8 // 128,) * 128, inputs, outputs, gated=gated)
    for tokens in (64, 512)
    for inputs, outputs, gated in ((2048, 1536, True), (768, 2048, False))
)
