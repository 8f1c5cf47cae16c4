"""Throughput: the decode and group workloads, on this engine and on a peer that runs in its own interpreter, in turns.

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
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from jaxengine import __version__
from jaxengine.base.machine import cpu_name
from jaxengine.command.bench_models import ENGINE, SHAPES, open_model, write_config
from jaxengine.command.peer import Peer
from jaxengine.command.workloads import Decode, Group, Prompts, System, Workload
from jaxengine.llm import LLM
from jaxengine.sampling_params import SamplingParams

__all__ = [
    "ENGINE",
    "SHAPES",
    "Decode",
    "Group",
    "Ours",
    "Peer",
    "compilations",
    "machine",
    "measure",
    "open_model",
    "record",
    "table",
    "write_config",
]
COMPILED = "/jax/core/compile/backend_compile_duration"


class Ours:
    """An LLM as a system."""

    name, workloads = "jaxengine", ("decode", "group")

    def __init__(self, llm: LLM) -> None:
        self.llm, self.vocab_size = llm, llm.config.vocab_size

    def warm_up(self) -> None:
        """Compile every step, however rarely the workloads run it."""
        self.llm.warm_up()

    def seconds(self, prompts: Prompts, lengths: list[int], logprobs: bool) -> float:
        """Seconds of one call. The logprobs of the sampled tokens are computed with or without `logprobs`."""
        params = exact_lengths(lengths)
        start = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        spent = time.perf_counter() - start
        drawn = [len(output.outputs[0].token_ids) for output in outputs]
        if drawn != lengths:
            raise ValueError(f"the workload asks for {lengths} tokens and got {drawn}: raise max_model_len")
        return spent


def exact_lengths(lengths: list[int]) -> list[SamplingParams]:
    """Parameters of samples with so many tokens each, neither more nor fewer, and no text."""
    return [SamplingParams(max_tokens=n, min_tokens=n, ignore_eos=True, detokenize=False) for n in lengths]


@dataclasses.dataclass(frozen=True)
class Result:
    """Tokens per second of each repeat, and how many functions were compiled while the clock ran (None if unknown)."""

    workload: str
    system: str
    rates: list[float]
    compilations: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.rates) if all(map(math.isfinite, self.rates)) else math.nan


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
        rates: list[list[float]] = [[] for _ in able]
        compiled = [0 for _ in able]
        for system in able:
            report(f"warming up {workload} on {system.name} …")
            workload.warm_up(system)
        for repeat in range(repeats):
            for index, system in enumerate(able):
                with compilations() as names:
                    rates[index].append(workload.rate(system, repeat))
                report(f"{workload} on {system.name}, run {repeat + 1} of {repeats}: {rates[index][-1]:.1f} tok/s")
                compiled[index] += len(names)
        results += [
            Result(str(workload), system.name, own, count if isinstance(system, Ours) else None)
            for system, own, count in zip(able, rates, compiled, strict=True)
        ]
    return results


def machine() -> dict[str, Any]:
    """Where the figures come from. `load` is the machine's load average of the last minute."""
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "device": device.device_kind,
        "platform": device.platform,
        "python": platform.python_version(),
        "jaxengine": __version__,
        **versions,
    }


def table(results: Sequence[Result]) -> str:
    """Lines of text: tokens per second, and the ratio of the first system of each workload to each other one."""
    first: dict[str, Result] = {}
    lines = [f"{'workload':<16}{'system':<16}{'tok/s':>10}  {'(min - max)':<22}{'compiled':>8}  jaxengine is"]
    for result in results:
        base = first.setdefault(result.workload, result)
        ratio = "" if base is result else f"{base.median / result.median:.2f} times as fast"
        compiled = "" if result.compilations is None else result.compilations
        between = f"({min(result.rates):.1f} - {max(result.rates):.1f})"
        head = f"{result.workload:<16}{result.system:<16}{result.median:>10.1f}"
        lines.append(f"{head}  {between:<22}{compiled:>8}  {ratio}".rstrip())
    return "\n".join(lines)


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
    return dataclasses.asdict(result) | {"rates": [*map(_number, result.rates)], "median": _number(result.median)}


def _number(rate: float) -> float | None:
    return rate if math.isfinite(rate) else None
