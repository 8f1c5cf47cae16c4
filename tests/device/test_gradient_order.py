"""Gradients are sums in a fixed order: no program that computes them adds to one place from several threads."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import FAMILIES, SIZES

from jaxengine.config import ModelConfig
from jaxengine.device.embedding import add_rows
from jaxengine.models.params import abstract
from jaxengine.ops.kernels import XLA, Kernels, kernels_of
from jaxengine.rl.integrations.tunix_policy import TunixPolicy
from jaxengine.rl.objective import ALGORITHMS
from jaxengine.rl.rollout import Rollout
from jaxengine.rl.train_state import TrainerConfig
from jaxengine.rl.trainer import Trainer
from jaxengine.sampling_params import SamplingParams
from pallas_kernels import implementations

CONFIG = ModelConfig(
    **SIZES
    | FAMILIES["Qwen3"]
    | dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    | dict(max_position_embeddings=512, dtype="bfloat16")
)
CUT = SamplingParams(temperature=0.7, top_p=0.9, top_k=20, logit_bias={3: 1.0}, min_tokens=2, repetition_penalty=1.1)


@pytest.fixture(params=["xla", "pallas_gpu"])
def kernels(request) -> Kernels:
    gpu = functools.partial(implementations.choose, "pallas_gpu", "NVIDIA H100 80GB HBM3")
    return XLA if request.param == "xla" else kernels_of(gpu())


def equations(jaxpr: Any) -> Iterator[Any]:
    """All of a program's, those of its loops and branches included."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for part in jax.tree.leaves(tuple(equation.params.values()), is_leaf=is_program):
            if is_program(part):
                yield from equations(part)


def is_program(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def repeated_scatters(function: Any, *args: Any) -> list[str]:
    """The scatters of floats that may meet one place twice."""
    found = []
    for equation in equations(jax.make_jaxpr(function)(*args)):
        if equation.primitive.name.startswith("scatter") and not equation.params["unique_indices"]:
            operand = equation.invars[0].aval
            if jnp.issubdtype(operand.dtype, jnp.floating):
                found.append(f"{equation.primitive.name} {operand.str_short()}")
    return found


def test_the_search_sees_a_repeated_scatter():
    """A test of these tests, through a loop and a jit."""

    def gradient(x):
        step = lambda i, total: total + jax.jit(jax.grad(lambda y: y[jnp.array([0, 1, 0]) + i].sum()))(x)
        return jax.lax.fori_loop(0, 2, step, x)

    assert repeated_scatters(gradient, jnp.ones(5)) == ["scatter-add float32[5]"]


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_an_update_repeats_no_place(kernels, algorithm):
    """The trainer's whole update, with everything that sampling parameters can ask for."""
    trainer = Trainer(CONFIG, optax.adamw(1e-3), TrainerConfig(ALGORITHMS[algorithm], CUT, micro_batches=2))
    trainer.kernels = kernels
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract(CONFIG))
    state, mask = trainer.start(params, jax.random.key(0)), np.ones((4, 70), bool)
    mask[:, :5] = False
    zeros, group = np.zeros(mask.shape, np.float32), np.array([0, 0, 1, 1])
    rollout = Rollout(zeros.astype(np.int32), mask, zeros, mask.sum(1), group, zeros.astype(np.int32))
    shapes = jax.eval_shape(lambda state: trainer.batch(state, rollout, np.arange(4.0)), state)
    assert repeated_scatters(trainer._update, state, shapes) == []


def test_a_loss_on_logits_repeats_no_place(kernels):
    """Of the nnx policy, and of the one that moves padding to the end."""

    def loss(params, tokens, mask):
        policy = TunixPolicy(CONFIG, params)
        policy.kernels = kernels
        return policy(tokens, None, None, mask)[0][..., 0].sum()

    tokens, mask = jax.ShapeDtypeStruct((3, 40), jnp.int32), jax.ShapeDtypeStruct((3, 40, 40), bool)
    assert repeated_scatters(jax.grad(loss), abstract(CONFIG), tokens, mask) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kinds", [1, 3, 40])
def test_rows_are_added_one_after_another(dtype, kinds):
    """By bits the sums of a plain loop; ids that are all equal, frequent, and mostly their own."""
    rng = np.random.default_rng(kinds)
    ids, rows = rng.integers(0, kinds, 32), jnp.asarray(rng.normal(size=(32, 5)), dtype)
    rows = rows.at[7].set(0)
    total = rng.normal(size=(40, 5)).astype(np.float32)
    found = jax.jit(add_rows)(jnp.asarray(total), jnp.asarray(ids), rows)
    sums: dict[int, np.ndarray] = {}
    for index, row in reversed(list(zip(ids.tolist(), np.asarray(rows), strict=True))):
        sums[index] = sums[index] + row if index in sums else row
    for index, row in sums.items():
        total[index] += row.astype(np.float32)
    assert np.asarray(found).tobytes() == total.tobytes()
