"""The decode and group workloads of `jaxengine bench` on this engine, and decode on transformers, in turns."""

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerator_stages import here, models
from accelerator_stages.measurement import Measurement, Row, Settings
from accelerator_stages.torch_beside import missing
from jaxengine.command import bench
from jaxengine.command.workloads import System, Workload

SHAPE = "qwen3-0.6b-shape"
WORKLOADS: tuple[Workload, ...] = (bench.Decode(64), bench.Decode(1), bench.Group(), bench.Decode(8), bench.Decode(32))
TINY_WORKLOADS: tuple[Workload, ...] = (bench.Decode(2, 20, 8), bench.Group(2, 2, 20, 2, 4))
REPEATS, TINY_REPEATS = 3, 1


def measurements(settings: Settings) -> list[Measurement]:
    tiny = here.is_tiny(settings)
    systems = functools.cache(functools.partial(open_systems, settings.torch_python, tiny))
    workloads = TINY_WORKLOADS if tiny else WORKLOADS
    return [Measurement(str(each), functools.partial(measured, systems, each, tiny)) for each in workloads]


def open_systems(python: str, tiny: bool) -> tuple[list[System], str]:
    """(this engine and, where it is there, transformers; why it is not there)."""
    llm = models.open_llm(SHAPE, tiny, engine=bench.ENGINE)
    reason = missing(python, "transformers")
    if reason:
        return [bench.Ours(llm)], f"transformers is not there: {reason}"
    with tempfile.TemporaryDirectory() as folder:  # read before the peer says hello
        bench.write_config(Path(folder), llm.config)
        context = llm.engine_config.max_model_len
        peer = bench.Peer("transformers", python, folder, llm.config.dtype, llm.config.vocab_size, context)
    return [bench.Ours(llm), peer], ""


def measured(systems: Callable[[], tuple[list[System], str]], workload: Workload, tiny: bool) -> Iterator[Row]:
    opened, note = systems()
    results = bench.measure(opened, [workload], TINY_REPEATS if tiny else REPEATS)
    for result in results:
        yield {
            "system": result.system,
            "tokens/s": result.median,
            "from": min(result.values),
            "to": max(result.values),
            "compiled": result.compilations,
            "jaxengine is, times": results[0].median / result.median,
            "note": note,
        }
