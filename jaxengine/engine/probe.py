"""What the base decode step says of a probe: the measure of every other way to compute a model's logprobs."""

import jax
import numpy as np

from jaxengine.config import PROBE_TOKENS, EngineConfig, ModelConfig
from jaxengine.device import kv_cache, scoring
from jaxengine.engine.step_variants import variants_of
from jaxengine.engine.weights import homes, placed
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import Kernels


def random_params(model_config: ModelConfig, kernels: Kernels) -> Decoder:
    """The same weights on one device, the default one, and on the mesh of `kernels`."""
    params = scoring.random_params(model_config, jax.random.key(0))
    return placed(params, homes(params, model_config, kernels))


def generated(model_config: ModelConfig, kernels: Kernels, params: Decoder) -> tuple[np.ndarray, np.ndarray]:
    """(the probe's tokens int32 `[T]`, the base decode step's logprobs of all but the first, float32 `[T - 1]`)."""
    length = min(PROBE_TOKENS, model_config.max_position_embeddings)
    engine_config = EngineConfig(max_num_seqs=1, max_model_len=length, num_pages=2, max_logprobs=1)
    variants = variants_of(model_config, engine_config, kernels)
    cache = kv_cache.empty_cache(model_config, engine_config, kernels, params)
    return variants.base_logprobs(params, cache)
