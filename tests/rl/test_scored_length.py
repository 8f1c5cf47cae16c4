"""A sequence beyond the model's context is refused wherever it is scored, as it is where one is generated."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from conftest import random_model

import jaxengine
from jaxengine import LLM, Rollout, SamplingParams
from jaxengine.config import RopeConfig
from jaxengine.device.scoring_input import check_scored
from jaxengine.rl.integrations.nnx_policy import Policy
from jaxengine.rl.trainer import Trainer

CONTEXT = 40
CONFIG, PARAMS = random_model(num_hidden_layers=1, vocab_size=250, max_position_embeddings=CONTEXT)
REFUSED = "sequence of 41 tokens .*max_position_embeddings=40"


def sequences(last: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask) of two sequences; the last token under the mask of the second is at position `last`."""
    mask = np.zeros((2, 64), bool)
    mask[0, 3:9], mask[1, last - 2 : last + 1] = True, True
    return np.ones((2, 64), np.int32), mask


def by_function(tokens, mask):
    return jaxengine.score(PARAMS, tokens, mask, config=CONFIG)


def by_llm(tokens, mask):
    return LLM.from_params(CONFIG, PARAMS, max_model_len=16, max_num_seqs=2, num_pages=8).score(tokens, mask)


def by_policy(tokens, mask):
    return Policy(CONFIG, PARAMS).logprobs(tokens, mask)


def by_mask(tokens, mask):
    return jaxengine.sampling_mask(PARAMS, tokens, mask, SamplingParams(top_k=2), config=CONFIG)


def by_trainer(tokens, mask):
    trainer, zeros = Trainer(CONFIG, optax.sgd(1.0)), np.zeros(mask.shape, np.float32)
    rollout = Rollout(tokens, mask, zeros, mask.sum(1), np.zeros(2, np.int32), tokens)
    return trainer.batch(trainer.start(PARAMS, jax.random.key(0)), rollout, np.ones(2))


ENTRANCES = [by_function, by_llm, by_policy, by_mask, by_trainer]


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_all_entrances_refuse(entrance):
    with pytest.raises(ValueError, match=rf"{REFUSED[:21]} \(tokens\[1\].*max_position_embeddings=40"):
        entrance(*sequences(CONTEXT))


def test_the_whole_context_is_allowed():
    """And padding after it."""
    check_scored(*sequences(CONTEXT - 1), CONFIG)


def test_a_stretched_context_is_that_of_generate():
    """What a rope with yarn reaches beyond max_position_embeddings is generated, and so it is scored."""
    stretched = dataclasses.replace(CONFIG, rope=RopeConfig(1e4, "yarn", 2.0, CONTEXT))
    llm = LLM.from_params(stretched, PARAMS, max_num_seqs=2, num_pages=8)
    outputs = llm.generate([[1, 2, 3]], SamplingParams(ignore_eos=True), key=jax.random.key(0))
    rollout = Rollout.from_outputs(outputs)
    assert rollout.tokens.shape == (1, 2 * CONTEXT)
    for scored in (
        llm.score(rollout.tokens, rollout.mask),
        jaxengine.score(PARAMS, rollout.tokens, rollout.mask, config=stretched),
    ):
        assert np.asarray(scored).tobytes() == rollout.logprobs.tobytes()
    longer = np.ones((1, 2 * CONTEXT + 1), np.int32)
    with pytest.raises(ValueError, match=rf"sequence of {2 * CONTEXT + 1} tokens .*context of {2 * CONTEXT} "):
        check_scored(longer, np.arange(longer.shape[1])[None] == 2 * CONTEXT, stretched)


def test_inside_jit_the_width_counts():
    tokens, mask = sequences(10)
    with pytest.raises(ValueError, match="sequence of 64 tokens .*inside jit"):
        jax.eval_shape(by_function, tokens, mask)
    assert jax.eval_shape(by_function, tokens[:, :CONTEXT], mask[:, :CONTEXT]).shape == (2, CONTEXT)
    with pytest.raises(ValueError, match="sequence of 64 tokens"):
        Policy(CONFIG, PARAMS)(tokens)
