"""google-tunix: GRPO steps over the engine and the policy. Needs `pip install google-tunix==0.1.7`, in its own venv."""

import contextlib
import functools
import importlib.util
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_model, run_script
from flax import nnx

from checkpoints.model_folder import find_folder
from jaxengine import LLM
from jaxengine.device import steps
from jaxengine.rl.calc import arithmetic

pytestmark = [
    pytest.mark.tunix,
    pytest.mark.skipif(
        importlib.util.find_spec("tunix") is None,
        reason="google-tunix is not installed: pip install google-tunix==0.1.7",
    ),
    pytest.mark.filterwarnings("default"),  # Tunix's own
]
PROMPT_LENGTH, TOKENS, GROUP, STEPS = 12, 8, 4, 3


def bits(x) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


@pytest.fixture(scope="module")
def tunix():
    """The modules of Tunix that the tests use, and `ours`, which imports Tunix."""
    from tunix.rl import common, rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout import base_rollout

    from jaxengine.rl.integrations import tunix_rollout

    class Names:
        compute_per_token_logps = staticmethod(common.compute_per_token_logps)
        cluster, learner, rollout, ours = rl_cluster, grpo_learner, base_rollout, tunix_rollout

    return Names


@pytest.fixture(scope="module")
def policy(tunix):
    shipped = LLM("calc", progress=False, dtype="float32", max_model_len=64, num_pages=64)
    return lambda: tunix.ours.TunixPolicy(shipped.config, shipped.params)


@pytest.fixture(scope="module")
def cluster(tunix, policy):
    """An RLCluster with JaxEngineRollout, all roles on one device."""
    from transformers import PreTrainedTokenizerFast

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    role = tunix.cluster.Role
    config = tunix.cluster.ClusterConfig(
        role_to_mesh={role.ACTOR: mesh, role.REFERENCE: mesh, role.ROLLOUT: mesh},
        rollout_engine=functools.partial(
            tunix.ours.JaxEngineRollout, max_num_seqs=32, num_pages=256, compile_patience=1_000_000
        ),
        training_config=tunix.cluster.RLTrainingConfig(
            actor_optimizer=optax.adam(2e-4), eval_every_n_steps=1000, max_steps=1000
        ),
        rollout_config=tunix.rollout.RolloutConfig(
            max_tokens_to_generate=TOKENS, max_prompt_length=PROMPT_LENGTH, temperature=0.9, kv_cache_size=64
        ),
    )
    return tunix.cluster.RLCluster(
        actor=policy(),
        reference=policy(),
        cluster_config=config,
        tokenizer=PreTrainedTokenizerFast.from_pretrained(str(find_folder("calc"))),
    )


def padded(output, pad_id: int) -> np.ndarray:
    return np.array([np.pad(tokens, (0, TOKENS - len(tokens)), constant_values=pad_id) for tokens in output.tokens])


def of_tunix(tunix, cluster, model, output) -> np.ndarray:
    """The completions' logprobs by Tunix's forward pass over a TunixPolicy, 0 on padding."""
    pad = cluster.rollout.pad_id()
    completions = padded(output, pad)
    logprobs = tunix.compute_per_token_logps(
        *nnx.split(model),
        prompt_tokens=jnp.asarray(output.left_padded_prompt_tokens),
        completion_tokens=jnp.asarray(completions),
        pad_id=pad,
        eos_id=cluster.rollout.eos_id(),
        temperature=0.9,
    )
    return np.where(completions != pad, np.asarray(logprobs), 0)


def of_rollout(output) -> np.ndarray:
    return np.array([np.pad(logprobs, (0, TOKENS - len(logprobs))) for logprobs in output.logprobs])


