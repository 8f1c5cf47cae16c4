"""Throughput and a first token's time: workloads on this engine and on a peer in its own interpreter, in turns.

In a notebook:

    llm = bench.open_model("qwen3-0.6b-shape", dtype="bfloat16")
    results = bench.measure([bench.Ours(llm)], [bench.Decode(8), bench.Group()])
    print(bench.table(results))
"""

import contextlib
import dataclasses
import importlib.metadata
import math
import os
import platform
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jaxengine import __version__
from jaxengine.base.machine import cpu_name, num_threads
from jaxengine.command.bench_models import ENGINE, SHAPES, open_model, room, write_config
from jaxengine.command.ours import Ours
from jaxengine.command.peer import Peer
from jaxengine.command.workloads import RATE, Decode, FirstToken, Group, System, Workload
from jaxengine.llm import LLM

__all__ = [
    "ENGINE",
    "SHAPES",
    "Decode",
    "FirstToken",
    "Group",
    "Ours",
    "Peer",
    "compilations",
    "machine",
    "measure",
    "open_model",
    "record",
    "room",
    "table",
    "write_config",
]
COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Result:
    """A figure of each repeat, and how many functions were compiled while the clock ran (None if unknown).

    `settings` are the workload's. `peak_memory` is the most bytes that the system's process has had in memory from its
    start to the workload's end (None if the machine does not tell).
    """

    workload: str
    settings: dict[str, Any]
    system: str
    figure: str
    values: list[float]
    compilations: int | None
    peak_memory: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.values) if all(map(math.isfinite, self.values)) else math.nan


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the functions that XLA compiles inside the block."""
    names: list[str] = []

    def listener(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILED:
            names.append(str(kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def say_nothing(text: str) -> None:
    pass


def measure(
    systems: Sequence[System],
    workloads: Sequence[Workload],
    repeats: int = 3,
    report: Callable[[str], None] = say_nothing,
) -> list[Result]:
    """Each workload on each system: a warm-up that does not count, then `repeats` runs, the systems in turns.

    Every run has prompts of its own.
    """
    results = []
    for system in systems:
        report(f"warming up {system.name} …")
        system.warm_up()
    for workload in workloads:
        able = [system for system in systems if workload.kind in system.workloads]
        found = [defaultdict[str, list[float]](list) for _ in able]
        compiled = [0 for _ in able]
        for system in able:
            report(f"warming up {workload} on {system.name} …")
            workload.warm_up(system)
        for repeat in range(repeats):
            for index, system in enumerate(able):
                with compilations() as names:
                    figures = workload.figures(system, repeat)
                shown = ", ".join(f"{value:.2f} {figure}" for figure, value in figures.items())
                report(f"{workload} on {system.name}, run {repeat + 1} of {repeats}: {shown}")
                for figure, value in figures.items():
                    found[index][figure].append(value)
                compiled[index] += len(names)
        settings = {"kind": workload.kind} | dataclasses.asdict(workload)
        peaks = [system.peak_memory() for system in able]
        results += [
            Result(
                str(workload),
                settings,
                system.name,
                figure,
                own[figure],
                count if isinstance(system, Ours) else None,
                peak,
            )
            for figure in (found[0] if found else ())
            for system, own, count, peak in zip(able, found, compiled, peaks, strict=True)
        ]
    return results


def machine() -> dict[str, Any]:
    """Where the figures come from. `load` is the machine's load average of the last minute, and
    `threads` as many as this process computes with.
    """
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": num_threads(),
        "load": os.getloadavg()[0],
        "device": device.device_kind,
        "platform": device.platform,
        "python": platform.python_version(),
        "jaxengine": __version__,
        **versions,
    }


def table(results: Sequence[Result]) -> str:
    """Lines of text: each figure, and the ratio of the first system of each workload to each other one."""
    first: dict[tuple[str, str], Result] = {}
    names = f"{'workload':<20}{'system':<14}{'median':>9} {'of':<22}{'(min - max)':<20}"
    lines = [f"{names}{'compiled':>8}{'peak MB':>9}  jaxengine is"]
    for result in results:
        base = first.setdefault((result.workload, result.figure), result)
        compiled = "" if result.compilations is None else result.compilations
        peak = "" if result.peak_memory is None else f"{result.peak_memory / 1e6:.0f}"
        between = f"({min(result.values):.2f} - {max(result.values):.2f})"
        head = f"{result.workload:<20}{result.system:<14}{result.median:>9.2f} {result.figure:<22}{between:<20}"
        lines.append(f"{head}{compiled:>8}{peak:>9}  {'' if base is result else _ratio(base, result)}".rstrip())
    return "\n".join(lines)


def _ratio(base: Result, other: Result) -> str:
    if base.figure == RATE:
        return f"{base.median / other.median:.2f} times as fast"
    return f"{base.median / other.median:.2f} times as long"


def record(
    llm: LLM, model: str, where: dict[str, Any], results: Sequence[Result], peers: dict[str, Any]
) -> dict[str, Any]:
    """Everything that a reader of the figures has to know, ready for JSON.

    `where` is `machine()`; `peers` holds the versions of each peer.
    """
    return {
        "machine": where,
        "model": model,
        "dtype": llm.config.dtype,
        "engine": dataclasses.asdict(llm.engine_config),
        "peers": peers,
        "results": [_to_json(result) for result in results],
    }


def _to_json(result: Result) -> dict[str, Any]:
    return dataclasses.asdict(result) | {"values": [*map(_number, result.values)], "median": _number(result.median)}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
