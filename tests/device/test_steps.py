"""The jitted steps as compiled programs."""

import jax
import pytest
from conftest import FAMILIES, NATIVE, SIZES, bits, make_llm, pool_bytes, step_call

from jaxengine import SamplingParams
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.device import kv_cache, steps
from jaxengine.models import params
from jaxengine.ops.kernels import choose_kernels

# Weights and pools so large that a copy of either would stand out from what the rows of a step need.
MODEL = ModelConfig(**SIZES | FAMILIES["Qwen3"] | dict(num_hidden_layers=2, hidden_size=1024, intermediate_size=16384))
ENGINE = EngineConfig(max_num_seqs=32, max_model_len=512, num_pages=50_000)


@pytest.mark.parametrize(
    "kind, more, kernels",
    [
        pytest.param("prefill", {}, "xla", id="prefill"),
        pytest.param("decode", {}, "xla", id="decode"),
        pytest.param("decode", dict(num_steps=4), "xla", id="four decode steps"),
        pytest.param("decode", {}, "cpu", id="decode by the CPU's own kernels", marks=NATIVE),
    ],
)
def test_a_step_copies_neither_cache_nor_weights(kind, more, kernels):
    step, inputs, static = step_call(kind, ENGINE, **more)
    how = dict(model_config=MODEL, kernels=choose_kernels(kernels, MODEL))
    weights, cache = params.abstract(MODEL), kv_cache.abstract(MODEL, ENGINE, how["kernels"])
    memory = step.lower(weights, cache, *inputs, **how, **static).compile().memory_analysis()
    assert memory.alias_size_in_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    down = weights.layers[0].mlp.down  # a layer's smaller matrix
    assert memory.temp_size_in_bytes < min(down.size * down.dtype.itemsize, pool_bytes(cache) / 10)


def test_a_captured_step_is_the_same_program(tiny, monkeypatch):
    """What a GPU is asked for beside; here the option changes nothing, and the engine runs on those steps."""
    prompts, sampling = [[1, 2, 3], [4] * 40], SamplingParams(max_tokens=8, ignore_eos=True, seed=1)
    expected = bits(tiny.generate(prompts, sampling))
    llm = make_llm(tiny.config, tiny.params)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert bits(llm.generate(prompts, sampling)) == expected
    assert steps.captured(steps.decode_step)._cache_size() > 0
