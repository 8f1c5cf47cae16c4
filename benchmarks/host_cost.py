"""What a step costs the host: the engine's own loop over a device that does nothing.

    python benchmarks/host_cost.py [--steps 128] [--profile]

The steps are compiled programs that take every argument of the real ones (28 layers of weights and cache, of one number
each) and answer fixed tokens, so dispatch and uploads are in the figures and arithmetic is not. A figure is the µs of a
step that the stepping thread computes, and in brackets those that pass: of windows of 32 steps the one with the least
mean, because other programs may want the processor too.
"""

import argparse
import contextlib
import cProfile
import dataclasses
import pstats
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp

from jaxengine.config import QUERY_BLOCK, EngineConfig, ModelConfig
from jaxengine.device import kv_cache
from jaxengine.device.kv_cache import Cache
from jaxengine.device.needs import Needs
from jaxengine.device.step_inputs import RowOutputs
from jaxengine.engine import engine as engine_module
from jaxengine.engine import step_variants
from jaxengine.engine.batch import BatchBuilder
from jaxengine.engine.engine import Engine
from jaxengine.engine.spread import SpreadReplicas
from jaxengine.engine.step_variants import Variant
from jaxengine.host.sample import Request
from jaxengine.models import params as model_params
from jaxengine.ops.tiles import BASE, Tile
from jaxengine.sampling_params import SamplingParams

MODEL = ModelConfig("Qwen3ForCausalLM", 1000, 8, 8, 28, 1, 1, 8, 65_536, tie_word_embeddings=True)
PAGE, WINDOW, TOKEN = 32, 32, 5
PREFILL_TILE = Tile(QUERY_BLOCK, 8)
FOREVER = 20_000  # tokens of an answer that does not end while it is measured


class Case(NamedTuple):
    """`running` requests with contexts of `context` tokens and answers of `answer`, and so many that wait."""

    running: int
    context: int
    waiting: int = 0
    answer: int = FOREVER
    head: int = 0  # tokens of the first that waits, for which there are no pages

    def __str__(self) -> str:
        words = [f"{self.running} running at {self.context:,}"]
        words += [f"{self.waiting:,} waiting"] if self.waiting else []
        words += [f"answers of {self.answer} tokens"] if self.answer != FOREVER else []
        words += [f"the first in the queue lacks pages for {self.head:,} tokens"] if self.head else []
        return ", ".join(words)


CASES = [
    *(Case(running, context) for context in (1_000, 40_000) for running in (32, 128, 512)),
    Case(512, 1_000, waiting=10_000),
    Case(512, 1_000, waiting=10_000, answer=64),
    Case(128, 1_000, waiting=1, head=40_000),
]


# -- a device that does nothing ----------------------------------------------------------------------------------------


def empty_cache(*_: Any, **__: Any) -> Cache:
    """Of the right structure and of no size."""
    layers = (jnp.zeros(1),) * MODEL.num_hidden_layers
    slots = [jnp.zeros((1, 1), jnp.int32) for _ in dataclasses.fields(Cache)[2:]]
    return Cache(tuple(map(jnp.copy, layers)), tuple(map(jnp.copy, layers)), *slots)


def answers(*shape: int) -> RowOutputs:
    numbers, tokens = jnp.zeros(shape, jnp.float32), jnp.full(shape, TOKEN, jnp.int32)
    likeliest = jnp.zeros((*shape, 20), jnp.float32)
    return RowOutputs(
        tokens=tokens,
        logprobs=numbers,
        raw_logprobs=numbers,
        entropies=numbers,
        ranks=tokens,
        top_ids=likeliest.astype(jnp.int32),
        top_logprobs=likeliest,
        named_logprobs=likeliest[..., :0],
        finite=jnp.ones(shape, bool),
    )


class NoSteps:
    """In the place of StepVariants."""

    def __init__(self, model: Any, config: EngineConfig, kernels: Any, batch: BatchBuilder, report: Any) -> None:
        self.batch = batch
        self._decode = jax.jit(
            lambda cache, *inputs: (cache, answers(1, batch.decode_rows)), donate_argnums=0, keep_unused=True
        )
        self._prefill = jax.jit(
            lambda cache, *inputs: (cache, answers(batch.prefill_rows(PREFILL_TILE))),
            donate_argnums=0,
            keep_unused=True,
        )

    def pick(
        self, kind: str, num_blocks: int, needs: Needs, params: Any, cache: Cache, before: Any
    ) -> tuple[Cache, Variant]:
        return cache, Variant(kind, PREFILL_TILE if kind == "prefill" else BASE, needs)

    def run_decode(self, params: Any, cache: Cache, *inputs: Any) -> tuple[Cache, RowOutputs]:
        return self._decode(cache, params, *inputs[:-1])

    def run_prefill(self, params: Any, cache: Cache, *inputs: Any) -> tuple[Cache, RowOutputs]:
        return self._prefill(cache, params, *inputs[:-1])

    def forget_expected(self) -> None:
        """There is no proof."""


