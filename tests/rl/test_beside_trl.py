"""Every preset beside TRL's own loss: value and gradient. What differs on purpose is in jaxengine/rl/README.md.

Needs torch and trl 1.16, as .ci/run installs them for the marker `wire`. TRL's trainers are called on what their losses
read, and no model: its logprobs are the random ones that ours get.
"""

import collections
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.rl.advantages import leave_one_out, of_samples
from jaxengine.rl.losses import correction_weights, policy_loss
from jaxengine.rl.objective import ALGORITHMS, Objective
from jaxengine.rl.rewards import overlong_penalty

pytestmark = [pytest.mark.wire, pytest.mark.filterwarnings("default")]  # TRL's own
BUDGET = 9
GRPO = dict(loss_type="grpo", importance_sampling_level="token", beta=0.0, epsilon_low=0.2, epsilon_high=0.2)
KL = dict(kl="k3", kl_coefficient=0.04)
# (ours, what TRL is told where it is not GRPO's)
CASES = {
    "grpo": (ALGORITHMS["grpo"], {}),
    "grpo with k3": (Objective(**KL), dict(beta=0.04, bias=False)),
    "grpo with ρ·k3": (Objective(**KL, kl_ratio=True), dict(beta=0.04, bias=True)),
    "grpo with a dual clip": (Objective(dual_clip=1.3), dict(delta=1.3)),
    "grpo with entropy": (Objective(entropy_coefficient=0.1), dict(entropy=0.1)),
    "dr_grpo": (dataclasses.replace(ALGORITHMS["dr_grpo"], budget=BUDGET), dict(loss_type="dr_grpo")),
    "dapo": (ALGORITHMS["dapo"], dict(loss_type="dapo", epsilon_high=0.28)),
    "gspo": (ALGORITHMS["gspo"], dict(importance_sampling_level="sequence", epsilon_low=3e-4, epsilon_high=4e-4)),
    "cispo": (ALGORITHMS["cispo"], dict(loss_type="cispo", epsilon_high=5.0)),
    "cispo that clips": (
        Objective(surrogate="weight", clip_low=1.0, clip_high=0.1, average="token"),
        dict(loss_type="cispo", epsilon_high=1.1),
    ),
    "truncated, of tokens": (Objective(correction="truncated", correction_high=1.2), dict(corrected=True)),
    "masked, of sequences": (
        Objective(correction="masked", correction_of="sequence", correction_low=0.5, correction_high=1.6),
        dict(corrected=True),
    ),
}


class Drawn:
    """Completions of 1 to 9 tokens, TRL's padding at the right."""

    def __init__(self, seed: int) -> None:
        rng = np.random.RandomState(seed)
        self.mask = np.arange(9) < rng.randint(1, 10, 8)[:, None]
        normal = lambda scale: rng.normal(0, scale, self.mask.shape).astype(np.float32)
        self.old = normal(1) - 2
        self.new, self.reference, self.drawn = (self.old + normal(0.3) for _ in range(3))
        self.entropies, self.advantages = np.abs(normal(1)), rng.normal(size=8).astype(np.float32)


