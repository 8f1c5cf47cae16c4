"""Which devices of Tunix's rollout mesh share the weights and which are replicas; needs no Tunix."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxengine.rl.integrations.tunix_mesh import engine_mesh
from sharding.mesh import AXES


def mesh_of(**sizes: int) -> Any:
    """As much of a mesh as is read here, with a number in each device's place."""
    shape = tuple(sizes.values())
    devices = np.arange(np.prod(shape)).reshape(shape)
    return SimpleNamespace(shape=sizes, axis_names=tuple(sizes), devices=devices, size=devices.size, empty=False)


def read(mesh: Any, tensor: int = -1, data: int = -1, expert: int = 1) -> Any:
    config = SimpleNamespace(tensor_parallel_size=tensor, data_parallel_size=data, expert_parallel_size=expert)
    return engine_mesh(mesh, config)


@pytest.fixture
def numbers(monkeypatch):
    """Meshes of numbers instead of devices: `[replica][number]`."""

    def made(*, tensor: int, data: int, devices: Any) -> list[list[int]]:
        return np.array(list(devices)).reshape(data, tensor).tolist()

    monkeypatch.setattr("jaxengine.rl.integrations.tunix_mesh.make_mesh", made)


@pytest.mark.parametrize(
    "sizes, replicas",
    [
        (dict(fsdp=1, tp=2), [[0, 1]]),
        (dict(fsdp=2, tp=1), [[0], [1]]),
        (dict(fsdp=2, tp=2), [[0, 1], [2, 3]]),
        (dict(tp=2, fsdp=2), [[0, 2], [1, 3]]),
        (dict(data=2, model=2), [[0, 1], [2, 3]]),
        (dict(data=2, tensor=2), [[0, 1], [2, 3]]),
        (dict(tp=2, dp=2, sequence=1, fsdp=1), [[0, 2], [1, 3]]),
        (dict(dp=2, tp=2, fsdp=2), [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
)
def test_names_say_which_devices_share_the_weights(numbers, sizes, replicas):
    assert read(mesh_of(**sizes)) == replicas


@pytest.mark.parametrize(
    "given, replicas",
    [
        (dict(tensor=2), [[0, 1], [2, 3]]),
        (dict(data=1), [[0, 1, 2, 3]]),
        (dict(tensor=1, data=4), [[0], [1], [2], [3]]),
    ],
)
def test_given_sizes_count_and_names_do_not(numbers, given, replicas):
    assert read(mesh_of(tp=2, attention=2), **given) == replicas


@pytest.mark.parametrize(
    "sizes, given, message",
    [
        (
            dict(fsdp=1, expert=2),
            {},
            "2 devices along 'expert'.*tp, tensor, model.*fsdp, dp, data.*tensor_parallel_size",
        ),
        (dict(fsdp=4), dict(tensor=3), "tensor_parallel_size=3 and data_parallel_size=-1, .* 4 devices"),
        (dict(fsdp=4), dict(tensor=2, data=1), "tensor_parallel_size=2 and data_parallel_size=1, .* 4 devices"),
        (dict(fsdp=4), dict(data=8), "data_parallel_size=8, .* 4 devices"),
        (dict(fsdp=4), dict(tensor=0), "tensor_parallel_size must be at least 1, got 0"),
        (dict(fsdp=4), dict(expert=2), "expert_parallel_size=1, got 2"),
    ],
)
def test_what_cannot_be_read_is_refused(numbers, sizes, given, message):
    with pytest.raises(ValueError, match=message):
        read(mesh_of(**sizes), **given)


def test_real_meshes():
    device = np.array(jax.devices()[:1])
    mesh = read(Mesh(device.reshape(1, 1), ("fsdp", "tp")))
    assert mesh.axis_names == AXES and mesh.devices.item() is device[0]
    with pytest.raises(ValueError, match="no devices"):
        read(Mesh(np.empty((), object), ()))
