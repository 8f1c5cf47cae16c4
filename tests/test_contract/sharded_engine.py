"""Run by test_sharded_kernels.py in a process with eight CPU devices: one model's answers on some of them, as JSON."""

import json
import sys
from unittest import mock

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 8)

from conftest import bits, make_llm, random_model  # noqa: E402

from jaxengine import SamplingParams  # noqa: E402
from jaxengine.models.params import map_declared  # noqa: E402
from jaxengine.ops.kernels import choose_kernels  # noqa: E402
from jaxengine.ops.sharded import sharded  # noqa: E402

SMALL = dict(
    vocab_size=250,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=8,
    num_key_value_heads=4,
    num_hidden_layers=1,
)
PROMPTS = [list(range(3)), list(range(40, 57)), list(range(200, 240))]


def answers(degree: int) -> list[tuple]:
    config, params = random_model("Qwen3", reduction_leaves=4, **SMALL)
    kernels = choose_kernels("pallas_interpret", config)
    if degree > 1:
        mesh = Mesh(np.array(jax.devices()[:degree]), ("leaves",))
        kernels = sharded(kernels, mesh, "leaves")
        split = lambda _, parameter: NamedSharding(
            mesh, PartitionSpec("leaves" if parameter.axes[0] == "leaf" else None)
        )
        params = jax.device_put(params, map_declared(split, config))
    with mock.patch("jaxengine.engine.engine.choose_kernels", return_value=kernels):
        llm = make_llm(
            config,
            params,
            max_model_len=128,
            max_num_seqs=4,
            num_pages=20,
            max_num_batched_tokens=32,
            kernels="pallas_interpret",
            compile_patience=1_000_000,
        )
    found = bits(llm.generate(PROMPTS, SamplingParams(max_tokens=4, ignore_eos=True), key=jax.random.key(0)))
    pool = llm.engine.cache.keys[0]
    assert pool.addressable_shards[0].data.shape[1] == pool.shape[1] // degree
    assert not llm.engine.step_variants.refused
    return [(list(tokens), logprobs.hex()) for tokens, logprobs, *_ in found]


if __name__ == "__main__":
    print(json.dumps([answers(int(degree)) for degree in sys.argv[1:]]))
