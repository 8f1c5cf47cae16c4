"""The mesh that one model is shared on, and where its arrays lie.

Its axes are "data" (replicas, each with its own pages), "expert" and "tensor" (the leaves of sharding/leaves.py).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.leaves import Leaves, LeavesOfDevices

AXES = ("data", "expert", "tensor")
WHOLE = PartitionSpec()


def make_mesh(*, tensor: int = 1, data: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the first data · tensor devices, neighbours along "tensor".

    Raises ValueError where there are fewer.
    """
    devices = jax.devices() if devices is None else list(devices)
    size = data * tensor
    if size > len(devices):
        raise ValueError(
            f"data · tensor = {data} · {tensor} asks for {size} devices, there are {len(devices)} "
            f"({devices[0].device_kind}); on a CPU, jax.config.update('jax_num_cpu_devices', {size}) before the first "
            "array makes as many"
        )
    return Mesh(np.array(devices[:size]).reshape(data, 1, tensor), AXES)


def with_all_axes(mesh: Mesh) -> Mesh:
    """The mesh with all of AXES, those that it lacks of size 1.

    Raises TypeError for what is no mesh, ValueError for an axis that is none of them.
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh with axes of {', '.join(AXES)}, got {mesh!r:.80}")
    unknown = [name for name in mesh.axis_names if name not in AXES]
    if unknown:
        raise ValueError(f"a mesh has the axes {', '.join(AXES)}, got {unknown[0]!r} of {mesh.axis_names}")
    order = [mesh.axis_names.index(name) for name in AXES if name in mesh.axis_names]
    sizes = [mesh.shape.get(name, 1) for name in AXES]
    return Mesh(mesh.devices.transpose(order).reshape(sizes), AXES)


@dataclasses.dataclass(frozen=True)
class Split:
    """Devices that share every weight by leaves, and with them heads and pages: one replica, or several that hold the
    same weights. Hashable.
    """

    mesh: Mesh
    is_entered: bool = False  # inside an `on_each` that runs a whole program, whose parts are each device's own

    @property
    def degree(self) -> int:
        """Devices that share the leaves."""
        return self.mesh.shape["tensor"]

    @property
    def replicas(self) -> int:
        """Runs of devices that hold the same weights, and can share rows."""
        return self.mesh.shape["data"]

    @property
    def leaves(self) -> Leaves:
        """Who has the leaves, as seen inside `on_each`."""
        return LeavesOfDevices("tensor", self.degree)

    def sharding(self, spec: PartitionSpec = WHOLE) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def on_each(self, function: Callable, inputs: Any, outputs: Any) -> Callable:
        """The function on each device's own parts; `inputs` and `outputs` are PartitionSpecs, or trees of them.

        What lies on every device is the same on every device, which is the function's affair. Where the split is
        entered, it is the function itself.
        """
        if self.is_entered:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, check_vma=False)


def on_host(x: Any) -> np.ndarray:
    """All of an array as numpy, wherever its parts lie.

    Of one that is cut over devices of several processes, the others' parts travel here first, so all processes call
    this together.
    """
    if not isinstance(x, jax.Array) or x.is_fully_replicated:
        return np.asarray(x)
    if not x.is_fully_addressable:
        assert isinstance(x.sharding, NamedSharding)
        return np.asarray(jax.device_put(x, NamedSharding(x.sharding.mesh, WHOLE)))
    whole = np.empty(x.shape, x.dtype)  # numpy's own way to it would be kept in x as long as x lives
    for shard in x.addressable_shards:
        whole[shard.index] = shard.data
    return whole


def processes_of(mesh: Mesh | None) -> tuple[int, ...]:
    """The processes whose devices a mesh has, in order; of no mesh, this one."""
    if mesh is None:
        return (jax.process_index(),)
    return tuple(sorted({device.process_index for device in mesh.devices.flat}))


def replicas(mesh: Mesh) -> list[Mesh]:
    """The mesh of each replica, cut along "data"."""
    return [Mesh(mesh.devices[i : i + 1], AXES) for i in range(mesh.shape["data"])]


def own_replica(mesh: Mesh) -> Mesh:
    """The mesh of the first replica that has devices of this process; of the first of all where none has."""
    all_of_them = replicas(mesh)
    return next((each for each in all_of_them if jax.process_index() in processes_of(each)), all_of_them[0])


def joined(copies: Sequence[jax.Array], home: NamedSharding) -> jax.Array:
    """One array at home on a whole mesh, of the copies that its replicas have, in their order; nothing travels."""
    shards = [shard.data for copy in copies for shard in copy.addressable_shards]
    return jax.make_array_from_single_device_arrays(copies[0].shape, home, shards)


def own_parts(x: Any, home: NamedSharding, mesh: Mesh) -> Any:
    """An array of all processes as this process's replica has it: its own part of one that lies on the whole mesh.

    What is not cut over processes, or lies at home already, is given back as it is.
    """
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.sharding.device_set == home.device_set:
        return x
    whole = jax.device_put(x, NamedSharding(mesh, home.spec))
    own = [shard.data for shard in whole.addressable_shards if shard.device in home.device_set]
    return jax.make_array_from_single_device_arrays(x.shape, home, own)
