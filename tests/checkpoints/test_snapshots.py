"""Snapshots: what is read back has the bits that were written, and what does not fit is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import snapshots


def state(scale: float = 1.0) -> dict:
    odd = np.array([0x7FC00001, 0x80000000, 0x00000001, 0x7F800000], np.uint32).view(
        np.float32
    )  # a NaN's payload, -0, a denormal, inf
    return {
        "weights": (jnp.asarray(odd), scale * jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)),
        "step": jnp.int32(7),
        "key": jax.random.key_data(jax.random.key(3)),
        "nothing": None,
    }


def bytes_of(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def test_the_same_bits_come_back(tmp_path):
    snapshots.save(tmp_path, 3, state())
    found = snapshots.restore(tmp_path, jax.tree.map(jnp.zeros_like, state()))
    assert bytes_of(found) == bytes_of(state()) and jax.tree.structure(found) == jax.tree.structure(state())


def test_the_newest_are_kept_and_the_newest_is_read(tmp_path):
    for step in (1, 2, 10):
        snapshots.save(tmp_path, step, state(step), keep=2)
    (tmp_path / "step_00000011.orbax-checkpoint-tmp").mkdir()  # of a process that died while it wrote
    assert snapshots.steps(tmp_path) == [2, 10]
    assert bytes_of(snapshots.restore(tmp_path, state())) == bytes_of(state(10))
    assert bytes_of(snapshots.restore(tmp_path, state(), 2)) == bytes_of(state(2))


def test_what_is_not_there_or_does_not_fit(tmp_path):
    assert snapshots.steps(tmp_path / "new") == []
    with pytest.raises(FileNotFoundError, match="has no snapshot; it has steps"):
        snapshots.restore(tmp_path / "new", state())
    snapshots.save(tmp_path, 1, state())
    with pytest.raises(FileNotFoundError, match=r"no snapshot of step 4; it has steps \[1\]"):
        snapshots.restore(tmp_path, state(), 4)
    with pytest.raises(ValueError, match="has a snapshot of step 1 already"):
        snapshots.save(tmp_path, 1, state())
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        snapshots.save(tmp_path, 2, state(), keep=0)
    other = state() | {"step": jnp.float32(7), "more": jnp.zeros(2)}
    with pytest.raises(
        ValueError,
        match=r"2 arrays differ:\n  more: nothing in the snapshot, float32\[2\] asked for\n  step: int32\[\]",
    ):
        snapshots.restore(tmp_path, other)
