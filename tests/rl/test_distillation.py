"""Distillation: divergences beside plain loops, a teacher's logprobs beside those that it reports, and a student that
learns back what noise took from it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_trainer import ENGINE, TINY, WIDTH, problems

import jaxengine
from jaxengine import Rollout, SamplingParams
from jaxengine.device.candidates import coarsened
from jaxengine.rl.distillation import divergences, likeliest
from jaxengine.rl.objective import Objective
from jaxengine.rl.train_state import TrainerConfig
from jaxengine.rl.trainer import Trainer

SAMPLING = SamplingParams(n=2, max_tokens=8, temperature=0.9, ignore_eos=True)
DIVERGENCES = ("forward", "reverse", "jensen-shannon")
BETA = 0.3
VOCAB = 12
ROWS = 4


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def naive_kl(p, q) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def naive(student, teacher, ids, divergence) -> float:
    """Of the float64 logits of one position."""

    def kept(logits):
        probabilities = softmax(logits)
        others = [probabilities[i] for i in range(VOCAB) if i not in ids]
        return [*(probabilities[i] for i in ids if i >= 0), sum(others)]

    q, p = kept(student), kept(teacher)
    if divergence == "forward":
        return naive_kl(p, q)
    if divergence == "reverse":
        return naive_kl(q, p)
    mixture = [BETA * a + (1 - BETA) * b for a, b in zip(p, q, strict=True)]
    return BETA * naive_kl(p, mixture) + (1 - BETA) * naive_kl(q, mixture)


@functools.partial(jax.jit, static_argnames="divergence")
def apart(student, teacher, ids, divergence):
    """Of each position `[t]`, as the trainer has it, from logits `[t, V]`."""
    mask = jnp.ones((1, len(student)), bool)
    both = (coarsened(jax.nn.log_softmax(logits), ids)[None] for logits in (student, teacher))
    return divergences(*both, mask, divergence, BETA)[0]


@pytest.fixture(scope="module")
def logits():
    rng = np.random.RandomState(0)
    return [rng.normal(0, 2, (ROWS, VOCAB)) for _ in range(2)]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("size", [3, VOCAB])
def test_value_and_gradient_are_those_of_a_plain_loop(logits, divergence, size):
    """Of the whole vocabulary it is the exact divergence; one place holds no token."""
    rng, step = np.random.RandomState(size), 1e-5
    ids = np.array([[*rng.permutation(VOCAB)[:size], -1] for _ in range(ROWS)], np.int32)
    student, teacher = logits

    def total(x):
        return apart(x, jnp.float32(teacher), ids, divergence).sum()

    values = apart(jnp.float32(student), jnp.float32(teacher), ids, divergence)
    gradient = jax.grad(total)(jnp.float32(student))
    for row in range(ROWS):
        others = teacher[row], set(ids[row].tolist()), divergence
        np.testing.assert_allclose(values[row], naive(student[row], *others), rtol=1e-5, atol=1e-6)
        for token in range(VOCAB):
            moved = step * np.eye(VOCAB)[token]
            expected = (naive(student[row] + moved, *others) - naive(student[row] - moved, *others)) / (2 * step)
            np.testing.assert_allclose(gradient[row, token], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_distributions_have_no_divergence_and_no_gradient(logits, divergence):
    """Not nearly none: zeros, also with tokens that are ruled out and with a rest that no float32 sum could hold."""
    student = jnp.float32(logits[0]).at[0, 3].set(-jnp.inf).at[1].add(-60).at[1, 3].set(0)
    ids = jnp.broadcast_to(jnp.array([3, 5, -1], jnp.int32), (ROWS, 3))
    found = apart(student, student, ids, divergence)
    gradient = jax.grad(lambda x: 0.3 * apart(x, student, ids, divergence).sum())(student)
    assert not found.any() and not gradient.any()


def test_a_small_rest_keeps_its_digits():
    logits = jnp.zeros((ROWS, VOCAB)).at[:, 3].set(60.0)
    rest = coarsened(jax.nn.log_softmax(logits), jnp.full((ROWS, 1), 3))[:, 1]
    np.testing.assert_allclose(rest, math.log(VOCAB - 1) - 60, rtol=1e-6)


@pytest.mark.parametrize("value", [math.nan, 0.5])
def test_what_is_outside_the_mask_does_not_count(value):
    nonsense = jnp.full((1, 2, 3), value).at[0, 0].set(jnp.log(jnp.array([0.5, 0.25, 0.25])))
    mask = jnp.array([[True, False]])
    gradient = jax.grad(lambda x: divergences(x, nonsense + 0.1, mask).sum())(nonsense)
    assert np.isfinite(gradient).all() and gradient[0, 0].any() and not gradient[0, 1].any()


def draw(params, config, sampling, key, prompts=None):
    prompts = prompts or [prompt for prompt, _ in problems(0)]
    return jaxengine.generate(params, prompts, sampling, key=jax.random.key(key), config=config, **ENGINE)


@pytest.fixture(scope="module")
def drawn():
    return draw(TINY[1], TINY[0], dataclasses.replace(SAMPLING, logprobs=3), 3)


def test_targets_are_what_the_teacher_reports(drawn):
    """By bits, ids and logprobs of the likeliest; the drawn tokens beside them where they are others."""
    rollout = Rollout.from_outputs(drawn, length=WIDTH)
    targets = likeliest(TINY[1], rollout, SAMPLING, config=TINY[0], top_k=3, also=rollout.tokens[..., None])
    samples = [(len(output.prompt_token_ids), sample) for output in drawn for sample in output.outputs]
    repeated = 0
    for row, (start, sample) in enumerate(samples):
        for i, reported in enumerate(sample.logprobs):
            ids, logprobs = targets.token_ids[row, start + i], targets.logprobs[row, start + i]
            by_rank = sorted(reported.items(), key=lambda item: item[1].rank)
            assert ids[:3].tolist() == [token for token, _ in by_rank[:3]]
            assert np.array_equal(logprobs[:3], np.float32([entry.logprob for _, entry in by_rank[:3]]))
            token = sample.token_ids[i]
            is_known = token in ids[:3]
            repeated += is_known
            assert ids[3] == (-1 if is_known else token)
            assert logprobs[3] == (-np.inf if is_known else rollout.logprobs[row, start + i])
            np.testing.assert_allclose(np.exp(np.float64(logprobs)).sum(), 1, rtol=1e-5)
    assert 0 < repeated < rollout.mask.sum()
    assert (targets.token_ids[~rollout.mask] == -1).all()


@pytest.fixture(scope="module")
def distiller() -> Trainer:
    """One trainer for all tests, compiled once."""
    objective = Objective(average="token", distillation_coefficient=1.0)
    return Trainer(TINY[0], optax.adam(1e-3), TrainerConfig(objective, SAMPLING, micro_batches=2))


def test_a_teacher_with_the_students_weights_teaches_nothing(drawn, distiller):
    """The bits of targets are those of the trainer's own forward pass."""
    rollout = Rollout.from_outputs(drawn, length=WIDTH)
    state = distiller.start(TINY[1], jax.random.key(0))
    none = np.full((*rollout.tokens.shape, 3), -1)
    targets = likeliest(distiller.policy(state), rollout, SAMPLING, config=TINY[0], top_k=3, also=none)
    _, (update,) = distiller.train(state, rollout, None, targets=targets)
    assert update["distillation"] == update["gradient_norm"] == 0
    assert update["measured_share"] == 1


