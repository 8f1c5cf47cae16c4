"""Several processes as one machine: how a process finds its place among them, and small words that they exchange.

`jax.distributed` connects them. What travels here are words of the host, through its key-value store.
"""

import collections
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

# Where a process finds its place: (address of process 0, number of processes, its own number), of the first line whose
# variables are all set. An address in two variables is host and port. What JAX finds by itself comes after: Slurm
# (SLURM_JOB_ID, SLURM_STEP_NODELIST, SLURM_NTASKS, SLURM_PROCID, SLURM_LOCALID), Cloud TPU and GKE's TPU slices
# (the metadata server, or TPU_WORKER_ID and TPU_WORKER_HOSTNAMES; MEGASCALE_* for several slices), Open MPI.
PLACES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "JAX": (("JAX_COORDINATOR_ADDRESS",), "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
    "an indexed Job (GKE JobSet)": (("JAX_COORDINATOR_ADDRESS",), "JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX"),
    "Ray Train": (("MASTER_ADDR", "MASTER_PORT"), "WORLD_SIZE", "RANK"),
}
TIMEOUT = 60  # seconds without a sign of life after which a process counts as dead
_exchanges: collections.Counter[tuple[int, ...]] = collections.Counter()  # so far, by who took part


class Place(NamedTuple):
    """What jax.distributed.initialize takes; None is what JAX is to find by itself."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def found_place(environ: Mapping[str, str] = os.environ) -> Place:
    """The place that the first complete line of PLACES tells. Raises ValueError for a number that is none."""
    for address, count, own in PLACES.values():
        names = (*address, count, own)
        if all(environ.get(name) for name in names):
            return Place(":".join(environ[name] for name in address), _number(environ, count), _number(environ, own))
    return Place()


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ValueError(f"{name} must be a whole number, got {environ[name]!r}") from None


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: int | Sequence[int] | None = None,
    timeout: int = TIMEOUT,
    start_timeout: int = 300,
) -> None:
    """Connect this process with the others of its job; once in each process, before the first array.

    What is not given is found in the environment (PLACES, then what JAX knows: Slurm, Cloud TPU, GKE). Idempotent.
    `coordinator_address` is process 0's "host:port". A process that shows no sign of life for `timeout` seconds ends
    the others; `start_timeout` is how many they wait for each other at the start. Raises ValueError where no place is
    found or it is not the one that this process has already, RuntimeError where JAX is in use already.
    """
    given = Place(coordinator_address, num_processes, process_id)
    if jax.distributed.is_initialized():
        state = jax_distributed.global_state
        has = Place(state.coordinator_address, state.num_processes, state.process_id)
        for name, wanted, is_so in zip(Place._fields, given, has, strict=True):
            if wanted not in (None, is_so):
                raise ValueError(f"this process is connected already, with {name}={is_so!r}: {wanted!r} was given")
        return
    found = found_place()
    place = found._replace(**{name: value for name, value in given._asdict().items() if value is not None})
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # CPUs have no other that crosses processes
    jax.config.update("jax_enable_preemption_service", False)  # it swallows SIGTERM, which then ends nothing
    try:
        jax.distributed.initialize(
            *place,
            local_device_ids=local_device_ids,
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except ValueError as error:
        lines = [f"{who}: {', '.join((*address, *rest))}" for who, (address, *rest) in PLACES.items()]
        raise ValueError(
            f"no place among processes was found ({error}): give coordinator_address, num_processes and process_id, or "
            f"set the variables of one line ({'; '.join(lines)}), or start under Slurm or on a Cloud TPU"
        ) from error


def store() -> Any:
    """The key-value store that all processes share. Raises RuntimeError where they are not connected."""
    client = jax_distributed.global_state.client
    if client is None:
        raise RuntimeError("the processes are not connected: call jaxengine.distributed.initialize() first")
    return client


def next_name(processes: Sequence[int], what: str) -> str:
    """A name for the next exchange among these processes, the same in each of them where they come to it in one order.

    It is the beginning of keys in the store.
    """
    key = tuple(processes)
    _exchanges[key] += 1
    return f"jaxengine/{'-'.join(map(str, key))}/{_exchanges[key]}/{what}/"


def least(value: int, processes: Sequence[int], timeout: int = TIMEOUT) -> int:
    """The smallest of what these processes give; each gives a value and waits for the others.

    Raises TimeoutError that names a process which gives none within `timeout` seconds.
    """
    if len(processes) == 1:
        return value
    name, client = next_name(processes, "least"), store()
    client.key_value_set(f"{name}{jax.process_index()}", str(value))
    values = []
    for process in processes:
        try:
            values.append(int(client.blocking_key_value_get(f"{name}{process}", 1000 * timeout)))
        except jax.errors.JaxRuntimeError as error:
            raise TimeoutError(f"process {process} said nothing within {timeout} s: {error}") from error
    return min(values)


def gathered(own: bytes) -> list[bytes]:
    """What each process gives, in their order; all come here together. It travels from device to device."""
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(len(own))))
    padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    rows = multihost_utils.process_allgather(padded).reshape(len(sizes), -1)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
