"""Run by test_replicas_learning.py in a process with eight CPU devices: what a trainer, or scoring, finds on meshes.

    python replicas_learning.py WHAT MESH...

WHAT is "score", "weights", or the algorithm that trains. A MESH is DATA×TENSOR, "1x1" for one device; with a "p"
gradients are added by psum (a planted mistake). Prints, as JSON, of each mesh what was found.
"""

import dataclasses
import functools
import hashlib
import json
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

jax.config.update("jax_num_cpu_devices", 8)

from conftest import make_llm, random_model  # noqa: E402

import jaxengine  # noqa: E402
from jaxengine import Rollout, SamplingParams  # noqa: E402
from jaxengine.rl.global_norm import clip_by_global_norm  # noqa: E402
from jaxengine.rl.objective import ALGORITHMS  # noqa: E402
from jaxengine.rl.train_state import TrainerConfig  # noqa: E402
from jaxengine.rl.trainer import Trainer  # noqa: E402
from sharding.mesh import make_mesh  # noqa: E402
from sharding.replica_sums import TermsOfReplicas  # noqa: E402

SHAPE = dict(hidden_size=64, intermediate_size=128, num_attention_heads=8, num_key_value_heads=4, head_dim=16)
MODEL = SHAPE | dict(vocab_size=250, num_hidden_layers=1, reduction_leaves=4, dtype="bfloat16")
OBJECTIVES = {
    "grpo": dataclasses.replace(ALGORITHMS["grpo"], kl_coefficient=0.04, entropy_coefficient=0.01),
    "ppo": ALGORITHMS["ppo"],
}
LENGTH = 40
# Tokens of (prompt, completion) of each sample: one token, the whole width, whole query blocks, and none at all
SIZES = [(1, 1), (39, 1), (1, 39), (16, 16), (17, 15), (9, 0), (2, 30), (20, 3)]
SIZES += [(5, 8), (8, 8), (3, 1), (31, 9), (1, 2), (15, 17), (33, 4), (4, 22)]
SAMPLING = SamplingParams(temperature=0.8, repetition_penalty=1.1)
ROOM = dict(max_model_len=64, max_num_seqs=4, num_pages=12)


def digest(tree) -> str:
    return hashlib.sha256(b"|".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))).hexdigest()[:16]


def rollout_of(vocab_size: int) -> Rollout:
    """Samples with logprobs that no weights gave, so that ratios lie on both sides of the clip."""
    rng, places = np.random.default_rng(0), np.arange(LENGTH)
    begins, ends = np.array(SIZES)[:, :1], np.array(SIZES).sum(1, keepdims=True)
    mask = (places >= begins) & (places < ends)
    return Rollout(
        tokens=np.where(places < ends, rng.integers(0, vocab_size, mask.shape), 0).astype(np.int32),
        mask=mask,
        logprobs=np.where(mask, rng.normal(-5.0, 0.5, mask.shape), 0).astype(np.float32),
        lengths=ends[:, 0].astype(np.int32),
        group=np.arange(len(SIZES), dtype=np.int32) // 4,
        weight_versions=np.where(mask, 0, -1).astype(np.int32),
    )


def by_psum(self, total, own):
    """The same slice of the same terms, which the runtime adds first."""
    summed = jax.lax.psum(own.astype(jnp.float32), self.axis).reshape(-1)
    slices = jnp.pad(summed, (0, -own.size % self.replicas)).reshape(self.replicas, -1)
    return total + slices[jax.lax.axis_index(self.axis)]


def trained(algorithm: str, config, params, mesh) -> dict[str, str]:
    """The state after two updates of four micro-batches, and their metrics."""
    settings = TrainerConfig(OBJECTIVES[algorithm], SAMPLING, mini_batches=2, micro_batches=4)
    trainer = Trainer(config, optax.chain(clip_by_global_norm(0.5), optax.adamw(1e-2)), settings, mesh=mesh)
    rewards = np.random.default_rng(1).normal(size=len(SIZES)).astype(np.float32)
    rewards[4:8], rewards[9] = 1.0, np.nan  # a group without an advantage, and a sample without a reward
    near = jax.tree.map(lambda x: x * 1.0625, params)
    state = trainer.start(params, jax.random.key(3))
    state, updates = trainer.train(state, rollout_of(config.vocab_size), rewards, reference=near)
    assert len(updates) == 2 and updates[0]["clip_rate"] > 0.1
    metrics = [np.float32(x) for update in updates for _, x in sorted(update.items())]
    return dict(weights=digest(state.master), moments=digest(state.moments), metrics=digest(metrics))


def scored(config, params, mesh) -> dict[str, str]:
    """Of seven sequences, a number that no replicas divide."""
    rollout = rollout_of(config.vocab_size)
    given, how = (rollout.tokens[:7], rollout.mask[:7], SAMPLING), dict(config=config, mesh=mesh)
    alone = jaxengine.score(params, *given, **how, entropy=True)

    def loss(params):
        logprobs = jaxengine.score(params, *given, **how)
        return (logprobs * np.sin(np.arange(LENGTH, dtype=np.float32))).sum(), logprobs

    (_, inside), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert digest(inside) == digest(alone[0])
    assert digest(make_llm(config, params, mesh=mesh, **ROOM).score(*given, entropy=True)) == digest(alone)
    kept = jaxengine.sampling_mask(params, *given[:2], SamplingParams(top_k=config.vocab_size), **how)
    return dict(scores=digest(alone), gradient=digest(gradient), kept=digest(kept))


def handed_over(config, params, mesh) -> dict[str, int]:
    """How many of a trainer's weights are copied on their way to an engine on the same mesh."""
    trainer = Trainer(config, optax.sgd(1.0), TrainerConfig(micro_batches=4), mesh=mesh)
    policy, llm = trainer.policy(trainer.start(params, jax.random.key(0))), make_llm(config, params, mesh=mesh, **ROOM)
    llm.update_params(policy)
    arrays = zip(*map(jax.tree.leaves, (policy, *(replica.params for replica in llm.engine.engines))), strict=True)
    return dict(copied=sum(places(whole) != set().union(*map(places, own)) for whole, *own in arrays))


def places(x: jax.Array) -> set[int]:
    return {shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards}


def main(what: str, *meshes: str) -> None:
    config, params = random_model("Qwen3", **MODEL)
    find, found = {"score": scored, "weights": handed_over}.get(what, functools.partial(trained, what)), {}
    for name in meshes:
        data, tensor = map(int, name.rstrip("p").split("x"))
        mesh = None if data * tensor == 1 else make_mesh(data=data, tensor=tensor)
        add = by_psum if "p" in name else TermsOfReplicas.add
        with mock.patch.object(TermsOfReplicas, "add", add):
            found[name] = find(config, params, mesh)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
