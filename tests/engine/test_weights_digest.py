"""The digest of weights, and what stands beside it in a contract.

The same for the same bits, another for any others, and so are the checksums that stand in on an accelerator.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_model

from jaxengine.config import OF_EXPERTS
from jaxengine.device import checksums
from jaxengine.engine import contract_digest
from jaxengine.ops.kernels import XLA

SHAPES = [
    ((300, 7), jnp.bfloat16),
    ((2, 33, 64), jnp.float32),
    ((129,), jnp.float32),
    ((64, 96), jnp.float16),
    ((8, 32), jnp.int8),
]


def changed(x: np.ndarray):
    """(what was done, the array after it)"""
    bits = x.view(f"u{x.itemsize}")
    for place in (0, x.size // 2, x.size - 1):
        for bit in (0, 8 * x.itemsize - 1):
            flipped = bits.copy()
            flipped.reshape(-1)[place] ^= np.array(1 << bit).astype(bits.dtype)
            yield f"bit {bit} of word {place}", flipped.view(x.dtype)
    yield "neighbours swapped", np.concatenate([x.reshape(-1)[1::-1], x.reshape(-1)[2:]]).reshape(x.shape)
    if x.ndim > 1:
        yield "rows swapped", np.concatenate([x[1:], x[:1]])


@pytest.mark.parametrize("shape, dtype", SHAPES, ids=str)
@pytest.mark.parametrize("on_device", [False, True])
def test_any_change_is_seen(shape, dtype, on_device, monkeypatch):
    if on_device:
        monkeypatch.setattr(contract_digest, "_on_cpu", lambda leaf: False)
    x = np.asarray((20 * jax.random.normal(jax.random.key(0), shape)).astype(dtype))
    digest = lambda array: contract_digest.weights_digest({"other": jnp.ones(3), "weight": jnp.asarray(array)})
    found = {digest(x): "nothing"}
    assert digest(x.copy()) in found
    for what, other in changed(x):
        assert digest(other) not in found, what
        found[digest(other)] = what
    assert digest(x.reshape(-1, 1)) not in found, "another shape"


def test_each_sum_sees_a_word_by_itself():
    x = jnp.zeros((40, 50), jnp.uint16)
    before = np.asarray(checksums.word_sums(x))
    for place in ((0, 0), (39, 49), (7, 21)):
        for value in (1, 0x8000, 0xFFFF):
            assert (np.asarray(checksums.word_sums(x.at[place].set(value))) != before).all()


def test_a_contract_says_of_experts_only_where_there_are_some():
    """Coordinates that were drawn before models could have experts name no such figures."""
    dense, mixed = (
        contract_digest.contract_of(random_model(name)[0], XLA, "weights").parts["model"]
        for name in ("Qwen3", "Qwen3Moe")
    )
    assert mixed.keys() - dense.keys() == {*OF_EXPERTS, "norm_topk_prob"}
    assert not dense.keys() - mixed.keys()
