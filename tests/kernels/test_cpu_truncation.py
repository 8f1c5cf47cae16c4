"""What the CPU's kernel keeps of a vocabulary: as the reference does, where one unit of rounding decides too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_kernels import BODIES
from test_truncation import SETTINGS, arrays, some_logits

from jaxengine.device.sampler import truncate
from jaxengine.ops.cpu_chain import CpuDraw
from pallas_kernels import draw_reference, truncation_reference
from pallas_kernels.cpu import calls
from pallas_kernels.draw_reference import log_softmax
from pallas_kernels.pinned_math import exp

RNG = np.random.default_rng(0)
every_body = pytest.mark.parametrize("body", BODIES)


def kept(logits, top_k, top_p, min_p, body="best") -> np.ndarray:
    settings = jnp.asarray(top_k, jnp.int32), jnp.asarray(top_p, jnp.float32), jnp.asarray(min_p, jnp.float32)
    return np.asarray(calls.kept(jnp.asarray(logits, jnp.float32), *settings, body))


def in_order(x):
    """Sums of rows: of 128 numbers the even and the odd ones apart, then of the sums of blocks."""
    if x.shape[-1] > 128:
        padded = jnp.pad(x, ((0, 0), (0, -x.shape[-1] % 128)))
        return in_order(in_order(padded.reshape(-1, 128)).reshape(len(x), -1))
    even, odd = jnp.zeros((2, len(x)), jnp.float32)
    for i in range(0, x.shape[-1] - 1, 2):
        even, odd = even + x[:, i], odd + x[:, i + 1]
    return (even + odd) + x[:, -1] if x.shape[-1] % 2 else even + odd


@pytest.fixture
def reference(monkeypatch):
    """The reference in this kernel's order of sums: XLA's own is another on AVX-512 than on AVX2."""
    for module in (truncation_reference, draw_reference):
        monkeypatch.setattr(module, "row_sum", lambda x: in_order(x.reshape(-1, x.shape[-1])).reshape(x.shape[:-1]))
    return jax.jit(lambda *of: truncation_reference.kept_reference(*of))


@every_body
@pytest.mark.parametrize("kind", ["normal", "many ties", "few are left"])
def test_what_the_reference_keeps(kind, body, reference):
    logits = some_logits(kind)
    found, expected = kept(logits, *arrays(), body), np.asarray(reference(logits, *arrays()))
    for i, setting in enumerate(SETTINGS):
        assert np.array_equal(found[i], expected[i]), f"{setting}: {found[i].sum()} and {expected[i].sum()} are kept"


@every_body
@pytest.mark.parametrize("vocab", [1, 5, 16, 127, 130, 2048, 2049, 5000])
def test_vocabularies_of_any_size(vocab, body, reference):
    logits = RNG.normal(0, 3, size=(len(SETTINGS), vocab)).astype(np.float32)
    logits[:, 1:][RNG.random((len(SETTINGS), vocab - 1)) < 0.2] = -np.inf
    assert np.array_equal(kept(logits, *arrays(), body), reference(logits, *arrays()))


@every_body
@pytest.mark.parametrize("vocab", [1000, 4224, 17000])
def test_the_order_of_sums(vocab, body):
    """p is the very mass of the n likeliest tokens, so that one unit of rounding in a sum is a token more or less."""
    logits = RNG.normal(size=(64, vocab)).astype(np.float32)
    likeliest = np.argsort(-logits, axis=1)
    high = logits.max(1, keepdims=True)
    exponentials = lambda x: np.asarray(jax.jit(exp)(x))
    log_mass = np.asarray(jnp.log(in_order(jnp.asarray(exponentials(logits - high)))))[:, None]
    probabilities = exponentials((logits - high) - log_mass)
    expected = np.zeros(logits.shape, bool)
    for row, ids in enumerate(likeliest):
        expected[row, ids[: 3 + 2 * row]] = True
    top_p = np.asarray(in_order(jnp.asarray(np.where(expected, probabilities, 0))))
    assert np.array_equal(kept(logits, [0] * 64, top_p, [0] * 64, body), expected)
    assert not np.array_equal(kept(logits, [0] * 64, np.nextafter(top_p, np.float32(2)), [0] * 64, body), expected)


@every_body
def test_ties_go_to_the_lowest_ids(body, reference):
    logits = np.full((1, 3000), -30.0)
    logits[:, [3, 2500, 9, 2999]] = -0.0, 0.0, 0.0, -0.0
    assert np.flatnonzero(kept(logits, [2], [1], [0], body)).tolist() == [3, 9]
    assert np.flatnonzero(kept(logits, [0], [0.7], [0], body)).tolist() == [3, 9, 2500]
    assert np.flatnonzero(kept(logits, [0], [1], [0.5], body)).tolist() == [3, 9, 2500, 2999]
    equal = np.zeros((len(SETTINGS), 640), np.float32)
    assert np.array_equal(kept(equal, *arrays(), body), reference(equal, *arrays()))


@every_body
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, "nothing"])
def test_a_row_without_a_distribution_keeps_nothing_and_harms_no_other(bad, body, reference):
    logits = some_logits("normal")
    whole = kept(logits, *arrays(), body)
    for row in range(len(SETTINGS)):
        broken = logits.copy()
        broken[row] = np.where(np.arange(logits.shape[1]) == 77, bad, logits[row]) if bad != "nothing" else -np.inf
        found = kept(broken, *arrays(), body)
        assert np.array_equal(found, reference(broken, *arrays()))
        assert np.array_equal(np.delete(found, row, 0), np.delete(whole, row, 0))


@every_body
def test_a_row_alone_keeps_what_it_keeps_in_a_batch(body):
    logits = some_logits("normal")
    whole = kept(logits, *arrays(), BODIES[0])
    for row in range(len(SETTINGS)):
        part = slice(row, row + 1)
        assert np.array_equal(kept(logits[part], *(x[part] for x in arrays()), body), whole[part])


def test_a_gradient_goes_to_what_is_kept():
    logits = jnp.asarray(RNG.normal(size=(2, 256)), jnp.float32).at[:, 0].set(2.5)
    settings = jnp.array([7, 0]), jnp.array([1.0, 0.5]), jnp.zeros(2)

    def loss(logits):
        return log_softmax(truncate(logits, *settings, CpuDraw("best").kept))[:, 0].sum()

    assert np.array_equal(jax.grad(loss)(logits) != 0, kept(logits, *settings))
