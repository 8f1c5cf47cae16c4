"""Losses against loops over tokens in float64, written from the papers' formulas, and by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_advantages import bits, ragged

from jaxengine.rl.losses import correction_weights, kl_penalty, policy_loss, ratios, token_weights, value_loss
from jaxengine.rl.metrics import explained_variance, mismatch
from jaxengine.rl.objective import ALGORITHMS, Objective

BUDGET = 20
PRESETS = ALGORITHMS | {"dr_grpo": dataclasses.replace(ALGORITHMS["dr_grpo"], budget=BUDGET)}  # as a Trainer has it
CASES = PRESETS | {
    "cispo that clips": Objective(surrogate="weight", clip_low=0.1, clip_high=0.2, average="token"),
    "a dual clip": Objective(dual_clip=1.25),
    "grpo with ρ·k3": Objective(kl="k3", kl_coefficient=0.04, kl_ratio=True),
    "grpo with k2": Objective(kl="k2", kl_coefficient=0.04),
    "grpo with k3": Objective(kl="k3", kl_coefficient=0.04),
    "gspo that clips": Objective(ratio="sequence", clip_low=0.05, clip_high=0.06),
}


class Drawn:
    """Random logprobs on a ragged mask; NaN outside the mask."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.RandomState(seed)
        self.mask = ragged(rng)

        def draw(scale: float) -> np.ndarray:
            return np.where(self.mask, rng.normal(0, scale, self.mask.shape), np.nan).astype(np.float32)

        self.old = draw(1) - 2
        self.new, self.reference = self.old + draw(0.3), self.old + draw(0.3)
        self.advantages = rng.normal(size=self.mask.shape[0]).astype(np.float32)
        self.token_advantages = draw(1)


def naive(objective: Objective, drawn: Drawn, advantages: np.ndarray, held: np.ndarray | None = None) -> float:
    """−(1/G) Σ_i … Σ_t min(ρ A, clip(ρ) A) − β KL, a token at a time; `held` are CISPO's ratios, of no gradient."""
    samples = [i for i in range(drawn.mask.shape[0]) if drawn.mask[i].any()]
    total, all_tokens = 0.0, int(drawn.mask.sum())
    for i in samples:
        tokens = np.flatnonzero(drawn.mask[i])
        logs = {t: float(drawn.new[i, t]) - float(drawn.old[i, t]) for t in tokens}
        mean = sum(logs.values()) / len(tokens)
        share = {
            "token": 1 / all_tokens,
            "sequence": 1 / len(tokens) / len(samples),
            "constant": 1 / (objective.budget or math.nan) / len(samples),
        }[objective.average]
        for t in tokens:
            advantage = float(advantages[i] if advantages.ndim == 1 else advantages[i, t])
            log_rho = {"token": logs[t], "sequence": mean, "trajectory": sum(logs.values())}[objective.ratio]
            rho = math.exp(log_rho)
            within = lambda rho: min(max(rho, 1 - objective.clip_low), 1 + objective.clip_high)
            gained = min(rho * advantage, within(rho) * advantage)
            if objective.dual_clip is not None and advantage < 0:
                gained = max(gained, objective.dual_clip * advantage)
            if objective.surrogate == "weight":
                gained = within(rho if held is None else held[i, t]) * advantage * float(drawn.new[i, t])
            log_r = float(drawn.reference[i, t]) - float(drawn.new[i, t])
            kl = {"k1": -log_r, "k2": log_r**2 / 2, "k3": math.exp(log_r) - 1 - log_r}[objective.kl]
            if objective.kl_ratio:
                kl *= math.exp(logs[t])
            coefficient = objective.kl_coefficient if objective.kl_in == "loss" else 0.0
            total += share * (-gained + coefficient * kl)
    return total


