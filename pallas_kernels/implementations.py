"""Which body of an op runs: named once, checked at once, never replaced silently.

jax is imported once a device is asked for: the command line lists the names without it.
"""

import dataclasses
import difflib
import logging

from pallas_kernels.sizes import INTERPRETED, device_family

PLATFORMS = {"xla": None, "pallas_tpu": "tpu", "pallas_gpu": "gpu", "pallas_interpret": None}  # None: any
log = logging.getLogger("pallas_kernels")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A choice: the body's name and the device whose block sizes it takes. Hashable, so that a jitted step may hold it."""

    name: str
    device: str

    def __str__(self) -> str:
        return f"{self.name} with the block sizes of {self.device}"


def choose(name: str, device_kind: str | None = None) -> Implementation:
    """The implementation of that name for a device kind (the first device's, unless given), logged at INFO.

    "xla" runs anywhere; "pallas_interpret" runs the TPU bodies on any machine, slowly; the others ask for their own devices.
    Raises ValueError for an unknown name, for a device that has no table of block sizes, and for a body that the device cannot run.
    """
    if name not in PLATFORMS:
        close = difflib.get_close_matches(str(name), PLATFORMS, n=1)
        raise ValueError(
            f"unknown implementation {name!r}{f', did you mean {close[0]!r}?' if close else ''} Known: {', '.join(PLATFORMS)}"
        )
    if name in ("xla", "pallas_interpret"):
        chosen = Implementation(name, INTERPRETED)
    else:
        kind = device_kind or _first_device_kind()
        platform, family = device_family(kind)
        if platform != PLATFORMS[name]:
            raise ValueError(
                f"implementation {name!r} needs a {PLATFORMS[name]}, the device is {kind!r}: "
                f"take 'xla' or 'pallas_{platform}'"
            )
        chosen = Implementation(name, family)
    log.info("kernels: %s", chosen)
    return chosen


def _first_device_kind() -> str:
    import jax

    return jax.devices()[0].device_kind