def of_trl(drawn: Drawn, told: dict, corrections: np.ndarray | None) -> tuple[float, np.ndarray]:
    """(loss, its gradient in the logprobs) of TRL's GRPOTrainer."""
    torch, trl = pytest.importorskip("torch"), pytest.importorskip("trl")
    told = GRPO | told
    new = torch.tensor(drawn.new, requires_grad=True)
    inputs = {name: torch.zeros(8, 1) for name in ("prompt_ids", "prompt_mask")}
    inputs |= dict(completion_ids=torch.zeros(8, 9), completion_mask=torch.tensor(drawn.mask).float())
    inputs |= dict(advantages=torch.tensor(drawn.advantages), old_per_token_logps=torch.tensor(drawn.old))
    inputs |= dict(ref_per_token_logps=torch.tensor(drawn.reference), num_items_in_batch=torch.tensor(drawn.mask.sum()))
    if corrections is not None:
        inputs["importance_sampling_ratio"] = torch.tensor(np.array(corrections))
    identity = lambda x, **_: x
    trainer = types.SimpleNamespace(
        **{name: told[name] for name in GRPO},
        args=types.SimpleNamespace(use_bias_correction_kl=told.get("bias", False), delta=told.get("delta")),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=corrections is not None,
        vllm_importance_sampling_correction=corrections is not None,
        model=types.SimpleNamespace(training=False),
        accelerator=types.SimpleNamespace(num_processes=1, reduce=identity, gather=identity),
        current_gradient_accumulation_steps=1,
        max_completion_length=BUDGET,
        use_adaptive_entropy=False,
        entropy_coef=told.get("entropy", 0.0),
        _entropy_bonus_enabled="entropy" in told,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.tensor(drawn.entropies), None),
    )
    loss = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return float(loss.detach()), new.grad.numpy()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name, seed):
    drawn, (objective, told) = Drawn(seed), CASES[name]
    corrections = np.asarray(correction_weights(drawn.old, drawn.drawn, drawn.mask, objective))
    corrections = corrections if objective.correction else None

    def loss(new):
        how = dict(reference=drawn.reference, corrections=corrections)
        found = policy_loss(new, drawn.old, drawn.mask, drawn.advantages, objective, **how)
        return found - objective.entropy_coefficient * drawn.entropies[drawn.mask].mean()

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(drawn.new))
    expected, slopes = of_trl(drawn, {key: x for key, x in told.items() if key != "corrected"}, corrections)
    assert float(value) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_samples_that_were_cut_off(name):
    """TRL's mask_truncated_completions takes their tokens out of the mask, as mask_truncated does. Its means over
    samples still count them, where ours are over those that are left.
    """
    drawn, (objective, told), kept = Drawn(0), CASES[name], np.arange(8) % 3 != 0
    drawn.mask &= kept[:, None]
    loss = lambda new: policy_loss(new, drawn.old, drawn.mask, drawn.advantages, objective)
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(drawn.new))
    expected, slopes = of_trl(drawn, told, None)
    share = 1.0 if objective.average == "token" else kept.mean()
    assert share * float(value) == pytest.approx(expected, rel=1e-5, abs=1e-6) and not gradient[~kept].any()
    np.testing.assert_allclose(share * gradient, slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_overlong_penalty(seed):
    rewards = pytest.importorskip("trl.rewards")
    lengths = np.random.RandomState(seed).randint(1, 60, 50).tolist()
    expected = rewards.get_soft_overlong_punishment(40, 16)([[7] * length for length in lengths])
    ours = overlong_penalty(max_tokens=40, cache=16)
    assert [ours("", "", None, num_tokens=length) for length in lengths] == expected


@pytest.mark.parametrize("of", ["token", "sequence"])
@pytest.mark.parametrize("correction", ["truncated", "masked"])
def test_corrections(correction, of):
    """TRL's lines, as its generation has them between other things."""
    torch, drawn = pytest.importorskip("torch"), Drawn(0)
    objective = Objective(correction=correction, correction_of=of, correction_low=0.5, correction_high=1.5)
    differences = torch.tensor((drawn.old - drawn.drawn) * drawn.mask)
    ratio = torch.exp(differences.sum(-1, keepdim=True).expand(8, 9) if of == "sequence" else differences)
    if correction == "truncated":
        ratio = torch.clamp(ratio, 0.5, 1.5)
    else:
        ratio = ratio.masked_fill((ratio < 0.5) | (ratio > 1.5), 0.0)
    found = correction_weights(drawn.old, drawn.drawn, drawn.mask, objective)
    np.testing.assert_allclose(found, ratio.numpy(), rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_rloo(seed):
    torch, trl = pytest.importorskip("torch"), pytest.importorskip("trl")
    drawn = Drawn(seed)
    advantages = leave_one_out(jnp.asarray(drawn.advantages), np.repeat([0, 1], 4))
    new = torch.tensor(drawn.new, requires_grad=True)
    inputs = {name: torch.zeros(8, 1) for name in ("prompt_ids", "prompt_mask")}
    inputs |= dict(completion_ids=torch.zeros(8, 9), completion_mask=torch.tensor(drawn.mask).float())
    inputs |= dict(
        advantages=torch.tensor(np.array(advantages)), old_logps=torch.tensor((drawn.old * drawn.mask).sum(-1))
    )
    identity = lambda x, **_: x
    trainer = types.SimpleNamespace(
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.2,
        model=types.SimpleNamespace(training=False),
        accelerator=types.SimpleNamespace(reduce=identity, gather=identity),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.tensor(drawn.entropies), None),
    )
    expected = trl.RLOOTrainer._compute_loss(trainer, None, inputs)
    expected.backward()
    loss = lambda new: policy_loss(new, drawn.old, drawn.mask, advantages, ALGORITHMS["rloo"])
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(drawn.new))
    assert float(value) == pytest.approx(float(expected.detach()), rel=1e-5)
    np.testing.assert_allclose(gradient, new.grad.numpy(), rtol=1e-4, atol=1e-6)


def test_advantages():
    """TRL divides by the deviation of a sample plus 1e-4; ours adds 1e-6."""
    torch = pytest.importorskip("torch")
    rewards = np.random.RandomState(0).normal(size=12).astype(np.float32)
    of_group = torch.tensor(rewards).view(3, 4)
    expected = (of_group - of_group.mean(1, keepdim=True)) / (of_group.std(1, keepdim=True) + 1e-4)
    found = of_samples(jnp.asarray(rewards), np.repeat([0, 1, 2], 4), "scaled", "sample")
    np.testing.assert_allclose(found, expected.reshape(-1), rtol=5e-4)