@pytest.mark.parametrize("shape", ["a sample", "a token"])
@pytest.mark.parametrize("name", CASES)
def test_against_a_loop_over_tokens(name, shape):
    drawn, objective = Drawn(), CASES[name]
    advantages = drawn.advantages if shape == "a sample" else drawn.token_advantages
    actual = jax.jit(
        lambda new: policy_loss(new, drawn.old, drawn.mask, advantages, objective, reference=drawn.reference)
    )(drawn.new)
    np.testing.assert_allclose(actual, naive(objective, drawn, advantages), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradient_against_differences_of_the_loop(name):
    """Central differences in float64. With one advantage for a sample, GSPO's token form has GSPO's gradient."""
    drawn, objective = Drawn(1), CASES[name]
    loss = lambda new: policy_loss(new, drawn.old, drawn.mask, drawn.advantages, objective, reference=drawn.reference)
    actual = np.asarray(jax.grad(loss)(drawn.new))
    assert (actual[~drawn.mask] == 0).all() and np.isfinite(actual).all()
    held = np.exp(drawn.new.astype(np.float64) - drawn.old)
    step = 2.0**-12  # exact when added to float32 numbers of this size
    for i, t in zip(*np.nonzero(drawn.mask), strict=True):
        ends = []
        for sign in (1, -1):
            moved = Drawn(1)
            moved.new = moved.new.astype(np.float64)
            moved.new[i, t] += sign * step
            ends.append(naive(objective, moved, drawn.advantages, held))
        assert actual[i, t] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-3, abs=1e-6), (i, t)


def test_averages_by_hand():
    """Two samples of 1 and 3 tokens, advantages 1 and -1, ratio 1."""
    mask = np.array([[False, True, False, False], [False, True, True, True]])
    old, advantages = np.zeros((2, 4), np.float32), np.array([1.0, -1.0], np.float32)
    loss = lambda **how: float(policy_loss(old, old, mask, advantages, Objective(**how)))
    assert loss(average="sequence") == pytest.approx(-(1 - 1) / 2, abs=1e-7)
    assert loss(average="token") == pytest.approx(-(1 - 3) / 4)
    assert loss(average="constant", budget=8) == pytest.approx(-(1 - 3) / 8 / 2)
    with pytest.raises(ValueError, match="give budget, the most of a completion"):
        loss(average="constant")


def test_padding_changes_no_loss():
    """Of Dr. GRPO neither, whose divisor is the budget and not the width of the batch."""
    drawn = Drawn()
    wide = [np.pad(x, ((0, 0), (0, 12))) for x in (drawn.new, drawn.old, drawn.mask)]
    for name, objective in PRESETS.items():
        losses = [
            float(policy_loss(*given, drawn.advantages, objective))
            for given in (wide, [drawn.new, drawn.old, drawn.mask])
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6), name


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "rloo"])
def test_at_ratio_one_the_gradient_is_the_policy_gradient(name):
    """Exactly −weight · A at each token: nothing is clipped, and no gradient is halved between equal arguments."""
    drawn, objective = Drawn(), PRESETS[name]
    gradient = jax.jit(jax.grad(lambda new: policy_loss(new, drawn.old, drawn.mask, drawn.advantages, objective)))(
        drawn.old
    )
    weights = np.asarray(token_weights(drawn.mask, objective))
    expected = -weights * np.where(drawn.mask, drawn.advantages[:, None], 0)
    assert (bits(np.abs(gradient)) == bits(np.abs(expected))).all() and (np.sign(gradient) == np.sign(expected)).all()


def test_at_ratio_one_rloo_is_reinforce():
    """−A / samples at each token, whatever the sample's length: a completion is one action."""
    drawn = Drawn()
    loss = lambda new: policy_loss(new, drawn.old, drawn.mask, drawn.advantages, PRESETS["rloo"])
    expected = -np.where(drawn.mask, drawn.advantages[:, None], 0) / drawn.mask.any(-1).sum()
    np.testing.assert_allclose(jax.grad(loss)(drawn.old), expected, rtol=1e-6)


def test_corrections_by_hand():
    """Of tokens and of sequences, truncated and masked; of equal logprobs exactly 1."""
    mask = np.array([[True, True, False], [True, True, True]])
    drawn = np.zeros((2, 3), np.float32)
    start = np.log(np.array([[2.0, 4.0, 9.0], [0.5, 0.25, 1.0]], np.float32))
    how = dict(correction_low=0.4, correction_high=3.0)

    def weights(**others):
        return np.asarray(correction_weights(start, drawn, mask, Objective(**how, **others)))[mask]

    np.testing.assert_allclose(weights(correction="truncated"), [2, 3, 0.5, 0.4, 1], rtol=1e-6)
    np.testing.assert_allclose(weights(correction="masked"), [2, 0, 0.5, 0, 1], rtol=1e-6)
    of_sequences = dict(correction_of="sequence")
    np.testing.assert_allclose(weights(correction="truncated", **of_sequences), [3, 3, 0.4, 0.4, 0.4], rtol=1e-6)
    assert (weights(correction="masked", **of_sequences) == 0).all()
    for correction in ("truncated", "masked"):
        same = correction_weights(start, start, mask, Objective(correction=correction, **of_sequences))
        assert (bits(same) == bits(np.ones(1))).all()


