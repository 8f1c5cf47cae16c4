"""The jitted steps as compiled programs."""

import jax
import pytest
from conftest import FAMILIES, SIZES, pool_bytes, step_inputs

from jaxengine import kv_cache, steps
from jaxengine.config import QUERY_BLOCK, EngineConfig, ModelConfig
from jaxengine.models import params
from jaxengine.models.decoder import Tile
from jaxengine.ops.kernels import XLA

MODEL = ModelConfig(**SIZES | FAMILIES["Qwen3"] | dict(num_hidden_layers=2))
ENGINE = EngineConfig(max_num_seqs=32, max_model_len=512, num_pages=50_000)


@pytest.mark.parametrize("kind, tile, more", [
    ("prefill", Tile(QUERY_BLOCK, 8), {}), ("decode", Tile(1, 8), dict(num_steps=1)), ("decode", Tile(1, 8), dict(num_steps=4))],
    ids=["prefill", "decode", "four decode steps"])
def test_the_cache_is_updated_in_place(kind, tile, more):
    step = {"prefill": steps.prefill_step, "decode": steps.decode_step}[kind]
    cache = kv_cache.abstract(MODEL, ENGINE, XLA)
    memory = step.lower(params.abstract(MODEL), cache, *step_inputs(kind, ENGINE), config=MODEL, kernels=XLA, tile=tile, max_logprobs=20,
                        **more).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert memory.temp_size_in_bytes < pool_bytes(cache) / 10
