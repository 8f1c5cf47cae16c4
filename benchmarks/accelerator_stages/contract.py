"""verify(): the contract on the model that ships, and on a model of 0.6B with random weights."""

import functools
from collections.abc import Iterator

from accelerator_stages import here, models
from accelerator_stages.measurement import Measurement, Row, Settings
from jaxengine import LLM
from jaxengine.contract.verify import run_checks

SHAPE = "qwen3-0.6b-shape"
TINY_SAMPLES = 4


def measurements(settings: Settings) -> list[Measurement]:
    tiny = here.is_tiny(settings)
    shape = Measurement(SHAPE, functools.partial(of_shape, tiny))
    return [shape] if tiny else [Measurement("calc", of_calc), shape]


def of_calc() -> Iterator[Row]:
    with LLM("calc", progress=False) as llm:
        yield from verified(llm, None)


def of_shape(tiny: bool) -> Iterator[Row]:
    with models.open_llm(SHAPE, tiny) as llm:
        yield from verified(llm, TINY_SAMPLES if tiny else None)


def verified(llm: LLM, samples: int | None) -> Iterator[Row]:
    kernels = llm.engine_config.kernels
    for check in run_checks(llm.session, quick=True, samples=samples):
        yield {
            "kernels": kernels,
            "axis": check.axis,
            "changed": check.what,
            "holds": check.holds,
            "s": check.seconds,
            "found": check.found,
        }
    yield {
        "kernels": kernels,
        "changed": "steps refused",
        "found": ", ".join(map(str, llm.engine.step_variants.refused)) or "none",
    }
