"""The policy as an nnx.Module: the same bits, the same arrays, trained by nnx and optax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_llm, random_model
from flax import nnx

from jaxengine import Rollout, SamplingParams
from jaxengine.rl.integrations.nnx_policy import Policy
from pallas_kernels.tiles import unknown_zero


def bits(x) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


@pytest.fixture(scope="module")
def model(tiny):
    """The shared engine's model, whose steps are compiled once for the whole suite."""
    return tiny.config, tiny.params


@pytest.fixture(scope="module")
def llm(model):
    return make_llm(*model)


def generate(llm, key: int) -> Rollout:
    return Rollout.from_outputs(
        llm.generate([[1, 2, 3], [4] * 20], SamplingParams(max_tokens=12, n=2), key=jax.random.key(key))
    )


TRANSFORM = optax.adam(3e-3)  # one for all: nnx compiles again for another


@nnx.jit
def step(policy: Policy, optimizer: nnx.Optimizer, tokens, mask):
    """One step towards the given tokens: (the loss, logprobs, gradient). One program for the whole file."""

    def loss(policy: Policy):
        logprobs = policy.logprobs(tokens, mask)
        return -logprobs.sum() / mask.sum(), logprobs

    (value, logprobs), gradient = nnx.value_and_grad(loss, has_aux=True)(policy)
    optimizer.update(policy, gradient)
    return value, logprobs, gradient


def test_arrays_go_in_and_out_as_they_are(model):
    config, params = model
    policy = Policy(config, params)
    assert all(a is b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(policy.params), strict=True))
    assert jax.tree.structure(policy.params) == jax.tree.structure(params)
    assert policy.layers[1].attention.qkv.get_value() is params.layers[1].attention.qkv
    other = jax.tree.map(lambda x: x + 1, params)
    policy.set_params(other)
    assert all(a is b for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(policy.params), strict=True))
    assert len(jax.tree.leaves(nnx.state(policy, nnx.Param))) == len(jax.tree.leaves(params))


def test_params_that_do_not_fit_are_refused(model):
    config, params = model
    wrong = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    with pytest.raises(ValueError, match="params do not fit config"):
        Policy(config, wrong)
    with pytest.raises(ValueError, match="params do not fit config"):
        Policy(config, params).set_params(wrong)


def test_logprobs_have_the_bits_of_generate(model, llm):
    """Inside nnx.value_and_grad; every leaf has a gradient, at its own path."""
    policy, rollout = Policy(*model), generate(llm, 0)
    _, logprobs, gradient = step(policy, nnx.Optimizer(policy, TRANSFORM, wrt=nnx.Param), rollout.tokens, rollout.mask)
    assert (bits(logprobs) == bits(rollout.logprobs)).all()
    gradients = nnx.merge(nnx.graphdef(policy), gradient).params
    for g, leaf in zip(jax.tree.leaves(gradients), jax.tree.leaves(model[1]), strict=True):
        values = np.asarray(g, np.float32)
        assert g.shape == leaf.shape and g.dtype == leaf.dtype and np.isfinite(values).all() and values.any()


@pytest.mark.slow
def test_logits_have_the_bits_of_generate(model, llm):
    """Alone, and inside nnx.value_and_grad, where a loss on them gives each leaf a gradient."""
    policy, rollout = Policy(*model), generate(llm, 0)

    @nnx.jit
    def run(policy: Policy, tokens):
        loss = lambda policy: ((logits := policy(tokens)).max(-1).sum(), logits)
        return policy(tokens), *nnx.value_and_grad(loss, has_aux=True)(policy)

    alone, (_, logits), gradient = run(policy, rollout.tokens)
    assert (bits(alone) == bits(logits)).all() and logits.shape == (*rollout.tokens.shape, 1000)
    chosen = _logprobs(policy.kernels, logits[:, :-1], rollout.tokens[:, 1:])
    assert (bits(np.where(rollout.mask[:, 1:], chosen, 0)) == bits(rollout.logprobs[:, 1:])).all()
    assert all(np.asarray(g, np.float32).any() for g in jax.tree.leaves(gradient))


@functools.partial(jax.jit, static_argnums=0)
def _logprobs(kernels, logits, tokens):
    """Of those tokens, by the kernels' own draw, padded to whole blocks as the sampler has it."""
    count, vocab = tokens.size, logits.shape[-1]
    flat = jnp.pad(logits.reshape(count, vocab), ((0, -count % 32), (0, -vocab % 1024)), constant_values=-jnp.inf)
    given = jnp.pad(tokens.reshape(count), (0, -count % 32))
    drawn = kernels.over_rows(
        lambda _, rows: kernels.draw.draw_and_score(*rows), 32, (), (flat, given), count + unknown_zero(flat)
    )
    return drawn.logprobs[:count].reshape(tokens.shape)


def test_nnx_and_optax_train_it(model, llm):
    """Steps towards a rollout's own tokens.

    They become likelier, and what the engine draws with the new weights has their bits.
    """
    policy, rollout = Policy(*model), generate(llm, 0)
    optimizer = nnx.Optimizer(policy, TRANSFORM, wrt=nnx.Param)
    losses = [float(step(policy, optimizer, rollout.tokens, rollout.mask)[0]) for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]

    llm.update_params(policy.params)
    again = generate(llm, 1)
    assert (again.weight_versions[again.mask] == llm.weights_version).all() and not np.array_equal(
        again.tokens, rollout.tokens
    )
    _, logprobs, _ = step(policy, optimizer, again.tokens, again.mask)
    assert (bits(logprobs) == bits(again.logprobs)).all()


def test_copies_of_a_head_are_not_trained_apart():
    config, params = random_model(reduction_leaves=8)
    with pytest.raises(ValueError, match="reduction_leaves=8 .*num_key_value_heads=4 .*with_leaves"):
        Policy(config, params)
