"""What the machine is, as jax reports it, and what it does at best."""

import functools
import importlib.metadata
import platform
import re
from collections.abc import Iterator

import jax

from accelerator_stages import here
from accelerator_stages.measurement import Measurement, Row, Settings
from jaxengine.base.machine import DEVICE_PACKAGES

PACKAGES = ("jax", "jaxlib", *DEVICE_PACKAGES)
DRIVER = re.compile(r"(Driver|CUDA) Version: *[\d.]+")


def measurements(settings: Settings) -> list[Measurement]:
    tiny = here.is_tiny(settings)
    return [
        Measurement("device", device),
        Measurement("versions", versions),
        Measurement("copy", functools.partial(copied, tiny)),
        Measurement("bf16 product", functools.partial(multiplied, tiny)),
    ]


def device() -> Iterator[Row]:
    first = jax.devices()[0]
    yield {"is": first.device_kind}
    yield {"is": f"{len(jax.devices())} of {first.platform}"}
    memory = first.memory_stats() or {}
    if "bytes_limit" in memory:
        yield {"is": f"{memory['bytes_limit'] / here.GIB:.1f} GiB for jax"}


def versions() -> Iterator[Row]:
    yield {"is": f"Python {platform.python_version()}"}
    yield {"is": " ".join(jax.devices()[0].client.platform_version.split())}
    told = jax.print_environment_info(return_string=True) or ""
    yield from ({"is": found.group()} for found in DRIVER.finditer(told))
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    yield from ({"is": f"{name} {importlib.metadata.version(name)}"} for name in PACKAGES if name in installed)


def copied(tiny: bool) -> Iterator[Row]:
    yield {"GB/s": here.copy_bandwidth(tiny) / 1e9}


def multiplied(tiny: bool) -> Iterator[Row]:
    yield {"Tflop/s": here.matmul_peak(tiny) / 1e12}