def test_corrections_weigh_the_gained_and_not_the_penalty():
    drawn, objective = Drawn(), Objective(kl="k2", kl_coefficient=0.1)
    loss = lambda **how: float(
        policy_loss(drawn.new, drawn.old, drawn.mask, drawn.advantages, objective, reference=drawn.reference, **how)
    )
    nothing = loss(corrections=np.zeros(drawn.mask.shape, np.float32))
    penalty = (token_weights(drawn.mask, objective) * kl_penalty(drawn.new, drawn.reference, drawn.mask, "k2")).sum()
    assert nothing == pytest.approx(0.1 * float(penalty), rel=1e-5)
    assert loss(corrections=np.ones(drawn.mask.shape, np.float32)) == pytest.approx(loss(), rel=1e-6)


@pytest.mark.parametrize("ratio", ["token", "sequence", "trajectory"])
def test_the_ratio_is_exactly_one_where_nothing_changed(ratio):
    logprobs = np.concatenate([-np.geomspace(1e-38, 80, 997), [0.0, -0.0, -1 / 3]]).astype(np.float32).reshape(10, 100)
    actual = jax.jit(lambda x, y: ratios(x, y, np.ones(x.shape, bool), Objective(ratio=ratio)))(logprobs, logprobs)
    assert (bits(actual) == bits(np.ones(1))).all()


@pytest.mark.parametrize(
    "rho, advantage, moves",
    [
        (1.25, 1.0, True),
        (1.2500002, 1.0, False),
        (3.0, 1.0, False),
        (0.1, 1.0, True),
        (0.75, -1.0, True),
        (0.7499999, -1.0, False),
        (0.1, -1.0, False),
        (3.0, -1.0, True),
        (3.0, 0.0, False),
    ],
)
def test_the_edges_of_the_clip(rho, advantage, moves):
    """There is a gradient at the edge, none beyond it in the direction of the advantage, and one on the other side."""
    objective, mask = Objective(clip_low=0.25, clip_high=0.25), np.ones((1, 1), bool)
    new = np.log(np.array([[rho]], np.float64)).astype(np.float32)
    if rho in (1.25, 0.75):  # the nearest float32 whose ratio is not beyond the edge
        while not 0.75 <= float(ratios(new, 0 * new, mask, objective)[0, 0]) <= 1.25:
            new = np.nextafter(new, np.float32(0))
    advantages = np.array([advantage], np.float32)
    gradient = jax.grad(lambda x: policy_loss(x, jnp.zeros((1, 1)), mask, advantages, objective))(new)
    assert bool(gradient[0, 0] != 0) == moves
    if moves:
        np.testing.assert_allclose(gradient, -advantage * np.exp(new), rtol=1e-5)


def test_a_token_that_the_new_policy_has_cut():
    """top-k and the like may cut a token that was drawn: its ratio is 0, and nothing is NaN."""
    mask, old = np.ones((1, 2), bool), np.full((1, 2), -1.0, np.float32)
    new = np.array([[-np.inf, -1.0]], np.float32)
    for name, objective in PRESETS.items():
        loss_and_gradient = jax.value_and_grad(policy_loss)
        value, gradient = loss_and_gradient(new, old, mask, np.ones(1, np.float32), objective)
        assert np.isfinite(value) and np.isfinite(gradient).all() and gradient[0, 0] == 0, name
    assert ratios(new, old, mask, Objective())[0, 0] == 0.0


def test_parts_add_up_to_the_batch():
    drawn = Drawn(3)
    for name, objective in PRESETS.items():
        weights = token_weights(drawn.mask, objective)
        losses = []
        for rows in (slice(None), slice(0, 2), slice(2, 4), slice(4, 6)):
            batch = drawn.new[rows], drawn.old[rows], drawn.mask[rows], drawn.advantages[rows]
            losses.append(float(policy_loss(*batch, objective, weights=weights[rows])))
        whole, *parts = losses
        assert sum(parts) == pytest.approx(whole, rel=1e-5, abs=1e-7), name


# -- KL ----------------------------------------------------------------------------------------------------------------


