"""The device of this process: its kernels, and what it does at best."""

import functools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from accelerator_stages.measurement import Settings
from jaxengine.ops.kernels import OF_PLATFORM
from pallas_kernels.implementations import Implementation, choose
from sharding import gpu_program

GIB = 2**30
WIDTH = 8192  # of the square product that tells the peak


def platform() -> str:
    """cpu, gpu or tpu."""
    return jax.devices()[0].platform


def is_tiny(settings: Settings) -> bool:
    return settings.tiny or platform() == "cpu"


def own_kernels() -> Implementation:
    """The device's; a CPU interprets the TPU's."""
    return choose(OF_PLATFORM[platform()] if platform() != "cpu" else "pallas_interpret")


def seconds(function: Callable, operands: tuple, repeats: int) -> float:
    """The shortest of three means over `repeats` calls."""
    jax.block_until_ready(function(*operands))
    means = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            out = function(*operands)
        jax.block_until_ready(out)
        means.append((time.perf_counter() - start) / repeats)
    return min(means)


def compiled(lowered: Any, options: dict[str, str], files: str) -> tuple[Any, str]:
    """(the compiled function, what XLA's GPU compiler dumped into files of that pattern: "" on other devices)."""
    if platform() != "gpu":
        return lowered.compile(compiler_options=options), ""
    with tempfile.TemporaryDirectory() as folder:
        dump = gpu_program.dumping(folder) | {"xla_dump_emitter_re": "^[^t]"}  # PTX too
        function = lowered.compile(compiler_options=options | dump)
        return function, "".join(file.read_text() for file in Path(folder).rglob(files))


@functools.cache
def copy_bandwidth(is_tiny: bool) -> float:
    """Bytes per second, read and written, of copying a GiB (a MiB where shapes are tiny)."""
    size = GIB >> (10 if is_tiny else 0)
    return 2 * size / seconds(jax.jit(lambda x: x + 1), (jnp.zeros(size // 4, jnp.float32),), 20)


@functools.cache
def matmul_peak(is_tiny: bool) -> float:
    """Floating point operations per second of XLA's square bf16 dot of random numbers."""
    width = WIDTH >> (5 if is_tiny else 0)
    x = jax.random.normal(jax.random.key(0), (width, width), jnp.bfloat16)
    return 2 * width**3 / seconds(jax.jit(lambda a, b: a @ b.T), (x, x), 20)
