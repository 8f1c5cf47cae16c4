"""Do bits hold where loops are captured in command buffers, over many replays with donated pools?

XLA steers a loop from the host unless it may capture it, which the engine's steps allow. Two steps are run both ways
from the same state, each many times: a loop of unknown length around products, and the engine's own decode step. On a
device without command buffers both ways are one.
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from stepping import drain, queue, reads_prompts

from accelerator_stages import here, models
from accelerator_stages.measurement import Measurement, Row, Settings
from accelerator_stages.product import Cut, product
from jaxengine import LLM, SamplingParams
from jaxengine.command.bench import Decode
from jaxengine.contract.compare import compare
from jaxengine.device import steps
from jaxengine.engine.step_variants import equal_bits
from pallas_kernels.cases.matmul import MatmulCase
from pallas_kernels.matmul_reference import dot
from sharding import gpu_program

CAPTURED = steps.ON_A_GPU | {"xla_gpu_graph_min_graph_size": "1"}  # commands: beside its loop the step has few
LAYERS, ROWS, WIDTH, TOKENS = 8, 16, 2048, 4096  # of the loop of products; TOKENS that its pool holds
TINY_LOOP = (2, 16, 128, 32)
REPLAYS, TINY_REPLAYS = 200, 5


def measurements(settings: Settings) -> list[Measurement]:
    tiny = here.is_tiny(settings)
    return [
        Measurement("a loop of products", functools.partial(loop_of_products, tiny)),
        Measurement("the engine's decode step, few layers", functools.partial(engines_step, tiny)),
    ]


def options() -> dict[str, str]:
    """CAPTURED, which a TPU's compiler does not know."""
    return {} if here.platform() == "tpu" else CAPTURED


# -- a loop of products ------------------------------------------------------------------------------------------------


def loop_of_products(tiny: bool) -> Iterator[Row]:
    layers, rows, width, tokens = TINY_LOOP if tiny else (LAYERS, ROWS, WIDTH, TOKENS)
    replays = TINY_REPLAYS if tiny else REPLAYS
    weights = jnp.stack([MatmulCase(rows, width, width).operands(seed)[1] for seed in range(layers)])
    x = MatmulCase(rows, width, width).operands()[0]

    def new_state() -> tuple[Array, ...]:
        return jnp.zeros((layers, tokens, rows, width), x.dtype), jnp.array(x), jnp.int32(0)

    default = replayed(weights, new_state(), layers, replays, {})
    captured = replayed(weights, new_state(), layers, replays, options())
    pairs = zip(default.state, captured.state, strict=True)
    yield {
        "replays": replays,
        "µs by default": default.microseconds,
        "µs with loops captured": captured.microseconds,
        "note": f"loops outside command buffers: {default.loops} by default, {captured.loops} captured",
        "holds": all(equal_bits(np.asarray(a), np.asarray(b)) for a, b in pairs) and not captured.loops,
    }


class Replayed(NamedTuple):
    """The state after so many steps, µs of one, and its loops that are in no command buffer."""

    state: tuple[Array, ...]
    microseconds: float
    loops: int


def replayed(weights: Array, state: tuple[Array, ...], layers: int, replays: int, how: dict[str, str]) -> Replayed:
    """The number of layers is unknown to the compiler."""
    count = np.int32(layers)
    lowered = jax.jit(_step, donate_argnums=1).lower(weights, state, count)
    step, thunks = here.compiled(lowered, how, "*thunk_sequence_after_thunk_passes.txt")
    state = jax.block_until_ready(step(weights, state, count))
    start = time.perf_counter()
    for _ in range(replays):
        state = step(weights, state, count)
    jax.block_until_ready(state)
    return Replayed(state, (time.perf_counter() - start) / replays * 1e6, gpu_program.parse(thunks).steered)


def _step(weights: Array, state: tuple[Array, ...], layers: Array) -> tuple[Array, ...]:
    """Each layer's rows go through its product into the pool, at the step's own place."""
    _, x, token = state
    multiply = dot if here.platform() == "tpu" else _multiply

    def layer(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        pool, x = carry
        y = multiply(x, weights[i])
        x = (y * jax.lax.rsqrt(jnp.mean(y * y))).astype(x.dtype)
        return pool.at[i, token % pool.shape[1]].set(x), x

    pool, x = jax.lax.fori_loop(0, layers, layer, (state[0], x))
    return pool, x, token + 1


def _multiply(x: Array, w: Array) -> Array:
    return product(x, w, Cut(16), interpret=here.platform() == "cpu")


# -- the engine's step -------------------------------------------------------------------------------------------------


def engines_step(tiny: bool) -> Iterator[Row]:
    replays = TINY_REPLAYS if tiny else REPLAYS
    with compiled_by_default():
        expected, default = generated(tiny, replays)
    with captured_anywhere():
        found, captured = generated(tiny, replays)
    comparison = compare("bit-equal", expected, found)
    yield {
        "replays": replays,
        "µs by default": default,
        "µs with loops captured": captured,
        "note": str(comparison),
        "holds": comparison.holds,
    }


def generated(tiny: bool, new_tokens: int) -> tuple[list[Any], float]:
    """(samples of a batch, µs of a decode step with the host's part)."""
    room = dict(max_model_len=512, max_num_seqs=8, num_pages=160, compile_patience=0)
    with models.open_llm("qwen3-0.6b-shape", tiny, engine=room, num_hidden_layers=1 if tiny else 2) as llm:
        prompts, lengths = Decode(4 if tiny else 8, prompt_tokens=20).requests(0, llm.config.vocab_size, new_tokens)
        sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, key=jax.random.key(0))
        return [output.outputs[0] for output in outputs], _step_time(llm, prompts, lengths)


def _step_time(llm: LLM, prompts: list[list[int]], lengths: list[int]) -> float:
    queue(llm, prompts, lengths)
    while reads_prompts(llm):
        llm.engine.step()
    start, count = time.perf_counter(), lengths[0] - 2
    for _ in range(count):
        llm.engine.step()
    spent = time.perf_counter() - start
    drain(llm)
    return spent / count * 1e6


@contextlib.contextmanager
def compiled_by_default() -> Iterator[None]:
    """Steps that are compiled inside have no options, on a GPU too."""
    with mock.patch.object(steps, "captured", lambda step: step):
        yield


@contextlib.contextmanager
def captured_anywhere() -> Iterator[None]:
    """Decode steps that are compiled inside have the GPU's options, on a CPU too."""
    step = steps.decode_step if here.platform() == "tpu" else steps.captured(steps.decode_step)
    with mock.patch.object(steps, "decode_step", step):
        yield
