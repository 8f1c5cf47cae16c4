"""Arrays that are cut over some devices in one way, on their way to devices that have them cut in another.

`jax.device_put` copies from device to device where both sides have the same parts, and through the host's memory where
they have not (jax 0.10.2, jax/_src/array.py, `shard_sharded_device_array_slow_path`).
"""

from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding


def cut_alike(x: Any, home: Sharding) -> Any:
    """The array on the devices where it is, in the parts that it has at `home`, which device_put copies as they are.

    Where the number of its devices is no multiple of that of `home`, the whole array on one of them. Given back as it
    is what has no NamedSharding, is being traced, or lies on devices of several processes.
    """
    if not isinstance(x, jax.Array) or isinstance(x, Tracer) or not x.is_fully_addressable:
        return x
    if not isinstance(x.sharding, NamedSharding):
        return x
    mesh: Any = x.sharding.mesh
    if mesh.size % home.num_devices:
        return _recut(x, NamedSharding(mesh, PartitionSpec())).addressable_shards[0].data
    sizes, spec = ({}, PartitionSpec()) if not isinstance(home, NamedSharding) else (home.mesh.shape, home.spec)
    copies = Mesh(mesh.devices.reshape(-1, *sizes.values()), ("copy", *sizes))
    return _recut(x, NamedSharding(copies, spec))


def _recut(x: jax.Array, cut: NamedSharding) -> jax.Array:
    return x if x.sharding.is_equivalent_to(cut, x.ndim) else jax.jit(_same, out_shardings=cut)(x)


def _same(x: jax.Array) -> jax.Array:
    return x
