"""Packed arrays come out again bit for bit."""

import jax
import numpy as np

from jaxengine.device.packed import pack
from jaxengine.device.step_inputs import Rows

FLOATS = np.array([[1.5, -0.0, np.inf], [0.0, 1e-45, -np.nan]], np.float32)
TREE = {
    "rows": Rows(*(np.arange(3, dtype=np.int32) - 1,) * 3, np.array([True, False, True]), np.int32(2)),
    "floats": (FLOATS, FLOATS.T),
    "keys": np.array([[0, 2**32 - 1]], np.uint32),
    "nothing": np.zeros((0, 4), np.int32),
}


@jax.jit
def unpacked(packed):
    return packed.unpack()


def test_a_tree_comes_out_as_it_went_in():
    found = unpacked(pack(TREE))
    assert jax.tree.structure(found) == jax.tree.structure(TREE)
    for a, b in zip(jax.tree.leaves(TREE), jax.tree.leaves(found), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()


def test_it_is_one_array_and_equal_layouts_are_compiled_once():
    assert len(jax.tree.leaves(pack(TREE))) == 1
    unpacked(pack(TREE))
    size = unpacked._cache_size()
    unpacked(pack(jax.tree.map(lambda x: np.zeros_like(x), TREE)))
    assert unpacked._cache_size() == size
