"""Programs compiled ahead of time, by the compilers of accelerators, on a machine without any.

It shows whether a program compiles, which kernels are in it, its memory and its cost. Nothing is run. The TPU compiler
comes with `jax[tpu]`, the GPU one with `jax[cuda13]`.
"""

import dataclasses
import importlib.util
import os
import re
import tempfile
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding import gpu_program
from sharding.gpu_program import GpuProgram

KERNEL_CALLS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "triton_kernel_call_ffi", "mosaic_gpu_v2", "mosaic_gpu")
# Settings of the TPU's library: it asks no metadata server, and other processes may compile at the same time.
WITHOUT_A_TPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine to compile for: `topology` is the slice's name as its runtime knows it."""

    platform: str
    topology: str


TARGETS = {
    "v5e": Target("tpu", "v5e:2x4"),
    "v5p": Target("tpu", "v5p:2x2x1"),
    "v6e": Target("tpu", "v6e:2x2"),
    "h100": Target("cuda", "1x1x1"),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program: seconds to compile, bytes on a device, work of one run as the compiler counts it, kernels'
    names."""

    seconds: float
    argument_bytes: int
    output_bytes: int
    workspace_bytes: int
    flops: float
    bytes_accessed: float
    kernels: tuple[str, ...]
    gpu: GpuProgram | None = None  # what it starts, where it is a GPU's

    def __str__(self) -> str:
        sizes = (self.argument_bytes, self.output_bytes, self.workspace_bytes, self.bytes_accessed)
        arguments, output, workspace, moved = (f"{size / 2**20:.2f}" for size in sizes)
        return (
            f"{self.seconds:.1f} s to compile; "
            f"MiB: {arguments} in, {output} out, {workspace} workspace, {moved} moved; "
            f"{self.flops / 1e6:.1f} Mflop outside kernels; kernels: {', '.join(self.kernels) or 'none'}"
            f"{f'; {self.gpu}' if self.gpu else ''}"
        )


def missing(target: str) -> str | None:
    """Why this environment cannot compile for a target, or None where it can."""
    if TARGETS[target].platform == "tpu":
        return None if importlib.util.find_spec("libtpu") else "no TPU compiler here: pip install 'jax[tpu]'"
    if not importlib.util.find_spec("jax_cuda13_plugin"):
        return "no GPU compiler here: pip install 'jax[cuda13]'"
    if not os.environ.get("JAX_SKIP_CUDA_CONSTRAINTS_CHECK"):
        return (
            "a machine with no GPU must set JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1, "
            "and name the CUDA libraries in LD_LIBRARY_PATH"
        )
    return None


def mesh_of(target: str, num_devices: int = 1, gpu_config: str = "") -> Mesh:
    """A mesh of a target's devices along the axis "devices". `gpu_config` is the text of XLA's description of the GPU.

    Raises ValueError for an unknown target and for more devices than its slice has.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; known: {', '.join(TARGETS)}")
    described = TARGETS[target]
    if described.platform == "tpu":
        os.environ |= WITHOUT_A_TPU
    options = {"target_config": gpu_config, "topology": described.topology} if described.platform == "cuda" else {}
    name = target if described.platform == "cuda" else described.topology
    devices = topologies.get_topology_desc(name, platform=described.platform, **options).devices
    if num_devices > len(devices):
        raise ValueError(f"{described.topology} has {len(devices)} devices, asked for {num_devices}")
    return Mesh(np.array(devices[:num_devices]), ("devices",))


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
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return Compiled(
        seconds,
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        memory.temp_size_in_bytes,
        cost.get("flops", 0.0),
        cost.get("bytes accessed", 0.0),
        kernels_of(compiled.as_text()),
        gpu,
    )


def kernels_of(program: str) -> tuple[str, ...]:
    """Names of the Pallas kernels that a compiled program calls, one for each call.

    A name is the `name` that pallas_call was given, without the transformations around it.
    """
    targets = [f'custom_call_target="{name}"' for name in KERNEL_CALLS]
    calls = [line for line in program.splitlines() if any(target in line for target in targets)]
    named = (re.search(r'op_name="[^"]*?([^/"()]+)\)*/pallas_call', call) for call in calls)
    return tuple(sorted(match[1] if match else "unnamed" for match in named))
