"""The draw: tokens and logprobs of every body against float64; a row's bits alone and in a batch, drawn and given."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.device import sampler
from jaxengine.ops.kernels import XLA
from pallas_kernels.cases.draw import SMALL, DrawCase
from pallas_kernels.draw import draw_and_score
from pallas_kernels.draw_gpu import draw_gpu
from pallas_kernels.implementations import choose
from pallas_kernels.sizes import VOCAB_BLOCK

CASES = [case if case is SMALL[1] else pytest.param(case, marks=pytest.mark.long) for case in SMALL]
DRAW = functools.partial(jnp.full, fill_value=-1, dtype=jnp.int32)


def bits(outputs) -> list:
    tokens, logprobs, *_ = outputs
    return [np.asarray(tokens).tolist(), np.asarray(logprobs).view(np.uint32).tolist()]


def cdf_interval(weights: np.ndarray, index: int) -> tuple[float, float]:
    """The uniforms that pick `index`, in float64."""
    cumulative = np.cumsum(weights) / weights.sum()
    return (cumulative[index - 1] if index else 0.0), cumulative[index]


@functools.cache
def jitted(body: type) -> Callable:
    """One jitted function a body, so that its tests share what is compiled."""
    return jax.jit(body().run)


class Body:
    """What every implementation must hold. A subclass says how it runs."""

    def run(self, logits, uniforms, given):
        raise NotImplementedError

    @property
    def jitted(self):
        return jitted(type(self))

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_tokens_and_logprobs_are_those_of_float64(self, case):
        logits, uniforms = case.operands()
        tokens, logprobs, *_ = self.jitted(logits, uniforms, DRAW(case.rows))
        exact = np.asarray(logits, np.float64)
        exact -= exact.max(1, keepdims=True)
        exact -= np.log(np.exp(exact).sum(1, keepdims=True))
        for row, token in enumerate(np.asarray(tokens)):
            np.testing.assert_allclose(logprobs[row], exact[row, token], rtol=1e-6, atol=1e-5)
            blocks = np.exp(exact[row]).reshape(-1, VOCAB_BLOCK)
            block, inside = divmod(int(token), VOCAB_BLOCK)
            intervals = cdf_interval(blocks.sum(1), block), cdf_interval(blocks[block], inside)
            for u, (low, high) in zip(np.asarray(uniforms)[row], intervals, strict=True):
                assert low - 1e-5 <= u <= high + 1e-5

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_a_row_has_the_same_bits_in_any_batch(self, case):
        logits, uniforms = case.operands()
        tokens, logprobs, *_ = self.jitted(logits, uniforms, DRAW(case.rows))
        for rows in (slice(5, 6), slice(36, 37), slice(3, 19)):
            part = self.jitted(logits[rows], uniforms[rows], DRAW(rows.stop - rows.start))
            assert bits(part) == bits((tokens[rows], logprobs[rows]))

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_a_given_token_has_the_logprob_of_a_drawn_one(self, case):
        logits, uniforms = case.operands()
        tokens, logprobs, *_ = self.jitted(logits, uniforms, DRAW(case.rows))
        assert bits(self.jitted(logits, jnp.full_like(uniforms, 0.999), tokens)) == bits((tokens, logprobs))

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_all_logprobs_have_the_bits_of_the_tokens(self, case):
        logits, uniforms = case.operands()
        out = self.jitted(logits, uniforms, DRAW(case.rows))
        each = jax.jit(lambda x, out: out.all_logprobs(x))(logits, out)
        assert bits((out.tokens, jnp.take_along_axis(each, out.tokens[:, None], 1)[:, 0])) == bits(out)
        assert (jnp.isneginf(each) == jnp.isneginf(logits)).all()
        np.testing.assert_allclose(jnp.exp(each).sum(1), 1.0, rtol=1e-5)

    def test_nothing_ruled_out_is_drawn(self):
        case = DrawCase(64, 256, kept=3)
        logits, uniforms = case.operands()
        edges = jnp.array([0.0, 1.0 - 2**-24])[jnp.arange(128).reshape(64, 2) % 3 % 2]
        for u in (uniforms, edges):
            tokens, logprobs, *_ = self.jitted(logits, u, DRAW(64))
            drawn = jnp.take_along_axis(logits, tokens[:, None], 1)
            assert jnp.isfinite(drawn).all() and np.isfinite(logprobs).all()

    def test_rows_beside_are_not_read(self):
        logits, uniforms = SMALL[0].operands()
        poisoned = jnp.full_like(logits, jnp.nan).at[7].set(logits[7])
        found, expected = (self.jitted(x, uniforms, DRAW(37)) for x in (poisoned, logits))
        assert bits([x[7:8] for x in found]) == bits([x[7:8] for x in expected])


class TestReference(Body):
    implementation = choose("xla")

    def run(self, logits, uniforms, given):
        return draw_and_score(logits, given, uniforms, implementation=self.implementation)

    def test_gradient_is_that_of_log_softmax(self):
        logits, uniforms = SMALL[3].operands()
        tokens = self.jitted(logits, uniforms, DRAW(37)).tokens
        weight = jnp.arange(37.0)

        def ours(logits):
            return (self.run(logits, uniforms, tokens).logprobs * weight).sum()

        def theirs(logits):
            return (jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], 1)[:, 0] * weight).sum()

        found, expected = jax.jit(jax.grad(ours))(logits), jax.grad(theirs)(logits)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    def test_gradient_of_the_entropy(self):
        """The entropy is computed from all logprobs."""
        logits, uniforms = SMALL[3].operands()

        def entropies(logprobs):
            kept = jnp.where(logits > -jnp.inf, logprobs, 0.0)
            return (-jnp.where(logits > -jnp.inf, jnp.exp(kept) * kept, 0.0).sum(1) * jnp.arange(37.0)).sum()

        def ours(logits):
            return entropies(self.run(logits, uniforms, DRAW(37)).all_logprobs(logits))

        def theirs(logits):
            return entropies(jax.nn.log_softmax(logits))

        found, expected = jax.jit(jax.grad(ours))(logits), jax.grad(theirs)(logits)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


class TestTpuBody(TestReference):
    implementation = choose("pallas_interpret")


class TestGpuBody(Body):
    def run(self, logits, uniforms, given):
        return draw_gpu(logits, uniforms, given, interpret=True)


def test_the_twin_is_the_engines_sampler():
    """The engine draws with the same functions."""
    logits, _ = SMALL[1].operands()
    keys = jax.random.split(jax.random.key(3), 37)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    twin = jax.jit(functools.partial(draw_and_score, implementation=choose("xla")))(logits[:8], DRAW(8), uniforms[:8])
    engines = jax.jit(lambda x, k: XLA.draw.draw_and_score(x, DRAW(8), sampler.uniforms(k)))(logits[:8], keys[:8])
    assert bits(engines) == bits(twin)
    assert np.array_equal(engines.all_logprobs(logits[:8]), twin.all_logprobs(logits[:8]))


def test_errors():
    xla = choose("xla")
    for found, logits, uniforms in (
        ("multiple of 128, got 100", jnp.ones((2, 100)), jnp.ones((2, 2))),
        (r"got bfloat16 \(2, 128\)", jnp.ones((2, 128), jnp.bfloat16), jnp.ones((2, 2))),
        (r"got float32 \(2, 128\), \(2,\) and \(3, 2\)", jnp.ones((2, 128)), jnp.ones((3, 2))),
    ):
        with pytest.raises(ValueError, match=found):
            draw_and_score(logits, DRAW(2), uniforms, implementation=xla)