def test_grpo_steps(tunix, cluster, capsys):
    """GRPO with two iterations for each batch and a KL penalty: the engine draws and scores, Tunix trains."""
    rollout, calls = cluster.rollout, []
    assert isinstance(rollout, tunix.ours.JaxEngineRollout)

    def watched(original, prompts, config, **more):
        output = original(prompts, config, **more)
        calls.append(
            (
                prompts,
                output,
                of_tunix(tunix, cluster, cluster.actor_trainer.model, output),
                rollout._llm.weights_version,
            )
        )
        return output

    def reward(prompts, completions, answers, **kwargs):
        return [float(text == answer) - 0.1 * len(text) for text, answer in zip(completions, answers, strict=True)]

    before = jax.tree.map(np.asarray, cluster.actor_trainer.model.params)
    rollout.generate = functools.partial(watched, rollout.generate)
    problems = arithmetic.problems(0, 4 * STEPS)
    batches = [
        {"prompts": np.array([p.prompt for p in part]), "answers": np.array([p.answer for p in part])}
        for part in (problems[i : i + 4] for i in range(0, len(problems), 4))
    ]
    learner = tunix.learner.GRPOLearner(
        cluster,
        reward_fns=reward,
        algo_config=tunix.learner.GRPOConfig(num_generations=GROUP, num_iterations=2, beta=0.04),
    )
    assert learner.should_sync_weights
    learner.train(batches)
    del rollout.generate

    assert cluster.global_steps == STEPS == rollout._llm.weights_version and len(calls) == STEPS
    trained = cluster.actor_trainer.model.params
    assert all(
        a is b
        for a, b in zip(jax.tree.leaves(rollout.model().params), jax.tree.leaves(rollout._llm.params), strict=True)
    )
    same = [
        np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(rollout._llm.params), strict=True)
    ]
    moved = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(before), strict=True)]
    assert all(same) and all(moved)
    worst = 0.0
    for version, (prompts, output, theirs, drawn_by) in enumerate(calls):
        assert (
            drawn_by == version and isinstance(prompts[0], np.str_) and len(prompts) == 4 * GROUP == len(output.tokens)
        )
        assert output.left_padded_prompt_tokens.shape == (4 * GROUP, PROMPT_LENGTH)
        groups = [{tuple(tokens) for tokens in output.tokens[i : i + GROUP]} for i in range(0, 4 * GROUP, GROUP)]
        assert sum(map(len, groups)) > len(groups)  # samples of a group differ where the model is not sure
        worst = max(worst, np.abs(of_rollout(output) - theirs).max())
    with capsys.disabled():
        print(f"\nTunix: {STEPS} GRPO steps, rollout against Tunix's forward: max |Δlogprob| {worst:.3g}")
    assert worst < 2e-6


@pytest.mark.parametrize(
    "temperature, top_p, top_k",
    [(0.9, 1.0, None), (0.9, 1.0, -1), (0.9, None, 10_000), (0.9, 0.7, None), (0.9, 1.0, 2), (0.9, 0.8, 5)]
    + [(1.3, 1.0, None), (0.0, 1.0, None), (0.0, 0.5, 1)],
)
def test_a_logprob_has_one_meaning(tunix, cluster, temperature, top_p, top_k):
    """get_per_token_logps, from Tunix's padded arrays, gives the bits that `generate` gave, and Tunix's own forward
    pass the same numbers: at the worker's temperature, over the whole vocabulary.
    """
    config = tunix.rollout.RolloutConfig(
        max_tokens_to_generate=TOKENS,
        max_prompt_length=PROMPT_LENGTH,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
    )
    is_drawn_from = temperature == 0.9 and top_p in (1.0, None) and top_k in (None, -1, 10_000)
    said = contextlib.nullcontext() if is_drawn_from else pytest.warns(UserWarning, match="over the whole vocabulary")
    with said:
        output = cluster.rollout.generate(["1+1=", "12*(3+4)="] * 2, config)
    pad, eos = cluster.rollout.pad_id(), cluster.rollout.eos_id()
    assert np.abs(of_rollout(output) - of_tunix(tunix, cluster, cluster.rollout.model(), output)).max() < 2e-6
    assert any(tokens[-1] == eos for tokens in output.tokens) and not any(
        text.endswith("<|im_end|>") for text in output.text
    )
    logprobs = cluster.rollout.get_per_token_logps(
        jnp.asarray(output.left_padded_prompt_tokens), jnp.asarray(padded(output, pad))
    )
    assert (bits(logprobs) == bits(of_rollout(output))).all() and np.asarray(logprobs).any()


def test_a_completion_mask_tells_what_is_padding(tunix, cluster):
    """Tunix's newer workers are given one; the pad id is a token where the mask has it."""
    rollout = cluster.rollout
    pad, prompts = rollout.pad_id(), np.array([[rollout.pad_id(), 5, 6, 7]])
    completions = np.array([[8, 9, pad, 10, pad, pad]])
    by_id, by_mask, shorter, with_pad = (
        bits(rollout.get_per_token_logps(prompts, completions, *mask))[0]
        for mask in ([], [completions != pad], [np.array([[1, 1, 0, 0, 0, 0]])], [np.array([[1, 1, 1, 1, 0, 0]])])
    )
    assert (by_id == by_mask).all() and (by_id != 0).tolist() == [True, True, False, True, False, False]
    assert (shorter[:2] == by_id[:2]).all() and not shorter[2:].any()
    assert (with_pad[:2] == by_id[:2]).all() and (with_pad != 0).tolist() == [True, True, True, True, False, False]
    assert with_pad[3] != by_id[3]  # it follows another token


def test_a_worker_has_arrays_of_its_own(tunix, policy):
    """Also where the actor's lie at home already: Tunix syncs no others."""
    actor, mesh = policy(), jax.sharding.Mesh(np.array(jax.devices()[:1]), ("tp",))
    home = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    actor.set_params(jax.device_put(actor.params, home))
    worker = tunix.ours.JaxEngineRollout(
        rollout_actor=actor, tokenizer=None, mesh=mesh, rollout_config=tunix.rollout.RolloutConfig(), num_pages=8
    )
    pairs = list(zip(*(jax.tree.leaves(model.params) for model in (actor, worker.model())), strict=True))
    assert all(given.sharding == own.sharding and given is not own for given, own in pairs)


