"""Distributions to draw from: flat, steep, cut to few ids, with one id only."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class DrawCase:
    """`rows` rows of normal logits of a width; unless `kept` is 0, all but `kept` ids of a row are -inf."""

    rows: int
    vocab: int
    width: float = 3.0
    kept: int = 0

    def __str__(self) -> str:
        return f"{self.rows}x{self.vocab}-width{self.width:g}{f'-kept{self.kept}' if self.kept else ''}"

    def operands(self, seed: int = 0) -> tuple[Array, Array]:
        """(logits [t, V], uniforms [t, 2])."""
        keys = jax.random.split(jax.random.key(seed), 3)
        logits = self.width * jax.random.normal(keys[0], (self.rows, self.vocab), jnp.float32)
        if self.kept:
            order = jnp.argsort(jax.random.uniform(keys[1], logits.shape), axis=1)
            logits = jnp.where(order < self.kept, logits, -jnp.inf)
        return logits, jax.random.uniform(keys[2], (self.rows, 2))


SMALL = (
    DrawCase(37, 384),
    DrawCase(37, 128 * 131, 1.0),
    DrawCase(37, 1024, 30.0),
    DrawCase(37, 2048, kept=5),
    DrawCase(37, 640, kept=1),
)
DECODER = tuple(DrawCase(rows, vocab) for rows in (8, 64) for vocab in (151_936, 128_256))
