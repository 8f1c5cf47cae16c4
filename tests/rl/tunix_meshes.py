"""Run by test_tunix.py in a process with four CPU devices: a GRPO step inside google-tunix on meshes.

The actor is cut over two devices ("fsdp"), and the rollout worker's weights are shared by the two others ("tp"). The
step's prompts are drawn again after it, and then on other rollout meshes under the weights that the actor had both
times. Prints, as JSON, of each time what is true of it, and of each mesh digests of tokens and logprobs: as drawn, and
as scored; and for each time that Tunix synced weights the bytes of it that came to the host.
"""

import functools
import hashlib
import json
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 4)

from conftest import ONE_TILE, random_model  # noqa: E402
from host_memory import bytes_on_host  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402
from tunix.rl import rl_cluster  # noqa: E402
from tunix.rl.grpo import grpo_learner  # noqa: E402
from tunix.rl.rollout.base_rollout import RolloutConfig  # noqa: E402

from checkpoints.model_folder import find_folder  # noqa: E402
from jaxengine.engine import step_variants  # noqa: E402
from jaxengine.rl.calc import arithmetic  # noqa: E402
from jaxengine.rl.integrations.tunix_rollout import JaxEngineRollout, TunixPolicy  # noqa: E402

PROMPTS, GROUP = 2, 4
CONFIG = RolloutConfig(max_tokens_to_generate=6, max_prompt_length=12, temperature=0.9, kv_cache_size=64)
ENGINE = dict(max_num_seqs=16, num_pages=64)
ROLE = rl_cluster.Role


def mesh_of(devices: slice, shape: tuple[int, int], names: tuple[str, str] = ("fsdp", "tp")) -> Mesh:
    return Mesh(np.array(jax.devices()[devices]).reshape(shape), names)


ACTOR, ROLLOUT = mesh_of(slice(0, 2), (2, 1)), mesh_of(slice(2, 4), (1, 2))
OTHERS = {"one": mesh_of(slice(3, 4), (1, 1)), "2x2": mesh_of(slice(0, 4), (2, 2), ("data", "tensor"))}


def on_actor(params: Any) -> Any:
    """Each array cut along its last axis, as a trainer may keep it."""

    def home(x: Any) -> NamedSharding:
        return NamedSharding(ACTOR, PartitionSpec(*[None] * (x.ndim - 1), "fsdp"))

    return jax.device_put(params, jax.tree.map(home, params))


class Drawn(NamedTuple):
    """A call of `generate`."""

    params: Any  # the actor's, on the host
    prompts: list[str]
    facts: dict[str, Any]
    said: dict[str, dict[str, str]]  # by mesh


def digest(*arrays: Any) -> str:
    return hashlib.sha256(b"|".join(np.asarray(x).tobytes() for x in arrays)).hexdigest()[:16]


def said(rollout: JaxEngineRollout, output: Any) -> dict[str, str]:
    """Of drawn completions: tokens and logprobs, and logprobs as they are scored, in both forms of the call."""
    width, pad = CONFIG.max_tokens_to_generate, rollout.pad_id()
    completions = np.array([np.pad(x, (0, width - len(x)), constant_values=pad) for x in output.tokens])
    drawn = np.array([np.pad(x, (0, width - len(x))) for x in output.logprobs])
    scored = rollout.get_per_token_logps(output.left_padded_prompt_tokens, completions)
    masked = rollout.get_per_token_logps(output.left_padded_prompt_tokens, completions, completions != pad)
    assert drawn.dtype == scored.dtype == np.float32 and drawn.any()
    return {"tokens": digest(completions), "drawn": digest(drawn), "scored": digest(scored), "masked": digest(masked)}


def main() -> None:
    model_config, weights = random_model(vocab_size=259, num_hidden_layers=1, reduction_leaves=4)
    worker = functools.partial(JaxEngineRollout, **ENGINE)
    cluster = rl_cluster.RLCluster(
        actor=TunixPolicy(model_config, on_actor(weights)),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(str(find_folder("calc"))),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={ROLE.ACTOR: ACTOR, ROLE.REFERENCE: ACTOR, ROLE.ROLLOUT: ROLLOUT},
            rollout_engine=worker,
            rollout_config=CONFIG,
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=optax.adam(2e-4), eval_every_n_steps=1000, max_steps=1000
            ),
        ),
    )
    rollout, drawn = cluster.rollout, list[Drawn]()

    def watched(original: Any, prompts: Any, config: Any) -> Any:
        output = original(prompts, config)
        actor, own = cluster.actor_trainer.model.params, rollout.model().params
        parts = {len(x.addressable_shards) * x.addressable_shards[0].data.size // x.size for x in jax.tree.leaves(own)}
        facts = {
            "actor is cut": not any(x.is_fully_replicated for x in jax.tree.leaves(actor)),
            "devices": sorted({d.id for x in jax.tree.leaves(own) for d in x.devices()}),
            "copies": sorted(parts),  # 1: of what the two devices share; 2: of what both have
            "weights are the actor's": digest(*jax.tree.leaves(actor)) == digest(*jax.tree.leaves(own)),
            "weights": digest(*jax.tree.leaves(own)),
        }
        drawn.append(Drawn(jax.tree.map(np.asarray, actor), list(prompts), facts, {"tp": said(rollout, output)}))
        return output

    rollout.generate = functools.partial(watched, rollout.generate)
    update, on_host = rollout.update_params, list[int]()
    rollout.update_params = lambda *params: on_host.append(bytes_on_host(update, *params)[0])
    problems = arithmetic.problems(0, PROMPTS)
    learner = grpo_learner.GRPOLearner(
        cluster,
        reward_fns=lambda prompts, completions, **_: [float(i % GROUP) for i in range(len(completions))],
        algo_config=grpo_learner.GRPOConfig(num_generations=GROUP, num_iterations=1, beta=0.0),
    )
    learner.train([{"prompts": np.array([problem.prompt for problem in problems])}])
    cluster.generate(drawn[0].prompts)
    for name, mesh in OTHERS.items():
        actor = TunixPolicy(model_config, on_actor(weights))
        other = worker(rollout_actor=actor, tokenizer=cluster.tokenizer, mesh=mesh, rollout_config=CONFIG)
        for each in drawn:
            actor.set_params(on_actor(each.params))
            other.update_params(nnx.state(actor, nnx.Param), (nnx.Param,))
            each.said[name] = said(other, other.generate(each.prompts, CONFIG))
    print(json.dumps([[{"facts": each.facts, "said": each.said} for each in drawn], on_host]))


if __name__ == "__main__":
    with mock.patch.object(step_variants, "TILES", ONE_TILE):
        main()
