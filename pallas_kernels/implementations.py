"""Which body of an op runs: chosen once, by name, checked at that moment, never replaced silently.

The names are spelled in this file alone: every op makes its table of bodies with `bodies`. jax is imported only when a
device is asked for, because the command line lists the names without it.
"""

import dataclasses
import difflib
import functools
import logging
from collections.abc import Callable

from pallas_kernels.sizes import INTERPRETED, device_family

PLATFORMS = {
    "xla": None,
    "pallas_tpu": "tpu",
    "pallas_gpu": "gpu",
    "pallas_interpret": None,
    "pallas_gpu_interpret": None,
}  # None: any
OF_A_GPU = ("pallas_gpu", "pallas_gpu_interpret")
log = logging.getLogger("pallas_kernels")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A body's name, and the device whose tile sizes it takes. Hashable, so that a jitted step may hold it."""

    name: str
    device: str

    @property
    def is_interpreted(self) -> bool:
        """Whether a CPU runs it, whatever its own device."""
        return self.device == INTERPRETED

    def __str__(self) -> str:
        return f"{self.name} with the block sizes of {self.device}"


def bodies(reference: Callable, tpu: Callable, gpu: Callable) -> dict[str, Callable]:
    """An op's body for every name in PLATFORMS; "pallas_interpret" is the TPU's, interpreted."""
    of_tpu, of_gpu = (functools.partial(body, interpret=True) for body in (tpu, gpu))
    given = reference, tpu, gpu, of_tpu, of_gpu
    return dict(zip(PLATFORMS, given, strict=True))


def choose(name: str, device_kind: str | None = None) -> Implementation:
    """The implementation of that name for a device kind (the first device's, unless given), logged at INFO.

    "xla" runs anywhere; "pallas_interpret" runs the TPU bodies on any machine, slowly; the others need their own
    devices. Raises ValueError for an unknown name, for a device that has no table of sizes, and for a body that the
    device cannot run.
    """
    if name not in PLATFORMS:
        close = difflib.get_close_matches(str(name), PLATFORMS, n=1)
        nearest = f", did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown implementation {name!r}{nearest} Known: {', '.join(PLATFORMS)}")
    needed = PLATFORMS[name]
    chosen = Implementation(name, INTERPRETED if needed is None else _family(name, needed, device_kind))
    log.info("kernels: %s", chosen)
    return chosen


def _family(name: str, needed: str, device_kind: str | None) -> str:
    """The row of the tables for a device kind. Raises ValueError where the device is not of the platform needed."""
    kind = device_kind or _first_device_kind()
    platform, family = device_family(kind)
    if platform != needed:
        raise ValueError(
            f"implementation {name!r} needs a {needed}, the device is {kind!r}: take 'xla' or 'pallas_{platform}'"
        )
    return family


def _first_device_kind() -> str:
    import jax

    return jax.devices()[0].device_kind