def test_what_does_not_fit_is_refused(drawn, distiller):
    rollout = Rollout.from_outputs(drawn, length=WIDTH)
    with pytest.raises(ValueError, match="top_k must be within 1 … vocab_size=250, got 0"):
        likeliest(TINY[1], rollout, SAMPLING, config=TINY[0], top_k=0)
    with pytest.raises(ValueError, match="got 250 … 250"):
        likeliest(TINY[1], rollout, SAMPLING, config=TINY[0], top_k=3, also=np.full((*rollout.tokens.shape, 1), 250))
    with pytest.raises(ValueError, match="give sampling without top_k, top_p and min_p, got 5, 1.0 and 0.0"):
        TrainerConfig(Objective(distillation_coefficient=1.0), SamplingParams(top_k=5))
    targets = likeliest(TINY[1], rollout, SAMPLING, config=TINY[0], top_k=3)
    state = distiller.start(TINY[1], jax.random.key(0))
    with pytest.raises(ValueError, match="distillation_coefficient=1.0 of the objective asks for targets"):
        distiller.batch(state, rollout, None)
    short = dataclasses.replace(targets, logprobs=targets.logprobs[..., :-1])
    with pytest.raises(ValueError, match="the rest's"):
        distiller.batch(state, rollout, None, targets=short)
    plain = Trainer(TINY[0], optax.adam(1e-4), TrainerConfig(Objective(), SAMPLING))
    with pytest.raises(ValueError, match="asks for no targets"):
        plain.batch(state, rollout, np.zeros(len(rollout.tokens)), targets=targets)
    with pytest.raises(ValueError, match="rewards may be None"):
        plain.batch(state, rollout, None)


def test_a_student_learns_back_what_noise_took_from_it(distiller):
    """By distillation alone: the teacher with noise on its weights, and the teacher."""
    (config, teacher), keys = TINY, iter(jax.random.split(jax.random.key(5), 50))

    def noised(x):
        return x + (0.5 * jnp.std(x) * jax.random.normal(next(keys), x.shape)).astype(x.dtype)

    state, found = distiller.start(jax.tree.map(noised, teacher), jax.random.key(0)), []
    for iteration in range(20):
        student = distiller.policy(state)
        rollout = Rollout.from_outputs(draw(student, config, SAMPLING, iteration), length=WIDTH)
        own = likeliest(student, rollout, SAMPLING, config=config, top_k=3)
        targets = likeliest(teacher, rollout, SAMPLING, config=config, top_k=3, also=own.token_ids)
        state, (update,) = distiller.train(state, rollout, None, targets=targets)
        found.append(update["distillation"])
    assert np.mean(found[-3:]) < 0.7 * np.mean(found[:2]), found