def new_engine(case: Case, overlap: bool) -> Engine:
    pages = case.running * (1 + (case.answer if case.answer != FOREVER else 4096) // PAGE) + 2 * case.context // PAGE
    config = EngineConfig(
        max_num_seqs=case.running + bool(case.head),
        max_num_batched_tokens=16 * case.context,
        max_model_len=65_536 if case.context > 2_000 or case.head else 32_768,
        page_size=PAGE,
        num_pages=pages,
        overlap=overlap,
    )
    weights = jax.tree.map(lambda _: jnp.zeros(1), model_params.abstract(MODEL))
    with mock.patch.object(step_variants, "StepVariants", NoSteps):
        return Engine(MODEL, config, weights)


def request(engine: Engine | SpreadReplicas, number: int, prompt: list[int], answer: int) -> None:
    """All prompts of a case have one front, so that admitting them takes few pages."""
    sampling, limit = SamplingParams(max_tokens=answer), len(prompt) + answer
    engine.add(Request(str(number), prompt, sampling, (0, number), number, frozenset([2]), limit))


def started(case: Case, overlap: bool) -> Engine:
    """An engine whose requests decode."""
    engine, front = new_engine(case, overlap), [7] * (case.context - 8)
    for number in range(case.running):
        of_age = 1 + number % case.answer if case.answer != FOREVER else FOREVER  # as if each came at another time
        request(engine, number, front + [9] * 8, of_age)
    while engine.scheduler.waiting or not all(sample.is_decoding for sample in engine.scheduler.running):
        engine.step()
    for number in range(case.waiting):
        prompt = [3] * case.head if case.head else front + [9] * 8
        request(engine, case.running + number, prompt, case.answer if not case.head else 8)
    return engine


# -- measuring ---------------------------------------------------------------------------------------------------------


def microseconds(engine: Engine | SpreadReplicas, steps: int) -> tuple[float, float]:
    """(computed, passed) of a step: the least means of a window."""
    for _ in range(2 * WINDOW):
        engine.step()
    computed, passed = [], []
    for _ in range(max(steps // WINDOW, 1)):
        starts = time.thread_time(), time.perf_counter()
        for _ in range(WINDOW):
            engine.step()
        computed.append((time.thread_time() - starts[0]) / WINDOW * 1e6)
        passed.append((time.perf_counter() - starts[1]) / WINDOW * 1e6)
    return min(computed), min(passed)


def of_replicas(num_replicas: int, running: int = 32) -> tuple[float, float]:
    """µs of (a request's placement, a step) in a process that has one of so many replicas, each of which gets as many
    requests; the others' processes are not there, and nothing is asked of them.
    """
    case = Case(running, 1_000)
    engine = new_engine(case, overlap=False)
    spread = SpreadReplicas(engine.engine_config, {0: engine}, range(num_replicas), mock.Mock(is_busy=False))
    prompts = [[*divmod(number, 997)] * 4 + [7] * (case.context - 8) for number in range(running * num_replicas)]
    begun = time.thread_time()
    for number, prompt in enumerate(prompts):
        request(spread, number, prompt, case.answer)
    placed = (time.thread_time() - begun) / len(prompts) * 1e6
    while engine.scheduler.waiting or not all(sample.is_decoding for sample in engine.scheduler.running):
        spread.step()
    assert len(engine.scheduler.running) == running
    return placed, microseconds(spread, 128)[0]


def profiled(run: Callable[[], object]) -> None:
    profile = cProfile.Profile()
    profile.runcall(run)
    pstats.Stats(profile).sort_stats("tottime").print_stats(30)


@contextlib.contextmanager
def without_device() -> Iterator[None]:
    """Inside, engines have no pages and no slots' arrays."""
    nothing = mock.Mock(
        empty_cache=empty_cache,
        is_lost=kv_cache.is_lost,
        rebuild=empty_cache,
        write_history=lambda cache, *_: cache,
        write_rules=lambda cache, *_: cache,
    )
    parts = {name: nothing for name in ("kv_cache", "steps") if hasattr(engine_module, name)}
    with mock.patch.multiple(engine_module, **parts):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=256, help="measured of each case")
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)), help="numbers, from 0")
    parser.add_argument("--replicas", type=int, nargs="+", help="instead: one process of so many replicas, 1 16 256")
    parser.add_argument("--profile", action="store_true", help="where the time goes, under cProfile")
    arguments = parser.parse_args()
    if arguments.replicas:
        print("| replicas | requests | placing one, µs | a step, µs |\n|---|---|---|---|", flush=True)
        with without_device():
            for count in arguments.replicas:
                placed, step = of_replicas(count)
                print(f"| {count} | {32 * count:,} | {placed:,.1f} | {step:,.0f} |", flush=True)
        return
    print("| case | plain, µs a step | overlapped, µs a step |\n|---|---|---|", flush=True)
    with without_device():
        for case in [CASES[number] for number in arguments.cases]:
            if arguments.profile:
                engine = started(case, overlap=False)
                profiled(lambda engine=engine: microseconds(engine, arguments.steps))
                continue
            costs = [microseconds(started(case, overlap), arguments.steps) for overlap in (False, True)]
            cost = [f"{computed:,.0f} ({passed:,.0f})" for computed, passed in costs]
            print(f"| {case} | {' | '.join(cost)} |", flush=True)


if __name__ == "__main__":
    main()
