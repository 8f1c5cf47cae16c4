"""Matrix products: small ones of awkward shapes for tests, a decoder's own for measurements."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class MatmulCase:
    """x [rows, inputs] times weights [outputs, inputs]; gated weights are two halves."""

    rows: int
    inputs: int
    outputs: int
    dtype: str = "bfloat16"
    bias: bool = False
    residual: bool = False
    gated: bool = False

    def __str__(self) -> str:
        extras = [name for name in ("bias", "residual", "gated") if getattr(self, name)]
        return "-".join([f"{self.rows}x{self.inputs}x{self.outputs}", self.dtype, *extras])

    @property
    def width(self) -> int:
        """Columns of the result."""
        return self.outputs // 2 if self.gated else self.outputs

    def operands(self, seed: int = 0) -> tuple[Array, Array, Array | None, Array | None]:
        """(x, w, bias, residual), normal; w is so small that results are near 1."""
        keys = jax.random.split(jax.random.key(seed), 4)
        x = jax.random.normal(keys[0], (self.rows, self.inputs), jnp.float32).astype(self.dtype)
        w = jax.random.normal(keys[1], (self.outputs, self.inputs), jnp.float32) * self.inputs**-0.5
        bias = jax.random.normal(keys[2], (self.outputs,), jnp.float32).astype(self.dtype) if self.bias else None
        residual = jax.random.normal(keys[3], (self.rows, self.width), jnp.float32) if self.residual else None
        return x, w.astype(self.dtype), bias, residual


SMALL = tuple(
    case
    for dtype in ("bfloat16", "float32")
    for case in (
        MatmulCase(37, 320, 200, dtype),
        MatmulCase(37, 384, 136, dtype, bias=True),
        MatmulCase(37, 200, 96, dtype, residual=True),
        MatmulCase(37, 264, 272, dtype, gated=True),
        MatmulCase(37, 130, 48, dtype, bias=True, residual=True),
    )
)

# Layers of Qwen3-0.6B and of an 8B: packed projections, attention's output, gated and down MLP.
DECODER = tuple(
    case
    for rows in (8, 64, 512, 2048)
    for case in (
        MatmulCase(rows, 1024, 4096),
        MatmulCase(rows, 2048, 1024, residual=True),
        MatmulCase(rows, 1024, 6144, gated=True),
        MatmulCase(rows, 3072, 1024, residual=True),
        MatmulCase(rows, 4096, 6144, bias=True),
        MatmulCase(rows, 4096, 24576, gated=True),
        MatmulCase(rows, 12288, 4096, residual=True),
    )
)
