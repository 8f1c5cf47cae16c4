"""A trace of one decode step, summed by kernel: which take the time. The trace itself stays in the folder.

A CPU's operations hold others, so there their sum is too high.
"""

import collections
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.profiler import ProfileData

from accelerator_stages import here, models
from accelerator_stages.decode import decode_step
from accelerator_stages.measurement import Measurement, Row, Settings

SHAPE, BATCH, CONTEXT = "qwen3-0.6b-shape", 16, 1024
MOST = 30
# Planes and lines of a profile that hold what ran on a device: a GPU's streams, a TPU's operations, a CPU's threads.
PLACES = {"gpu": ("/device:GPU:", "Stream"), "tpu": ("/device:TPU:", "XLA Ops"), "cpu": ("/host:CPU", "tf_XLA")}
NUMBER = re.compile(r"[._]\d+$")  # that XLA adds to equal names


def measurements(settings: Settings) -> list[Measurement]:
    tiny = here.is_tiny(settings)
    batch, context = models.TINY_DECODES[0] if tiny else (BATCH, CONTEXT)
    run = functools.partial(traced, batch, context, Path(settings.folder) / "trace", tiny)
    return [Measurement(f"B={batch}, context {context}", run)]


def traced(batch: int, context: int, folder: Path, tiny: bool) -> Iterator[Row]:
    llm = models.open_llm(SHAPE, tiny)
    step, _ = decode_step(llm, batch, context)
    for _ in range(2):
        jax.block_until_ready(step())
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(step())
    spent = kernel_times(folder)
    total = sum(sum(times) for times in spent.values())
    if not total:
        raise ValueError(f"the profile names no kernel; it has {places_of(folder)}")
    yield {"kernel": "all", "calls": sum(map(len, spent.values())), "µs": total / 1e3, "share": 1.0}
    for name, times in sorted(spent.items(), key=lambda item: -sum(item[1]))[:MOST]:
        yield {"kernel": name, "calls": len(times), "µs": sum(times) / 1e3, "share": sum(times) / total}


def kernel_times(folder: Path) -> dict[str, list[float]]:
    """Nanoseconds of each run of each kernel on the first device."""
    plane_name, line_name = PLACES[here.platform()]
    spent = collections.defaultdict(list)
    planes = [plane for plane in profile_of(folder).planes if plane.name.startswith(plane_name)]
    for plane in planes[:1]:
        for line in plane.lines:
            for event in line.events if line.name.startswith(line_name) else ():
                spent[short(event.name)].append(event.duration_ns)
    return spent


def profile_of(folder: Path) -> ProfileData:
    """The newest in the folder."""
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    return ProfileData.from_file(str(files[-1]))


def places_of(folder: Path) -> list[str]:
    """The names of all lines in all planes."""
    return [f"{plane.name}: {line.name}" for plane in profile_of(folder).planes for line in plane.lines]


def short(name: str) -> str:
    """A kernel's name without XLA's numbering. A TPU's events are whole instructions; of these, the left side."""
    return NUMBER.sub("", name.split(" = ")[0].lstrip("%"))
