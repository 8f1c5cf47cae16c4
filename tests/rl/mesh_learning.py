"""Run by test_mesh_learning.py in a process with eight CPU devices: a GRPO run whose trainer and sampler lie on meshes.

    python mesh_learning.py TRAINER SAMPLER…

TRAINER and each SAMPLER are DATA×TENSOR, "1x1" for one device; prints, as JSON, of each sampler what every iteration
was like and a digest of the state after it.
"""

import hashlib
import json
import sys

import jax
import numpy as np
import optax

jax.config.update("jax_num_cpu_devices", 8)

from conftest import random_model  # noqa: E402

from jaxengine import SamplingParams  # noqa: E402
from jaxengine.rl.global_norm import clip_by_global_norm  # noqa: E402
from jaxengine.rl.loops.loop import Loop  # noqa: E402
from jaxengine.rl.train_state import TrainerConfig  # noqa: E402
from jaxengine.rl.trainer import Trainer  # noqa: E402
from sharding.mesh import make_mesh  # noqa: E402

ITERATIONS, PROMPTS, SAMPLES, LENGTH = 5, 8, 8, 8
SHAPE = dict(hidden_size=96, intermediate_size=320, num_attention_heads=16, num_key_value_heads=8, head_dim=16)


def mesh_of(name: str):
    data, tensor = map(int, name.split("x"))
    return None if data * tensor == 1 else make_mesh(data=data, tensor=tensor)


def low_ids(outputs, answers) -> np.ndarray:
    """The share of a completion's tokens in the lower half of the vocabulary: easy to learn."""
    return np.array([np.mean(np.array(s.token_ids) < 500) for output in outputs for s in output.outputs], np.float32)


def problems(iteration: int):
    drawn = np.random.default_rng(iteration).integers(0, 1000, (PROMPTS, 12))
    return [(prompt.tolist(), None) for prompt in drawn]


def run(trainer: str, sampler: str) -> list[dict]:
    config, params = random_model("Qwen3", vocab_size=1000, dtype="bfloat16", reduction_leaves=8, **SHAPE)
    sampling = SamplingParams(n=SAMPLES, max_tokens=LENGTH, ignore_eos=True)
    settings = TrainerConfig(sampling=sampling, mini_batches=2, micro_batches=2)
    optimizer = optax.chain(clip_by_global_norm(1.0), optax.adam(4e-2))
    engine = dict(max_model_len=64, max_num_seqs=16, num_pages=40, mesh=mesh_of(sampler))
    learner = Trainer(config, optimizer, settings, mesh=mesh_of(trainer))
    loop = Loop(learner, problems, low_ids, length=12 + LENGTH, engine=engine)
    state, found = learner.start(params, jax.random.key(0)), []
    for _ in range(ITERATIONS):
        state, iteration = loop.iterate(state)
        bits = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state))).hexdigest()
        found.append(dict(reward=iteration.reward, updates=iteration.updates, state=bits[:16]))
    return found


def main(trainer: str, *samplers: str) -> None:
    print(json.dumps([run(trainer, sampler) for sampler in samplers]))


if __name__ == "__main__":
    main(*sys.argv[1:])
