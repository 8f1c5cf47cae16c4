"""The machine underneath: its processor, what XLA was told about code for it, and the host's memory, free and used."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
CPU_NAMES = (
    "vendor_id",
    "cpu family",
    "model",
    "model name",
    "CPU implementer",
    "CPU part",
)  # of x86 and of ARM, in /proc/cpuinfo
CPU_FEATURES = (
    "sse4_2",
    "avx",
    "fma",
    "f16c",
    "amx",
    "asimd",
    "sve",
    "bf16",
    "i8mm",
)  # beginnings: XLA generates code for these
# Where a device's compiler comes from, of what JAX's extras tpu, cuda12 and cuda13 install.
DEVICE_PACKAGES = (
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda12-pjrt",
    "nvidia-cuda-nvcc-cu12",
    "nvidia-cudnn-cu12",
    "nvidia-cublas-cu12",
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
    "nvidia-cuda-nvcc",
    "nvidia-cudnn-cu13",
    "nvidia-cublas",
)
FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
HARMLESS_FLAGS = (
    "xla_force_host_platform_device_count",
    "xla_dump_",
    "xla_hlo_profile",
)  # beginnings of those that change no code
INSTRUCTION_FLAGS = ("xla_cpu_max_isa", "xla_cpu_prefer_vector_width")


def device(any_processor: bool = False) -> dict[str, Any]:
    """The kind of the device; of a CPU also its model, and the instruction sets and threads that sums depend on.

    For code to which `any_processor` of the kind is the same, the kind alone.
    """
    first = jax.devices()[0]
    return {"kind": first.device_kind} | (_cpu() if first.platform == "cpu" and not any_processor else {})


def compiler() -> dict[str, str]:
    """The device's compiler, where it is no part of jaxlib: what the runtime says of itself, and its packages."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        return {}
    packages = {name: _version(name) for name in DEVICE_PACKAGES}
    return {"runtime": device.client.platform_version} | {name: text for name, text in packages.items() if text}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def num_threads() -> int:
    """Threads among which XLA's CPU client divides a product: as many as this process may use cores, or as NPROC says
    (xla/pjrt/utils.cc, DefaultThreadPoolSize).
    """
    told = os.environ.get("NPROC", "")
    if told.isdecimal() and int(told) > 0:
        return int(told)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    return _cpu_info().get("model name", platform.machine())


def _cpu_info() -> dict[str, str]:
    """What Linux tells of the first processor."""
    pairs = [line.partition(":") for line in (_read(PROC / "cpuinfo") or "").split("\n\n")[0].splitlines()]
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cpu() -> dict[str, Any]:
    known = _cpu_info()
    features = known.get("flags", known.get("Features", "")).split()
    model = ", ".join(known[name] for name in CPU_NAMES if name in known)
    return {
        "model": model or platform.processor() or platform.machine(),
        "features": sorted(name for name in features if name.startswith(CPU_FEATURES)),
        "threads": num_threads(),
    }


def compiler_flags(any_processor: bool = False) -> dict[str, str]:
    """What the environment, or a file that it names, tells XLA, but for what changes no code.

    The last of several of one name counts. For code to which `any_processor` is the same, without those that choose
    instructions.
    """
    texts = [os.environ.get(name, "").strip() for name in FLAG_VARIABLES]
    words = [word for text in texts for word in (text if text.startswith("-") else _read(Path(text)) or "").split()]
    pairs = [word.lstrip("-").partition("=") for word in words]
    harmless = HARMLESS_FLAGS + (INSTRUCTION_FLAGS if any_processor else ())
    return {name: value for name, _, value in pairs if not name.startswith(harmless)}


def free_memory() -> int:
    """Bytes that programs can have on this host without swapping.

    What Linux calls available, or what is left to the control group.
    """
    lines = (_read(PROC / "meminfo") or "").splitlines()
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    unused = 1024 * kilobytes[0] if kilobytes else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return max(0, min([unused, *_left_to_groups()]))


def peak_memory(pid: int) -> int | None:
    """The most bytes that a process has had in memory since its program began; None where the machine is not Linux.

    Not resource.getrusage, whose mark a process inherits from the one that started it.
    """
    lines = (_read(PROC / str(pid) / "status") or "").splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def _left_to_groups() -> Iterator[int]:
    """What each control group (version 2) over this process may still take.

    Its cached files make room when asked to.
    """
    own = [
        line.removeprefix("0::/")
        for line in (_read(PROC / "self/cgroup") or "").splitlines()
        if line.startswith("0::/")
    ]
    for group in (CGROUPS / own[0], *(CGROUPS / own[0]).parents) if own else ():
        limit, current, stat = (_read(group / f"memory.{name}") for name in ("max", "current", "stat"))
        if limit and current and limit.strip() != "max":
            cached = [int(line.split()[1]) for line in (stat or "").splitlines() if line.startswith("inactive_file ")]
            yield int(limit) - int(current) + sum(cached)


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
