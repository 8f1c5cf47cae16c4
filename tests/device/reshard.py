"""Run by test_resharding.py in a process with eight CPU devices: weights that travel from a trainer's to a sampler's.

Prints, as JSON, for each way the bytes that came to the host by `jax.device_put` alone and by `placed`, and whether
`placed` brought the arrays home as they were; then on which devices an engine's weights lie before it sleeps without
them, and after others have come.
"""

import json
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

jax.config.update("jax_num_cpu_devices", 8)

from conftest import make_llm, random_model  # noqa: E402
from host_memory import bytes_on_host  # noqa: E402

from jaxengine.engine import session  # noqa: E402
from jaxengine.engine.weights import placed  # noqa: E402
from sharding.mesh import make_mesh  # noqa: E402

WAYS = {  # the trainer's devices, the sampler's
    "beside": (slice(0, 2), slice(2, 4)),
    "on the same devices": (slice(0, 2), slice(0, 2)),
    "many to few": (slice(0, 8), slice(2, 4)),
    "few to many": (slice(0, 2), slice(4, 8)),
    "three to four": (slice(0, 3), slice(4, 8)),
    "many to one": (slice(0, 4), slice(6, 7)),
    "one to many": (slice(0, 1), slice(4, 8)),
}
GIVEN = {"matrix": np.arange(4 * 6 * 24, dtype=np.float32).reshape(4, 6, 24), "norm": np.arange(24, dtype=np.float32)}
CUTS = {"matrix": PartitionSpec(None, None, "fsdp"), "norm": PartitionSpec("fsdp")}
HOMES = {"matrix": PartitionSpec("tensor"), "norm": PartitionSpec()}


def travelled(source: slice, target: slice) -> tuple[int, int, bool]:
    trainer, sampler = jax.devices()[source], jax.devices()[target]
    mesh = Mesh(np.array(trainer), ("fsdp",))
    given = jax.device_put(GIVEN, {name: NamedSharding(mesh, cut) for name, cut in CUTS.items()})
    mesh = make_mesh(tensor=len(sampler), devices=sampler)
    homes: Any = {name: NamedSharding(mesh, home) for name, home in HOMES.items()}
    if len(sampler) == 1:
        homes = {name: SingleDeviceSharding(sampler[0]) for name in HOMES}
    alone, _ = bytes_on_host(jax.device_put, given, homes)
    ours, moved = bytes_on_host(placed, given, homes)
    came = [moved[name].sharding == homes[name] and np.array_equal(moved[name], GIVEN[name]) for name in GIVEN]
    return alone, ours, all(came)


def homes_around_a_sleep() -> list[list[int]]:
    config, params = random_model(num_hidden_layers=1, reduction_leaves=2)
    with mock.patch.object(session, "check_mesh"):  # nothing is served
        llm = make_llm(config, params, num_pages=20, mesh=make_mesh(tensor=2, devices=jax.devices()[2:4]))
    before = llm.params
    llm.sleep(2)
    llm.update_params(params)
    trees = (before, llm.params)
    return [sorted({device.id for leaf in jax.tree.leaves(tree) for device in leaf.devices()}) for tree in trees]


if __name__ == "__main__":
    print(json.dumps([{name: travelled(*way) for name, way in WAYS.items()}, homes_around_a_sleep()]))
