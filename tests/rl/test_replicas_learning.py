"""Replicas that share an update's micro-batches, or sequences to score, give the bits of one device."""

import dataclasses

import pytest
from conftest import run_script
from jax.sharding import AbstractMesh

from jaxengine.ops.kernels import XLA
from jaxengine.rl.micro_batches import check_shared
from sharding.mesh import AXES, Split


def check(what: str, *meshes: str) -> None:
    found = run_script("rl/replicas_learning.py", what, "1x1", *meshes)
    assert all(found[mesh] == found["1x1"] for mesh in meshes), found


def test_two_replicas_train_as_one():
    check("grpo", "2x1")


def test_two_replicas_score_as_one():
    check("score", "2x1")


def test_weights_go_to_an_engine_on_the_mesh_without_a_copy():
    assert run_script("rl/replicas_learning.py", "weights", "2x2") == {"2x2": {"copied": 0}}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_replicas_of_several_devices_train_as_one(algorithm):
    check(algorithm, "4x1", "2x2", "2x4")


@pytest.mark.slow
def test_replicas_of_several_devices_score_as_one():
    check("score", "4x1", "2x2")


@pytest.mark.slow
def test_gradients_that_the_runtime_adds_are_seen():
    """Two turns of two replicas: in one turn of all, the CPU's psum has the order of one device."""
    one, planted = run_script("rl/replicas_learning.py", "grpo", "1x1", "2x1p").values()
    assert planted["weights"] != one["weights"] and planted["moments"] != one["moments"]


def test_micro_batches_that_replicas_cannot_share_are_refused():
    kernels = dataclasses.replace(XLA, split=Split(AbstractMesh((2, 1, 1), AXES)))
    check_shared(kernels, 4)
    with pytest.raises(ValueError, match=r"2 replicas .* micro_batches=3 .*micro_batches=2"):
        check_shared(kernels, 3)
