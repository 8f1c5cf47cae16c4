"""Tunix's rollout mesh as the engine's; it needs no Tunix itself."""

import math
from typing import Any

from jax.sharding import Mesh

from jaxengine.base.arguments import integer
from sharding.mesh import make_mesh

REPLICAS = ("fsdp", "dp", "data")  # as Tunix's examples name the axes of its meshes, those for its other engines too
SHARED = ("tp", "tensor", "model")
SIZES = ("tensor_parallel_size", "data_parallel_size")


def engine_mesh(mesh: Mesh, rollout_config: Any) -> Mesh:
    """The devices of a rollout mesh on the engine's axes (sharding/mesh.py).

    Devices along "tp", "tensor" or "model" share the leaves of every weight: the engine's "tensor". Devices along
    "fsdp", "dp" or "data" belong to different replicas, each with all weights, and with pages and requests of its own:
    the engine's "data"; it does not cut weights along "fsdp". An axis of another name may have one device.

    Where the RolloutConfig gives `tensor_parallel_size` or `data_parallel_size` (-1: not given), names of axes do not
    count: the devices, in their order in the mesh, are cut into replicas of `tensor_parallel_size` neighbours. Raises
    ValueError for a mesh without devices, for several of them along an axis of another name, for sizes that do not make
    up the mesh, and for an `expert_parallel_size`.
    """
    if mesh.empty:
        raise ValueError("the rollout mesh has no devices: give ClusterConfig.role_to_mesh one for Role.ROLLOUT")
    if rollout_config.expert_parallel_size != 1:
        raise ValueError(
            f"no model here has experts: leave expert_parallel_size=1, got {rollout_config.expert_parallel_size}"
        )
    given = {name: getattr(rollout_config, name) for name in SIZES}
    if set(given.values()) != {-1}:
        tensor, data = _completed(given, mesh.size)
        return make_mesh(tensor=tensor, data=data, devices=list(mesh.devices.flat))
    for name, size in mesh.shape.items():
        if size > 1 and name not in (*REPLICAS, *SHARED):
            raise ValueError(
                f"the rollout mesh has {size} devices along {name!r}: devices that share the weights lie along one of "
                f"{', '.join(SHARED)}, replicas along one of {', '.join(REPLICAS)}; rename the axis, or give "
                f"RolloutConfig {' and '.join(SIZES)}"
            )
    is_shared = [name in SHARED for name in mesh.axis_names]
    order = sorted(range(len(is_shared)), key=is_shared.__getitem__)  # replicas first
    tensor = math.prod(size for name, size in mesh.shape.items() if name in SHARED)
    devices = mesh.devices.transpose(order)
    return make_mesh(tensor=tensor, data=mesh.size // tensor, devices=list(devices.flat))


def _completed(given: dict[str, int], num_devices: int) -> tuple[int, int]:
    """Both of SIZES, one that is -1 from the other."""
    tensor, data = (size if size == -1 else integer(name, size, 1) for name, size in given.items())
    tensor = num_devices // data if tensor == -1 else tensor
    data = num_devices // tensor if data == -1 else data
    if tensor * data != num_devices:
        raise ValueError(
            f"RolloutConfig has {' and '.join(f'{name}={size}' for name, size in given.items())}, the rollout mesh has "
            f"{num_devices} devices: their product has to be that, where -1 is what the other one leaves"
        )
    return tensor, data
