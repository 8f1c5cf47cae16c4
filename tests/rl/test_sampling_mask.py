"""Sampling masks: a policy that has moved is scored over the tokens that the draw could have given."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_llm, random_model

import jaxengine
from jaxengine import Rollout, SamplingParams
from jaxengine.device.sampling_mask import SamplingMask, is_kept, packed, unpacked
from jaxengine.models import plain
from jaxengine.rl.integrations.nnx_policy import Policy
from jaxengine.rl.losses import ratios
from jaxengine.rl.objective import ALGORITHMS
from jaxengine.rl.train_state import TrainerConfig
from jaxengine.rl.trainer import Trainer

CONFIG, PARAMS = random_model(num_hidden_layers=1, vocab_size=300)
KINDS = {
    "top-k": SamplingParams(top_k=3),
    "top-p": SamplingParams(top_p=0.8, temperature=0.7),
    "min-p": SamplingParams(min_p=0.1),
    "all": SamplingParams(
        top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.2, logit_bias={5: 3.0}, min_tokens=3, stop_token_ids=[7]
    ),
    "nothing": SamplingParams(),
    "greedy": SamplingParams(temperature=0.0, top_k=2),
}


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    """Two samples of each kind; what they kept is in it."""
    outputs = make_llm(CONFIG, PARAMS).generate(
        [[i + 1] * 5 for i in range(len(KINDS))],
        [each.replace(n=2, max_tokens=8) for each in KINDS.values()],
        key=jax.random.key(1),
    )
    rollout = Rollout.from_outputs(outputs)
    kept = jaxengine.sampling_mask(PARAMS, rollout.tokens, rollout.mask, rollout.sampling_params, config=CONFIG)
    return dataclasses.replace(rollout, sampling_mask=kept)


@pytest.fixture(scope="module")
def moved():
    """Weights that have moved so far that they would cut other tokens."""
    keys = iter(jax.random.split(jax.random.key(2), 100))
    return jax.tree.map(lambda x: x + 0.3 * x.std() * jax.random.normal(next(keys), x.shape), PARAMS)


def bits(x) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


def score(params, rollout, **how):
    return jaxengine.score(params, rollout.tokens, rollout.mask, rollout.sampling_params, config=CONFIG, **how)


def of_kind(name: str) -> slice:
    first = 2 * list(KINDS).index(name)
    return slice(first, first + 2)


def test_under_the_weights_that_drew_the_bits_are_those_reported(rollout):
    assert (bits(score(PARAMS, rollout, sampling_mask=rollout.sampling_mask)) == bits(rollout.logprobs)).all()


def test_no_drawn_token_falls_out(rollout, moved):
    """Without the mask some do: this is what it is for."""
    cut = np.asarray(score(moved, rollout))
    kept = np.asarray(score(moved, rollout, sampling_mask=rollout.sampling_mask))
    assert (cut[rollout.mask] == -np.inf).any() and np.isfinite(kept).all()
    ratio = ratios(kept, rollout.logprobs, rollout.mask, ALGORITHMS["grpo"])
    assert (np.asarray(ratio)[rollout.mask] > 0).all()
    for name in ("nothing", "greedy"):  # rows that keep the vocabulary are scored as ever
        assert (bits(kept[of_kind(name)]) == bits(cut[of_kind(name)])).all()


def test_what_is_kept(rollout):
    """As many as top-k says, no more than the vocabulary, and the drawn token among them."""
    counts, ids = rollout.sampling_mask.counts, rollout.sampling_mask.ids
    assert (counts[of_kind("top-k")][rollout.mask[of_kind("top-k")]] == 3).all()
    assert not counts[of_kind("nothing")].any() and not counts[of_kind("greedy")].any()
    assert not counts[~rollout.mask].any() and (counts[of_kind("top-p")][rollout.mask[of_kind("top-p")]] > 0).all()
    for row in range(of_kind("nothing").start):
        starts = np.cumsum(counts[row]) - counts[row]
        for position in np.flatnonzero(rollout.mask[row]):
            own = ids[row, starts[position] : starts[position] + counts[row, position]]
            assert rollout.tokens[row, position] in own and (np.diff(own) > 0).all() and 0 <= own[0]
        assert (ids[row, counts[row].sum() :] == -1).all()


def test_all_entrances_agree(rollout, moved):
    kept = rollout.sampling_mask
    expected = bits(score(moved, rollout, sampling_mask=kept))
    llm, how = make_llm(CONFIG, moved), dict(sampling_mask=kept)
    given = rollout.tokens, rollout.mask, rollout.sampling_params
    assert (bits(llm.score(*given, **how)) == expected).all()
    assert (bits(Policy(CONFIG, moved).logprobs(*given, **how)) == expected).all()
    jitted = jax.jit(lambda params, rollout: score(params, rollout_of(rollout), sampling_mask=rollout.sampling_mask))

    def rollout_of(traced):
        return dataclasses.replace(traced, coordinates=rollout.coordinates)

    assert (bits(jitted(moved, rollout)) == expected).all()


def test_gradients_are_those_of_the_kept_tokens(rollout, moved):
    """Of one row against a plain model that is renormalised over the same tokens."""
    row, kept = of_kind("top-p").start, rollout.sampling_mask
    one = jax.tree.map(lambda x: x[row : row + 1], rollout)
    sampling, starts = KINDS["top-p"], np.cumsum(kept.counts[row]) - kept.counts[row]
    weight = np.random.default_rng(0).normal(size=one.mask.shape).astype(np.float32)

    def ours(params):
        how = dict(config=CONFIG, sampling_mask=one.sampling_mask)
        return (weight * jaxengine.score(params, one.tokens, one.mask, sampling, **how)).sum()

    def theirs(params):
        logits = plain.logits(CONFIG, params, one.tokens[0]) / sampling.temperature
        total = 0.0
        for position in np.flatnonzero(one.mask[0]):
            own = kept.ids[row, starts[position] : starts[position] + kept.counts[row, position]]
            logprobs = jax.nn.log_softmax(logits[position - 1, own])
            total += weight[0, position] * logprobs[list(own).index(one.tokens[0, position])]
        return total

    found, expected = jax.jit(jax.grad(ours))(moved), jax.jit(jax.grad(theirs))(moved)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() <= 1e-4 * max(np.abs(b).max(), 1e-6)
    outside = np.setdiff1d(np.arange(CONFIG.vocab_size), [*kept.ids[row], *one.tokens[0]])
    assert outside.size and not np.asarray(found.output_head).reshape(-1, CONFIG.hidden_size)[outside].any()


def test_is_kept_against_a_loop():
    """Any counts, more than one turn of the loop takes among them."""
    rng = np.random.default_rng(0)
    counts = np.array([[0, 3, 200, 1], [2, 0, 0, 300]], np.int32)
    sets = [[np.sort(rng.permutation(500)[:count]) for count in row] for row in counts]
    ids = np.full((2, 512), -1, np.int32)
    for row, own in zip(ids, sets, strict=True):
        row[: sum(map(len, own))] = np.concatenate(own)
    own = SamplingMask(jnp.asarray(counts), jnp.asarray(ids))
    for position in range(4):
        found = np.asarray(is_kept(own, jnp.array([position, position]), 500))
        for row in range(2):
            expected = sets[row][position] if counts[row, position] else np.arange(500)
            np.testing.assert_array_equal(np.flatnonzero(found[row]), expected)


def test_words_hold_what_can_be_drawn():
    logits = jnp.where(np.random.default_rng(0).random((5, 96)) < 0.3, -jnp.inf, 0.0)
    np.testing.assert_array_equal(unpacked(np.asarray(packed(logits))), np.asarray(logits) == 0)


def test_other_weights_and_other_shapes_are_refused(rollout, moved):
    with pytest.raises(ValueError, match=r"tokens\[\d+, \d+\] is \d+, which top-k, top-p and min-p do not keep"):
        jaxengine.sampling_mask(moved, rollout.tokens, rollout.mask, rollout.sampling_params, config=CONFIG)
    with pytest.raises(ValueError, match=r"counts of the tokens' shape \[2, "):
        given = rollout.tokens[:2], rollout.mask[:2], rollout.sampling_params[:2]
        jaxengine.score(PARAMS, *given, config=CONFIG, sampling_mask=rollout.sampling_mask)


def test_the_trainer_keeps_it(rollout, moved):
    """Both updates of a rollout see every token; the first is exactly on-policy. The rollout's own mask is taken."""
    rows, rewards = of_kind("top-k"), np.array([0.0, 1.0])
    drawn = dataclasses.replace(jax.tree.map(lambda x: x[rows], rollout), group=np.zeros(2, np.int32))
    config = TrainerConfig(ALGORITHMS["grpo"], KINDS["top-k"], epochs=2, keep_sampling_mask=True, micro_batches=2)
    trainer = Trainer(CONFIG, optax.sgd(30.0), config)
    state = trainer.start(PARAMS, jax.random.key(0))
    found = trainer.batch(state, dataclasses.replace(drawn, sampling_mask=None), rewards).kept
    assert found is not None and (found.counts == drawn.sampling_mask.counts).all()
    _, (first, second) = trainer.train(state, dataclasses.replace(drawn, sampling_mask=None), rewards)
    assert (first["max_delta"], first["ratio_max"]) == (0, 1) and 0 < second["max_delta"] < np.inf
    own = trainer.batch(trainer.start(moved, jax.random.key(0)), drawn, rewards).kept
    assert own is not None and (np.asarray(own.ids) == drawn.sampling_mask.ids).all()