def test_kl_is_exactly_zero_between_equals():
    x = -np.geomspace(1e-30, 80, 64).astype(np.float32).reshape(8, 8)
    for estimator in ("k1", "k2", "k3"):
        assert (bits(np.abs(kl_penalty(x, x, np.ones(x.shape, bool), estimator))) == 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_at_tokens_that_a_policy_has_cut(estimator):
    """A token that either policy has cut counts nothing, and the tokens beside it count as before."""
    new, reference = jnp.array([[-jnp.inf, -1.0, -jnp.inf, -2.0]]), jnp.array([[-1.0, -jnp.inf, -jnp.inf, -1.5]])
    mask = np.ones((1, 4), bool)
    actual = kl_penalty(new, reference, mask, estimator)
    gradient = jax.grad(lambda x: kl_penalty(x, reference, mask, estimator).sum())(new)
    assert (bits(np.abs(actual[:, :3])) == 0).all() and (bits(np.abs(gradient[:, :3])) == 0).all()
    alone = kl_penalty(new[:, 3:], reference[:, 3:], mask[:, 3:], estimator)
    assert (bits(actual[:, 3:]) == bits(alone)).all()
    assert actual[0, 3] != 0 and np.isfinite(gradient).all()


def test_kl_estimators_mean_the_kl():
    """Over a whole distribution: k1 and k3 average to the KL, and k2's gradient to the KL's gradient."""
    logits, target = jax.random.normal(jax.random.key(0), (2, 9))
    mask = np.ones(9, bool)

    def kl(logits):
        return (jax.nn.softmax(logits) * (jax.nn.log_softmax(logits) - jax.nn.log_softmax(target))).sum()

    def averaged(logits, estimator):
        logprobs = jax.nn.log_softmax(logits)
        drawn = jax.lax.stop_gradient(jnp.exp(logprobs))
        return (drawn * kl_penalty(logprobs, jax.nn.log_softmax(target), mask, estimator)).sum()

    for estimator in ("k1", "k3"):
        np.testing.assert_allclose(averaged(logits, estimator), kl(logits), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(averaged)(logits, "k2"), jax.grad(kl)(logits), rtol=1e-4, atol=1e-6)


def test_a_penalty_needs_a_reference():
    drawn = Drawn()
    with pytest.raises(ValueError, match="kl_coefficient=0.1 asks for a penalty, but no logprobs of a reference"):
        policy_loss(drawn.new, drawn.old, drawn.mask, drawn.advantages, Objective(kl_coefficient=0.1))


@pytest.mark.parametrize(
    "how, error",
    [
        ({"average": "mean"}, "average must be one of sequence, token, constant, got 'mean'"),
        ({"advantage": "gae"}, "advantage must be one of scaled, centred, leave-one-out, generalized, got 'gae'"),
        ({"clip_low": 1.5}, "clip_low must be within 0 … 1"),
        ({"clip_high": math.nan}, "clip_high at least 0, got 0.2 and nan"),
        ({"kl_coefficient": -1.0}, "kl_coefficient must be at least 0, got -1.0"),
        ({"budget": 0}, "budget must be at least 1 token, got 0"),
        ({"kl": "k1", "kl_coefficient": 0.1}, "kl='k1' has an expected gradient of 0 in the loss"),
        ({"dual_clip": 1.1}, "dual_clip must be more than 1 [+] clip_high=1.2, got 1.1"),
        ({"correction": "clipped"}, "correction must be one of None, truncated, masked, got 'clipped'"),
        ({"correction_high": 0.5}, "correction_high at least 1, got 0.0 and 0.5"),
        ({"entropy_coefficient": -0.1}, "entropy_coefficient must be at least 0"),
    ],
)
def test_wrong_objectives_are_refused(how, error):
    with pytest.raises(ValueError, match=error):
        Objective(**how)
    with pytest.raises(TypeError, match="did you mean 'clip_high'"):
        Objective(cliphigh=0.3)


# -- values and metrics ------------------------------------------------------------------------------------------------


def test_value_loss_against_a_loop():
    drawn, clip, total = Drawn(4), 0.2, 0.0
    returns = drawn.reference
    for i, t in zip(*np.nonzero(drawn.mask), strict=True):
        v, old, target = (float(x[i, t]) for x in (drawn.new, drawn.old, returns))
        clipped = min(max(v, old - clip), old + clip)
        total += 0.5 * max((v - target) ** 2, (clipped - target) ** 2) / drawn.mask.sum()
    value, gradient = jax.value_and_grad(lambda v: value_loss(v, drawn.old, returns, drawn.mask, clip=clip))(drawn.new)
    assert float(value) == pytest.approx(total, rel=1e-5)
    assert (np.asarray(gradient)[~drawn.mask] == 0).all() and np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "value, target, expected", [(0.1, 1.0, -0.9), (0.5, 1.0, 0.0), (0.5, -1.0, 1.5), (0.5, 0.35, 0.15)]
)
def test_value_gradient_by_hand(value, target, expected):
    """The old value is 0, the clip 0.2. A value that moved further towards the target has no gradient; one that moved
    away from the target, or beyond it, has one.
    """
    value, old, returns = np.array([value, 0, target], np.float32).reshape(3, 1, 1)
    actual = jax.grad(value_loss)(value, old, returns, np.ones((1, 1), bool))
    assert float(actual[0, 0]) == pytest.approx(expected, abs=1e-6)


