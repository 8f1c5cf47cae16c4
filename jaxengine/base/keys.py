"""Which key draws a sample.

Keys are threefry's, whatever the default of the process is: others would draw other tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxengine.base.arguments import integer

THREEFRY = "threefry2x32"


def key_of(words: Any) -> Array:
    """The typed key of two uint32 words, such as jax.random.key_data gives."""
    return jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32), impl=THREEFRY)


def key_data(key: Any) -> tuple[int, int]:
    """The two words of a typed threefry key; raises for anything else."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise TypeError(
            f"key must be a typed key such as jax.random.key(0), got {type(key).__name__}"
            f"{f' of {key.dtype}{list(key.shape)}' if hasattr(key, 'dtype') else ''}"
        )
    if key.shape != () or jax.random.key_impl(key) not in ("fry", THREEFRY):
        raise ValueError(
            f"key must be one threefry key, got {jax.random.key_impl(key)} of shape {key.shape}: "
            f"jax.random.key(0, impl={THREEFRY!r}) is one"
        )
    high, low = np.asarray(jax.random.key_data(key)).tolist()
    return high, low


def seed_data(seed: int) -> tuple[int, int]:
    """The words of jax.random.key(seed), with all 64 bits of the seed: JAX drops the upper half in its 32-bit mode."""
    seed = integer("seed", seed, 0, 2**64 - 1)
    return seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF


def seeded(seed: int) -> Array:
    """jax.random.key(seed), with all 64 bits of the seed."""
    return key_of(seed_data(seed))


def folded(key: Array, *indices: int) -> Array:
    """The key with each index folded in, one after the other; a negative index stands for no fold."""
    for index in indices:
        key = jax.random.fold_in(key, index) if index >= 0 else key
    return key


class CallKeys:
    """The keys of calls that bring none: `fold_in(key, i)` for the i-th of them that was taken."""

    def __init__(self, key: Array) -> None:
        self._key, self._num_taken = key, 0

    @property
    def upcoming(self) -> tuple[int, int]:
        """The words of the next one."""
        return key_data(folded(self._key, self._num_taken))

    def take(self) -> None:
        """The next one is a call's own from now on."""
        self._num_taken += 1


def sample_key(key: Array, prompt_index: int, sample_index: int) -> Array:
    """The key of one sample of a call: with SamplingParams(key=…) and n=1 it draws the same bits again."""
    return folded(key, prompt_index, sample_index)
