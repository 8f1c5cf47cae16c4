"""Programs compiled ahead of time, by the compilers of accelerators, on a machine without any.

It shows whether a program compiles, which kernels are in it, its memory and its cost. Nothing is run. The TPU compiler
comes with `jax[tpu]`, the GPU one with `jax[cuda13]`.
"""

import dataclasses
import importlib.util
import math
import os
import re
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding import gpu_program
from sharding.collectives import Collective, collectives_of
from sharding.devices import FIGURES, GPUS_OF_A_NODE
from sharding.gpu_program import GpuProgram
from sharding.program_text import (
    Instruction,
    KernelCall,
    float_operations_of,
    instructions_of,
    kernel_calls_of,
    started_of,
)

GPU_CONFIG = Path(__file__).parent / "targets" / "h100.pbtxt"  # XLA's description of an H100
# Settings of the TPU's library: it asks no metadata server, and other processes may compile at the same time.
WITHOUT_A_TPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine to compile for: `topology` is its name as the runtime knows it, `generation` a row of devices.py."""

    generation: str
    platform: str
    topology: str

    def __str__(self) -> str:
        return self.topology if self.platform == "tpu" else f"{self.generation}:{self.num_devices}"

    @property
    def num_devices(self) -> int:
        return math.prod(map(int, self.topology.split(":")[-1].split("x")))


def target_of(text: str) -> Target:
    """A target from "v5p:2x2x4" (chips along each axis of a TPU slice) or "h100:8" (GPUs, in nodes of 8).

    Raises ValueError for every other form.
    """
    generation, _, shape = text.partition(":")
    kinds = ", ".join(FIGURES)
    if generation not in FIGURES:
        raise ValueError(f"unknown device {generation!r} in the topology {text!r}; known: {kinds}")
    figures = FIGURES[generation]
    if figures.platform == "cuda":
        if not re.fullmatch(r"[1-9]\d*", shape) or int(shape) > GPUS_OF_A_NODE and int(shape) % GPUS_OF_A_NODE:
            raise ValueError(f"a topology of GPUs is like h100:8, with up to 8 or whole nodes of 8, got {text!r}")
        nodes = max(1, int(shape) // GPUS_OF_A_NODE)
        return Target(generation, "cuda", f"1x{nodes}x{int(shape) // nodes}")
    axes = "x".join(["[1-9]\\d*"] * figures.axes)
    if not re.fullmatch(axes, shape):
        raise ValueError(f"a slice of {generation} has {figures.axes} axes, like {figures.example}, got {text!r}")
    return Target(generation, "tpu", text)


TARGETS = {
    name: target_of(text)
    for name, text in {"v5e": "v5e:2x4", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "h100": "h100:8"}.items()
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program: seconds to compile, bytes on a device, and what it does."""

    seconds: float
    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # of the output, that lie where arguments were
    workspace_bytes: int
    calls: tuple[KernelCall, ...]  # of Pallas kernels
    float_operations: tuple[Instruction, ...] = ()  # outside kernels
    started: int = 0  # kernels, fusions, copies …; those of a loop's body once
    loops: int = 0
    conditionals: int = 0
    collectives: tuple[Collective, ...] = ()
    gpu: GpuProgram | None = None  # what it starts, where it is a GPU's

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of the Pallas kernels that it calls, one for each call."""
        return tuple(call.name for call in self.calls)

    @property
    def launches(self) -> int:
        """What a device starts one after the other; of a loop's body once."""
        return self.gpu.launches if self.gpu else self.started

    @property
    def beside_arguments(self) -> int:
        """Bytes that a run takes beside its arguments."""
        return self.workspace_bytes + self.output_bytes - self.alias_bytes

    def __str__(self) -> str:
        sizes = self.argument_bytes, self.output_bytes, self.workspace_bytes
        arguments, output, workspace = (f"{size / 2**20:.2f}" for size in sizes)
        kernels = ", ".join(f"{name} {count}" for name, count in Counter(self.kernels).items())
        return (
            f"{self.seconds:.1f} s to compile; "
            f"MiB: {arguments} in, {output} out, {workspace} workspace; "
            f"{self.launches} launches, {self.loops} loops, {self.conditionals} conditionals, "
            f"{len(self.float_operations)} float operations outside kernels; kernels: {kernels or 'none'}"
            f"{f'; {self.gpu}' if self.gpu else ''}"
        )


def missing(target: Target) -> str | None:
    """Why this environment cannot compile for a target, or None where it can."""
    if target.platform == "tpu":
        return None if importlib.util.find_spec("libtpu") else "no TPU compiler here: pip install 'jax[tpu]'"
    if not importlib.util.find_spec("jax_cuda13_plugin"):
        return "no GPU compiler here: pip install 'jax[cuda13]'"
    if not os.environ.get("JAX_SKIP_CUDA_CONSTRAINTS_CHECK"):
        return (
            "a machine with no GPU must set JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1, "
            "and name the CUDA libraries in LD_LIBRARY_PATH"
        )
    return None


def devices_of(target: Target) -> list[Any]:
    """A target's devices, described and not there. Raises ValueError for a slice that there is none of."""
    options = {}
    if target.platform == "tpu":
        os.environ |= WITHOUT_A_TPU
    else:
        options = {"target_config": GPU_CONFIG.read_text(), "topology": target.topology}
    name = target.topology if target.platform == "tpu" else target.generation
    try:
        return list(topologies.get_topology_desc(name, platform=target.platform, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"the compiler knows no topology {target}: {error}") from error


def mesh_of(target: Target) -> Mesh:
    """A mesh of the first of a target's devices alone."""
    return Mesh(np.array(devices_of(target)[:1]), ("devices",))


def compile_ahead(mesh: Mesh, jitted: Any, *args: Any, **static: Any) -> Compiled:
    """Compile a jitted function for the mesh's devices. Arguments are arrays or shapes; without a sharding,
    replicated."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(x, "sharding", None)
        sharding = sharding if isinstance(sharding, NamedSharding) else replicated
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    on_gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        lowered = jitted.lower(*jax.tree.map(placed, args), **static)
        compiled = lowered.compile(gpu_program.dumping(folder) if on_gpu else None)
        seconds = time.monotonic() - start
        gpu = gpu_program.read(folder) if on_gpu else None
    memory, text = compiled.memory_analysis(), compiled.as_text()
    instructions = tuple(instructions_of(text))
    kinds = Counter(instruction.kind for instruction in instructions)
    return Compiled(
        seconds,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        kernel_calls_of(instructions),
        float_operations_of(instructions),
        len(started_of(instructions)),
        kinds["while"],
        kinds["conditional"],
        collectives_of(text),
        gpu,
    )
