"""Training where several leaves hold a copy of each key-value head: the head is learned once, and copies stay equal.

Equal bits on several devices are test_contract/test_degrees.py.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from conftest import random_model

import jaxengine
from jaxengine import Rollout, SamplingParams
from jaxengine.config import ModelConfig
from jaxengine.models import loading
from jaxengine.models.named_weights import to_decoder
from jaxengine.models.params import Decoder
from jaxengine.rl.train_state import TrainerConfig
from jaxengine.rl.trainer import Trainer

HEADS = dict(num_attention_heads=8, num_key_value_heads=2, head_dim=16)
SHAPE: dict[str, Any] = HEADS | dict(num_hidden_layers=1, vocab_size=203, hidden_size=48, intermediate_size=64)
SAMPLING = SamplingParams(n=4, max_tokens=8, ignore_eos=True)
ONE, PARAMS = random_model("Qwen2", reduction_leaves=2, **SHAPE)
EIGHT = ONE.with_leaves(8)
COPIED = to_decoder(dict(loading.named_tensors(ONE, PARAMS)), EIGHT)


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    engine = dict(max_model_len=64, max_num_seqs=16, num_pages=80)
    prompts = [[5, 6, 7, 8], [9, 10]]
    outputs = jaxengine.generate(PARAMS, prompts, SAMPLING, key=jax.random.key(3), config=ONE, **engine)
    return Rollout.from_outputs(outputs)


@functools.cache
def trainer_of(config: ModelConfig) -> Trainer:
    """One for all tests, compiled once. Plain gradient descent, so that a change of the weights is their gradient."""
    return Trainer(config, optax.sgd(1.0), TrainerConfig(sampling=SAMPLING, micro_batches=2))


def trained(config: ModelConfig, params: Decoder, rollout: Rollout, updates: int) -> tuple[Any, dict[str, float]]:
    """(weights after so many updates, what the last one measured)."""
    trainer = trainer_of(config)
    state, measured = trainer.start(params, jax.random.key(0)), {}
    for _ in range(updates):
        state, (measured,) = trainer.train(state, rollout, np.arange(8, dtype=np.float32) % 3)
    return trainer.policy(state), measured


def test_a_heads_gradient_is_that_of_the_model_without_copies(rollout):
    """And the norm counts it once."""
    before = dict(loading.named_tensors(ONE, PARAMS))
    moved, norms = [], []
    for config, params in ((ONE, PARAMS), (EIGHT, COPIED)):
        after, measured = trained(config, params, rollout, 1)
        moved.append({name: array - before[name] for name, array in loading.named_tensors(config, after)})
        norms.append(measured["gradient_norm"])
    for name, expected in moved[0].items():
        np.testing.assert_allclose(moved[1][name], expected, rtol=2e-3, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-4)


def test_copies_are_equal_by_bits_after_three_updates(rollout):
    after, _ = trained(EIGHT, COPIED, rollout, 3)
    attention = after.layers[0].attention
    assert np.abs(attention.qkv - COPIED.layers[0].attention.qkv).max() > 1e-3
    for packed in (attention.qkv, attention.qkv_bias):
        held = np.asarray(packed)[:, 16:]
        assert all(held[leaf].tobytes() == held[leaf // 4 * 4].tobytes() for leaf in range(8))
        assert held[0].tobytes() != held[4].tobytes()


def test_copies_that_differ_have_no_one_head_to_train():
    attention = COPIED.layers[0].attention
    other = dataclasses.replace(attention, qkv=attention.qkv.at[5, 20, 0].add(1.0))
    params = dataclasses.replace(COPIED, layers=(dataclasses.replace(COPIED.layers[0], attention=other),))
    with pytest.raises(ValueError, match="the 4 copies of a key-value head differ"):
        trainer_of(EIGHT).start(params, jax.random.key(0))
