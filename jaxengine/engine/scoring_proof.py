"""Which tiles scoring may take on this machine: those whose logprobs are the base decode step's, bit for bit.

Everything that scores asks here, the trainer too: `LLM.score`, `jaxengine.score`, `Policy` and `Trainer`. The proof is
on PROBE_TOKENS random tokens under random weights, of one layer of the model's shape: XLA's choices depend on shapes
alone, and all layers share theirs. So it needs no weights of the caller's, which may be tracers.
"""

import concurrent.futures
import dataclasses
import threading

import jax.numpy as jnp
import numpy as np

from jaxengine.base.progress import Report, say_nothing
from jaxengine.config import ModelConfig
from jaxengine.device import scoring
from jaxengine.engine.mesh_proof import check_mesh
from jaxengine.engine.probe import generated, random_params
from jaxengine.engine.step_variants import equal_bits
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import Kernels
from jaxengine.ops.tiles import SCORING, ScoringTiles
from jaxengine.sampling_params import SamplingParams

_proving = threading.Lock()
_refused: dict[tuple[ModelConfig, Kernels], int] = {}  # how many of SCORING; of this process, whose machine stays


class NothingHoldsError(RuntimeError):
    """No way of scoring gives the bits of generation on this machine."""


def scoring_tiles(model_config: ModelConfig, kernels: Kernels, report: Report = say_nothing) -> ScoringTiles:
    """The widest of SCORING that holds here; proven once a process for each model and kernels, also while tracing.

    Raises NothingHoldsError where none gives the bits of generation.
    """
    tried = refused(model_config, kernels, report)
    if len(tried) == len(SCORING):
        raise NothingHoldsError(
            "no way of scoring gives the bits of generation on this machine, so no logprobs are given out; "
            f"tried {', '.join(map(str, SCORING))} with kernels {kernels.name!r}"
        )
    return SCORING[len(tried)]


def refused(model_config: ModelConfig, kernels: Kernels, report: Report = say_nothing) -> tuple[ScoringTiles, ...]:
    """Those of SCORING, from the widest on, that give other bits than generation here."""
    with _proving:
        if (model_config, kernels) not in _refused:
            # In a thread of its own, where nothing is being traced: a caller may be inside jit or value_and_grad.
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                _refused[model_config, kernels] = thread.submit(_prove, model_config, kernels, report).result()
        return SCORING[: _refused[model_config, kernels]]


def _prove(model_config: ModelConfig, kernels: Kernels, report: Report) -> int:
    """How many of SCORING come before the first that holds."""
    check_mesh(model_config, kernels, report)
    one_layer = dataclasses.replace(model_config, num_hidden_layers=1)
    params = random_params(one_layer, kernels)
    tokens, expected = generated(one_layer, kernels, params)
    for i, tiles in enumerate(SCORING):
        if equal_bits(expected, _scored(one_layer, kernels, params, tokens, tiles)):
            return i
        report(
            f"scoring on {tiles.layers.rows} rows, {tiles.head_rows} at the head, gives other bits than generation "
            "on this machine: it will not be used"
        )
    return len(SCORING)


def _scored(
    model_config: ModelConfig, kernels: Kernels, params: Decoder, tokens: np.ndarray, tiles: ScoringTiles
) -> np.ndarray:
    """The logprobs of all tokens but the first, float32 `[T - 1]`."""
    arrays = scoring.sampling_arrays_of([SamplingParams()], model_config)
    mask = jnp.arange(len(tokens))[None] > 0
    how = dict(model_config=model_config, kernels=kernels, tiles=tiles)
    logprobs, _ = scoring.token_logprobs(params, jnp.asarray(tokens)[None], mask, arrays, **how)
    return np.asarray(logprobs)[0, 1:]
