"""What a GPU's kernel keeps of a vocabulary: as the reference does, and of a row alone as in a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import truncation_gpu
from pallas_kernels.implementations import Implementation
from pallas_kernels.sizes import INTERPRETED
from pallas_kernels.truncation import kept
from pallas_kernels.truncation_gpu import TILE
from pallas_kernels.truncation_reference import kept_reference

V = TILE + 1152  # more than one tile, and no whole number of them
ON_CPU = Implementation("pallas_gpu_interpret", INTERPRETED)
on_gpu, reference = jax.jit(functools.partial(kept, implementation=ON_CPU)), jax.jit(kept_reference)
# top-k, top-p, min-p of one row each
SETTINGS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (7, 1.0, 0.0),
    (V, 1.0, 0.0),
    (2**31 - 1, 1.0, 0.0),
    (0, 0.01, 0.0),
    (0, 0.5, 0.0),
    (0, 0.9999, 0.0),
    (0, 0.0, 0.0),
    (0, 1.0, 0.3),
    (40, 0.8, 0.0),
    (3, 1.0, 0.2),
    (20, 0.7, 0.1),
]


def some_logits(kind: str) -> np.ndarray:
    logits = 3 * np.random.RandomState(len(kind)).standard_normal((len(SETTINGS), V)).astype(np.float32)
    if kind == "many ties":
        return np.round(logits)
    if kind == "few are left":
        logits[:, 5:-5] = -np.inf
    return logits


def arrays() -> tuple[jax.Array, ...]:
    top_k, top_p, min_p = zip(*SETTINGS, strict=True)
    return jnp.asarray(top_k, jnp.int32), jnp.asarray(top_p, jnp.float32), jnp.asarray(min_p, jnp.float32)


@pytest.mark.parametrize("kind", ["normal", "many ties", "few are left"])
def test_what_the_reference_keeps(kind):
    """Both sum masses in float32, in another order: these rows' edges lie further from p than the orders differ."""
    logits = some_logits(kind)
    found, expected = (np.asarray(f(logits, *arrays())) for f in (on_gpu, reference))
    for i, setting in enumerate(SETTINGS):
        assert np.array_equal(found[i], expected[i]), f"{setting}: {found[i].sum()} and {expected[i].sum()} are kept"


def test_minus_zero_is_zero():
    logits = np.full((len(SETTINGS), V), -9, np.float32)
    logits[:, [3, 4500, 9, V - 1]] = -0.0, 0.0, 0.0, -0.0
    found = np.asarray(on_gpu(logits, jnp.full(len(SETTINGS), 2, jnp.int32), *arrays()[1:]))
    assert set(np.flatnonzero(found[0])) == {3, 9}


@pytest.mark.parametrize("rows", [1, 3])
def test_a_row_alone_keeps_what_it_keeps_in_a_batch(rows):
    logits = some_logits("normal")
    whole = np.asarray(on_gpu(logits, *arrays()))
    for first in (0, 5, 10):
        part = slice(first, first + rows)
        assert np.array_equal(on_gpu(logits[part], *(x[part] for x in arrays())), whole[part])


def test_a_planted_mistake_is_seen(monkeypatch):
    """Of the ids on an edge none is kept."""
    logits, largest = some_logits("many ties"), truncation_gpu._largest

    def no_ids(enough, first, steps):
        found = largest(enough, first, steps)
        return jnp.zeros_like(found) if first.dtype == np.int32 else found

    monkeypatch.setattr(truncation_gpu, "_largest", no_ids)
    found = kept(logits, *arrays(), implementation=ON_CPU)
    assert not np.array_equal(found, reference(logits, *arrays()))