def test_metrics_against_a_loop():
    drawn, objective = Drawn(5), Objective(clip_low=0.2, clip_high=0.3)
    metrics = mismatch(drawn.new, drawn.old, drawn.mask, drawn.advantages, objective)
    actual = {name: float(x) for name, x in metrics.items()}
    deltas, low, high = [], [], []
    for i, t in zip(*np.nonzero(drawn.mask), strict=True):
        deltas.append(float(drawn.new[i, t]) - float(drawn.old[i, t]))
        rho = math.exp(deltas[-1])
        high.append(drawn.advantages[i] > 0 and rho > 1.3)
        low.append(drawn.advantages[i] < 0 and rho < 0.8)
    rho = np.exp(deltas)
    expected = {
        "ratio_mean": rho.mean(),
        "ratio_max": rho.max(),
        "clip_low": np.mean(low),
        "clip_high": np.mean(high),
        "clip_rate": np.mean(low) + np.mean(high),
        "kl": np.mean(rho - 1 - deltas),
        "max_delta": np.abs(deltas).max(),
    }
    assert actual == pytest.approx(expected, rel=1e-4) and actual["clip_low"] > 0 and actual["clip_high"] > 0


def test_ratios_of_sequences_count_once_a_sequence():
    mask = np.array([[True] * 6, [True] + [False] * 5, [False] * 6])
    new = np.where(mask, np.array([[0.0], [np.log(2.0)], [np.nan]]), np.nan).astype(np.float32)
    found = mismatch(new, np.zeros_like(new), mask, np.ones(3, np.float32), Objective(ratio="sequence"))
    assert float(found["clip_high"]) == 0.5 and float(found["ratio_mean"]) == pytest.approx(1.5)


def test_metrics_of_no_token():
    nothing = mismatch(*np.zeros((2, 2, 3), np.float32), np.zeros((2, 3), bool), np.zeros(2, np.float32), Objective())
    assert {name for name, x in nothing.items() if float(x) != 0} == {"ratio_mean", "ratio_max"}
    assert float(nothing["ratio_mean"]) == float(nothing["ratio_max"]) == 1


@pytest.mark.parametrize("name", ALGORITHMS)
def test_metrics_of_an_unchanged_policy(name):
    drawn = Drawn()
    actual = mismatch(drawn.old, drawn.old, drawn.mask, drawn.token_advantages, ALGORITHMS[name])
    assert {name: float(x) for name, x in actual.items()} == {
        "ratio_mean": 1,
        "ratio_max": 1,
        "clip_low": 0,
        "clip_high": 0,
        "clip_rate": 0,
        "kl": 0,
        "max_delta": 0,
    }


def test_explained_variance():
    drawn = Drawn()
    assert float(explained_variance(drawn.old, drawn.old, drawn.mask)) == 1.0
    mean = np.where(drawn.mask, drawn.old[drawn.mask].mean(), np.nan).astype(np.float32)
    assert float(explained_variance(mean, drawn.old, drawn.mask)) == pytest.approx(0, abs=1e-5)


def test_presets_are_what_they_are_named_after():
    assert {name: dataclasses.astuple(o)[:5] for name, o in ALGORITHMS.items()} == {
        "grpo": ("scaled", "token", 0.2, 0.2, "sequence"),
        "dr_grpo": ("centred", "token", 0.2, 0.2, "constant"),
        "dapo": ("scaled", "token", 0.2, 0.28, "token"),
        "gspo": ("scaled", "sequence", 3e-4, 4e-4, "sequence"),
        "rloo": ("leave-one-out", "trajectory", 0.2, 0.2, "sequence"),
        "cispo": ("scaled", "token", 1.0, 4.0, "token"),
        "ppo": ("generalized", "token", 0.2, 0.2, "token"),
    }
