"""Run by degrees.py in a process with eight CPU devices: what one model says on some of them, as JSON.

    python mesh_run.py KERNELS FAMILY DTYPE LEAVES DEGREE...

LEAVES "8of2" are eight that hold copies of two key-value heads; of "8" each has one of its own.

A degree may have letters: "4x" exchanges columns of sums where others gather them whole, "4d" are two replicas of two,
"8q" four, "4p" adds sums by psum (a planted mistake), "4f" is given weights that lie in another way.
"""

import hashlib
import json
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 8)

from conftest import bits, make_llm, random_model  # noqa: E402

import jaxengine  # noqa: E402
from jaxengine import SamplingParams  # noqa: E402
from jaxengine.engine import scoring_proof  # noqa: E402
from jaxengine.engine.mesh_proof import MeshDiffersError  # noqa: E402
from jaxengine.rl.global_norm import clip_by_global_norm  # noqa: E402
from jaxengine.rl.train_state import TrainerConfig  # noqa: E402
from jaxengine.rl.trainer import Trainer  # noqa: E402
from sharding import leaves  # noqa: E402
from sharding.mesh import make_mesh  # noqa: E402

SHAPE = dict(hidden_size=96, intermediate_size=320, num_attention_heads=16, vocab_size=1000, head_dim=16)
HEAD = list(range(40, 73))
PROMPTS = [list(range(3)), HEAD, [*HEAD, 1, 2, 3], list(range(200, 255)), HEAD[:16]]
SAMPLING = [
    SamplingParams(n=2, max_tokens=5, ignore_eos=True, temperature=0.8, top_p=top_p, repetition_penalty=penalty)
    for top_p, penalty in ((1.0, 1.0), (0.9, 1.0), (1.0, 1.1), (0.5, 1.0), (1.0, 1.0))
]


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"|".join(parts)).hexdigest()[:16]


def said(outputs) -> str:
    return digest(repr(bits(outputs)).encode())


def fully_sharded(params):
    """Each array cut along its widest axis that eight devices divide, as a trainer may keep it."""
    mesh = jax.make_mesh((8,), ("fsdp",))

    def home(x):
        axis = next((i for i in reversed(range(x.ndim)) if x.shape[i] % 8 == 0), None)
        return NamedSharding(mesh, PartitionSpec(*(["fsdp" if i == axis else None for i in range(x.ndim)])))

    return jax.device_put(params, jax.tree.map(home, params))


def move_and_return(llm) -> None:
    """The weights to the host and back, as an accelerator's do while it sleeps: all replicas share one copy there."""
    replicas, params = llm.engine.engines, llm.params
    assert sum(bool(replica.scheduler.page_pool._cached) for replica in replicas) >= 2  # had work
    on_host = jax.device_get(params)
    llm.engine.move_weights(on_host)
    assert all(replica.params is on_host for replica in replicas)
    llm.engine.move_weights(jax.device_put(on_host, jax.tree.map(lambda x: x.sharding, params)))
    devices = [{d for x in jax.tree.leaves(replica.params) for d in x.devices()} for replica in replicas]
    assert len(set.union(*devices)) == sum(map(len, devices))


def answers(kernels: str, config, params, degree: int, letters: str) -> dict[str, str]:
    data = 4 if "q" in letters else 2 if "d" in letters else 1
    mesh = None if degree == 1 else make_mesh(tensor=degree // data, data=data)
    how = dict(kernels=kernels, mesh=mesh)
    given = fully_sharded(params) if "f" in letters else params
    llm = make_llm(config, given, max_model_len=128, max_num_seqs=4, num_pages=14, max_num_batched_tokens=32, **how)
    pool = jax.tree.leaves(llm.engine.cache)[0]
    assert pool.addressable_shards[0].data.shape[1] == pool.shape[1] // (degree // data)
    first = llm.generate(PROMPTS, SAMPLING, key=jax.random.key(0))  # in chunks, with too few pages for all
    if data > 1:
        move_and_return(llm)
    again = llm.generate(PROMPTS, SAMPLING, key=jax.random.key(0))  # what is left of the cache is found
    assert not llm.engine.step_variants.refused
    rollout = jaxengine.Rollout.from_outputs(first)
    sampling = [SAMPLING[group] for group in np.asarray(rollout.group)]
    tokens, mask, steps = (jnp.asarray(x) for x in (rollout.tokens, rollout.mask, np.arange(rollout.tokens.shape[1])))

    def loss(params):
        logprobs = jaxengine.score(params, tokens, mask, sampling, config=config, **how)
        return (logprobs * jnp.sin(steps.astype(jnp.float32))).sum(), logprobs

    (_, inside), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(given)
    alone = jaxengine.score(given if mesh is not None else llm.params, tokens, mask, sampling, config=config, **how)
    assert np.asarray(inside).tobytes() == np.asarray(alone).tobytes() == rollout.logprobs.tobytes()
    how["mesh"] = make_mesh(tensor=degree // 2, data=2) if data > 2 else mesh  # ten samples are no multiple of four
    trainer = Trainer(
        config,
        optax.chain(clip_by_global_norm(0.1), optax.adamw(1e-2)),
        TrainerConfig(sampling=SamplingParams(temperature=0.8), micro_batches=2),  # which "4d" shares
        **how,
    )
    state = trainer.start(llm.params, jax.random.key(3))
    state, _ = trainer.train(state, rollout, np.arange(len(tokens), dtype=np.float32) % 3)
    return {
        "generate": said(first),
        "from the cache": said(again),
        "score": digest(np.asarray(alone).tobytes()),
        "gradient": digest(*(np.asarray(x).tobytes() for x in jax.tree.leaves(gradient))),
        "update": digest(*(np.asarray(x).tobytes() for x in jax.tree.leaves(state))),
        "weights": llm.contract().digest,
    }


def main(kernels: str, family: str, dtype: str, num_leaves: str, *degrees: str) -> None:
    count, _, heads = num_leaves.partition("of")
    heads = int(heads or max(8, int(count)))
    shape = SHAPE | dict(num_key_value_heads=heads, reduction_leaves=int(count), dtype=dtype)
    config, params = random_model(family, **shape)
    scoring_proof._refused = {}  # conftest takes its shared models for proven; here nothing is
    found = {}
    for name in degrees:
        degree, letters = int(name.rstrip("xpfdq")), name[len(name.rstrip("xpfdq")) :]
        exchanged = 1 if "x" in letters else leaves.EXCHANGED
        total = by_psum if "p" in letters else leaves.LeavesOfDevices.total
        with (
            mock.patch.object(leaves, "EXCHANGED", exchanged),
            mock.patch.object(leaves.LeavesOfDevices, "total", total),
        ):
            jax.clear_caches()
            try:
                found[name] = answers(kernels, config, params, degree, letters)
            except MeshDiffersError as error:
                found[name] = {"refused": str(error)}
    print(json.dumps(found))


def by_psum(self, own):
    return jax.lax.psum(own, self.axis)


if __name__ == "__main__":
    main(*sys.argv[1:])