def test_rollout_meshes_have_the_bits_of_one_device():
    """Before and after a step of Tunix's own learner, whose actor is cut over other devices."""
    times, on_host = run_script("rl/tunix_meshes.py")
    for time in times:
        facts, said = time["facts"], time["said"]
        assert set(said) == {"tp", "one", "2x2"} and all(found == said["one"] for found in said.values())
        assert said["one"]["drawn"] == said["one"]["scored"] == said["one"]["masked"]
        assert facts["actor is cut"] and facts["weights are the actor's"]
        assert facts["devices"] == [2, 3] and facts["copies"] == [1, 2]
    before, after = times
    assert before["facts"]["weights"] != after["facts"]["weights"]
    assert before["said"]["one"]["drawn"] != after["said"]["one"]["drawn"]
    assert len(on_host) == 1 and 0 < on_host[0] < 100  # a flag for each weight: whether it is finite


def test_threads_and_lengths_compile_nothing(tunix, cluster):
    """Several threads with other lengths, prompts and temperatures: one set of compiled steps."""

    def num_compiled():
        return steps.prefill_step._cache_size(), steps.decode_step._cache_size()

    def generate(i):
        config = tunix.rollout.RolloutConfig(
            max_tokens_to_generate=1 + i % TOKENS,
            max_prompt_length=PROMPT_LENGTH,
            temperature=1.0,
            top_k=5 * (i % 2),
            top_p=None if i % 3 else 0.9,
        )
        return cluster.rollout.generate(np.array([f"{i}+{i}="] * 2), config)

    before = num_compiled()
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(generate, range(12)))
    assert num_compiled() == before
    for i, output in enumerate(outputs):
        assert all(1 <= len(tokens) <= 1 + i % TOKENS for tokens in output.tokens)


def test_seeds_and_calls(tunix, cluster):
    words = jax.random.PRNGKey(3)
    config = tunix.rollout.RolloutConfig(
        max_tokens_to_generate=TOKENS, max_prompt_length=PROMPT_LENGTH, seed=words, temperature=1.0
    )
    first, second = (cluster.rollout.generate(["31*27="] * 8, config) for _ in range(2))
    assert [*map(tuple, first.tokens)] != [*map(tuple, second.tokens)]  # two calls with one seed draw different tokens
    rollout = cluster.rollout
    calls = next(rollout._calls)
    keys = []
    for seed in (3, words, jax.random.key(3)):
        rollout._calls = iter([calls])
        keys.append(jax.random.key_data(rollout._call_key(seed)).tolist())
    assert keys[0] == keys[1] == keys[2]


def test_what_tunix_would_accept_silently_is_refused(tunix, cluster, policy):
    config = tunix.rollout.RolloutConfig(max_tokens_to_generate=TOKENS, max_prompt_length=4)
    with pytest.raises(ValueError, match="has 9 tokens, max_prompt_length is 4"):
        cluster.rollout.generate(["12*(3+4)="], config)
    with pytest.raises(ValueError, match="holds the pad token"):
        cluster.rollout.generate(["<|endoftext|>"], config)
    with pytest.raises(TypeError, match="must be a jaxengine.rl.integrations.tunix_rollout.TunixPolicy, got Linear"):
        tunix.ours.JaxEngineRollout(
            rollout_actor=nnx.Linear(1, 1, rngs=nnx.Rngs(0)), tokenizer=None, mesh=None, rollout_config=config
        )
    tokens = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="packed sequences"):
        policy()(tokens, jnp.arange(4)[None], None, None)
    bad = nnx.state(policy(), nnx.Param)
    bad["norm"] = bad["norm"].replace(bad["norm"].get_value().at[0].set(jnp.nan))
    version, kept = cluster.rollout._llm.weights_version, cluster.rollout.model().params
    with pytest.raises(ValueError, match="norm"):
        cluster.rollout.update_params(bad, (nnx.Param,))
    assert cluster.rollout._llm.weights_version == version and cluster.rollout.model().params.norm is kept.norm


def test_padding_may_stand_anywhere(tunix):
    """The logits of tokens do not depend on where padding stands, bit for bit."""
    model = tunix.ours.TunixPolicy(*random_model(num_hidden_layers=1, vocab_size=300))
    tokens = np.random.default_rng(0).integers(1, 300, (1, 9))

    def mask(real):
        return jnp.asarray(real)[:, None, :] & jnp.tril(jnp.ones((real.shape[1],) * 2, bool))

    whole = np.ones((1, 9), bool)
    real = np.array([[0, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 0]], bool)
    spread = np.zeros((1, 14), np.int64)
    spread[real] = tokens[0]
    run = nnx.jit(lambda model, tokens, mask: model(tokens, None, None, mask)[0])
    dense = run(model, jnp.asarray(tokens), mask(whole))
    assert (bits(run(model, jnp.asarray(spread), mask(real)))[real] == bits(dense)[0]).all()
