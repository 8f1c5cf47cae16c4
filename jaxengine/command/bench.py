"""Throughput: the decode and group workloads, on this engine and on a peer that runs in its own interpreter, in turns.

In a notebook:

    llm = bench.open_model("qwen3-0.6b-shape", dtype="bfloat16")
    results = bench.measure([bench.Ours(llm)], [bench.Decode(8), bench.Group()])
    print(bench.table(results))
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from checkpoints.model_folder import find_folder
from jaxengine import __version__
from jaxengine.base.machine import cpu_name
from jaxengine.command.workloads import PEERS, Decode, Group, Prompts, System, Workload
from jaxengine.config import ModelConfig, RopeConfig
from jaxengine.llm import LLM
from jaxengine.models import hugging_face, loading, registry
from jaxengine.models.params import initialise
from jaxengine.sampling_params import SamplingParams

__all__ = ["Decode", "Group", "Ours", "Peer", "compilations", "machine", "measure", "open_model", "record", "table"]
QWEN3_06B = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=151936,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40960,
    rope=RopeConfig(1e6),
    tie_word_embeddings=True,
    qk_norm=True,
    dtype="bfloat16",
)
SHAPES = {"qwen3-0.6b-shape": QWEN3_06B}  # random weights, made in place
ENGINE = dict(max_model_len=2048, max_num_seqs=64, num_pages=1025)  # room for either workload at 64 sequences
COMPILED = "/jax/core/compile/backend_compile_duration"


# -- systems -------------------------------------------------------------------------------------------------------------------


class Ours:
    """An LLM as a system."""

    name, workloads = "jaxengine", ("decode", "group")

    def __init__(self, llm: LLM) -> None:
        self.llm, self.vocab_size = llm, llm.config.vocab_size

    def warm_up(self) -> None:
        """Compile every step, however rarely the workloads come to it."""
        self.llm.warm_up()

    def seconds(self, prompts: Prompts, lengths: list[int], logprobs: bool) -> float:
        """The wall time of one call; logprobs of the sampled tokens come whether asked for or not."""
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


class Peer:
    """Another engine in an interpreter of its own, which answers tasks line by line (benchmarks/README.md)."""

    def __init__(self, name: str, python: str, folder: str, dtype: str, vocab_size: int) -> None:
        script = Path(__file__).parents[2] / "benchmarks" / "peers" / PEERS[name]
        if not script.is_file():
            raise ValueError(
                f"the peer {name!r} is run by {script}, which is not there: run the bench from a checkout "
                "of the repository"
            )
        self.name, self.vocab_size, self._python = name, vocab_size, python
        # In a session of its own, so that Ctrl-C reaches us alone and we end it.
        self._process = subprocess.Popen(
            [python, str(script), folder, "--dtype", dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            hello = self._answer()
        except BaseException:
            self.close()
            raise
        self.workloads, self.versions = tuple(hello["workloads"]), hello["versions"]

    def warm_up(self) -> None:
        """Nothing beyond the warm-up of each workload."""

    def seconds(self, prompts: Prompts, lengths: list[int], logprobs: bool) -> float:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, which its missing answer will say
            self._process.stdin.write(json.dumps({"prompts": prompts, "lengths": lengths, "logprobs": logprobs}) + "\n")
            self._process.stdin.flush()
        return self._answer()["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()  # its messages come on standard error
        if not line:
            raise ValueError(
                f"the peer {self.name!r} ended with code {self._process.wait()}: has {self._python} what benchmarks/README.md "
                "asks for?"
            )
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def open_model(model: str, *, dtype: str = "auto", progress: bool = False, **engine: Any) -> LLM:
    """An LLM with room for the workloads; `model` as LLM takes it, or a name in SHAPES for random weights of that shape."""
    if model not in SHAPES:
        config = loading.read_model_config(find_folder(model), dtype=dtype)
        return LLM(model, dtype=dtype, progress=progress, **_room(config) | engine)
    config = dataclasses.replace(SHAPES[model], dtype=loading.dtype_name(dtype, SHAPES[model].dtype))
    return LLM.from_params(config, initialise(config, jax.random.key(0)), progress=progress, **_room(config) | engine)


def _room(config: ModelConfig) -> dict[str, Any]:
    return ENGINE | {"max_model_len": min(ENGINE["max_model_len"], config.max_position_embeddings)}


def write_config(folder: Path, config: ModelConfig) -> None:
    """config.json alone: a peer fills such a folder's model with random weights."""
    family = registry.family(config.architecture)
    content = hugging_face.config_json(config, family.MODEL_TYPE) | family.differences(config)
    (folder / "config.json").write_text(json.dumps(content))


# -- measuring -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Result:
    """Tokens per second of each repeat, and how many functions were compiled while the clock ran (None where that cannot be seen)."""

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


def measure(
    systems: Sequence[System],
    workloads: Sequence[Workload],
    repeats: int = 3,
    report: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Each workload on each system: a warm-up that does not count, then `repeats`, the systems in turns. Prompts are fresh in every run."""
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
    """Where the figures come from. `load` is what the machine had to do in the last minute."""
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
        lines.append(
            f"{result.workload:<16}{result.system:<16}{result.median:>10.1f}  {between:<22}{compiled:>8}  {ratio}".rstrip()
        )
    return "\n".join(lines)


def record(
    llm: LLM, model: str, where: dict[str, Any], results: Sequence[Result], peers: dict[str, Any]
) -> dict[str, Any]:
    """Everything that a reader of the figures has to know, ready for JSON. `where` is `machine()`, `peers` the versions of each."""
    number = lambda rate: rate if math.isfinite(rate) else None
    return {
        "machine": where,
        "model": model,
        "dtype": llm.config.dtype,
        "engine": dataclasses.asdict(llm.engine_config),
        "peers": peers,
        "results": [
            dataclasses.asdict(r) | {"rates": [*map(number, r.rates)], "median": number(r.median)} for r in results
        ],
    }
