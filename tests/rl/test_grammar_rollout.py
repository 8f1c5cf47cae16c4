"""Learning from completions that follow a grammar: they are scored over the tokens that it allowed."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from conftest import make_llm

import jaxengine
from jaxengine import Rollout, SamplingParams
from jaxengine.rl.integrations.nnx_policy import Policy
from jaxengine.rl.loops.loop import Loop
from jaxengine.rl.objective import ALGORITHMS
from jaxengine.rl.train_state import TrainerConfig
from jaxengine.rl.trainer import Trainer

pytest.importorskip("llguidance")  # an extra, `structured`
SAMPLING = SamplingParams(n=4, max_tokens=8, top_k=20, structured_outputs={"regex": "[5-9]{2,6}(,[0-9])?"})
PROMPTS = ["12+30=", "7*8="]


@pytest.fixture(scope="module")
def rollout(calc) -> Rollout:
    return Rollout.from_outputs(calc.generate(PROMPTS, SAMPLING, key=jax.random.key(5)))


def trainer_of(calc, **how) -> Trainer:
    return Trainer(calc.config, optax.sgd(1.0), TrainerConfig(ALGORITHMS["grpo"], SAMPLING, **how))


def rewards(rollout: Rollout) -> np.ndarray:
    return np.arange(len(rollout.tokens), dtype=np.float32) % 4


@pytest.mark.parametrize("keep", [False, True])
def test_the_first_update_is_exactly_on_policy(calc, rollout, keep):
    """Its logprobs are generate's, bit for bit; a second one has moved, and no drawn token falls out of the grammar."""
    given = rollout.with_grammar_mask(calc.config, calc.tokenizer)
    trainer = trainer_of(calc, epochs=2, mini_batches=1, micro_batches=2, keep_sampling_mask=keep)
    _, (first, second) = trainer.train(trainer.start(calc.params, jax.random.key(0)), given, rewards(rollout))
    assert (first["max_delta"], first["ratio_max"]) == (0, 1) and 0 < second["max_delta"] < np.inf


def test_every_entrance_takes_the_mask(calc, rollout, tmp_path):
    given = rollout.with_grammar_mask(calc.config, calc.tokenizer)
    given.save(tmp_path / "rollout.safetensors")
    given = Rollout.load(tmp_path / "rollout.safetensors")
    arrays, how = (given.tokens, given.mask, given.sampling_params), dict(grammar_mask=given.grammar_mask)
    expected = rollout.logprobs.view(np.uint32)
    for found in (
        jaxengine.score(calc.params, *arrays, config=calc.config, **how),
        Policy(calc.config, calc.params).logprobs(*arrays, **how),
        calc.score(*arrays),
    ):
        assert np.array_equal(np.asarray(found).view(np.uint32), expected)
    plain = [each.replace(structured_outputs=None) for each in given.sampling_params]
    without = np.asarray(jaxengine.score(calc.params, *arrays[:2], plain, config=calc.config))
    assert not np.array_equal(without.view(np.uint32), expected), "the grammar is a part of the distribution"


def test_a_rollout_without_its_mask_is_refused(calc, rollout):
    trainer = trainer_of(calc)
    state = trainer.start(calc.params, jax.random.key(0))
    with pytest.raises(ValueError, match=r"structured_outputs.*rollout\.with_grammar_mask\(model_config, tokenizer\)"):
        trainer.batch(state, rollout, rewards(rollout))
    given = rollout.with_grammar_mask(calc.config, calc.tokenizer)
    plain = TrainerConfig(ALGORITHMS["grpo"], SAMPLING.replace(structured_outputs=None))
    with pytest.raises(ValueError, match="has a grammar_mask, and the configuration's sampling no structured_outputs"):
        Trainer(calc.config, optax.sgd(1.0), plain).batch(state, given, rewards(rollout))
    cut = dataclasses.replace(given, grammar_mask=jax.tree.map(lambda x: x[:2], given.grammar_mask))
    with pytest.raises(ValueError, match="grammar_mask must have rows of the tokens' shape"):
        trainer.batch(state, cut, rewards(rollout))
    unstructured = Rollout.from_outputs(calc.generate(PROMPTS, SamplingParams(max_tokens=2), key=jax.random.key(0)))
    assert unstructured.with_grammar_mask(calc.config, calc.tokenizer).grammar_mask is None


def test_the_loop_brings_it(calc):
    llm = make_llm(calc.config, calc.params)
    loop = Loop(
        trainer=trainer_of(calc),
        problems=lambda _: [(prompt, None) for prompt in PROMPTS],
        judge=lambda outputs, _: np.arange(8, dtype=np.float32) % 4,
        length=32,
        tokenizer=calc.tokenizer,
        engine=dict(max_model_len=512, max_num_seqs=32, num_pages=400),
    )
    _, iteration = loop.iterate(loop.trainer.start(llm.params, jax.random.key(0)))
    assert iteration.updates[0]["max_delta"] == 0
