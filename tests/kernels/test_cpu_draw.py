"""The CPU's draw: the definition of draw_reference.py, a row alone and in a batch, and rows that are no numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_kernels import BODIES, SIZES, f64, same

from jaxengine.ops.cpu_chain import CpuDraw
from pallas_kernels.cpu import calls
from pallas_kernels.draw_reference import draw_reference

ROWS, VOCABULARY = 131, 1024
RNG = np.random.default_rng(0)
LOGITS = jnp.asarray(RNG.normal(0, 3, size=(ROWS, VOCABULARY)), jnp.float32)
LOGITS = LOGITS.at[:, 1000:].set(-jnp.inf).at[5, 1:].set(-jnp.inf).at[6, 10:].add(-200.0)
UNIFORMS = jnp.asarray(RNG.uniform(size=(ROWS, 2)), jnp.float32).at[7].set(0.0).at[8].set(1 - 2.0**-24)
DRAWN = jnp.where(jnp.arange(ROWS) % 4, -1, 3).astype(jnp.int32)  # every fourth row scores token 3


@pytest.mark.parametrize("body", BODIES)
def test_the_definition(body):
    tokens, logprobs, highs, masses = calls.draw(LOGITS, UNIFORMS, DRAWN, body)
    reference = draw_reference(LOGITS, UNIFORMS, DRAWN)
    assert (np.asarray(tokens) == np.asarray(reference.tokens)).mean() > 0.97, "a boundary may fall otherwise"
    x = f64(LOGITS)
    log_mass = np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1))
    expected = (x - x.max(-1, keepdims=True))[np.arange(ROWS), tokens] - log_mass
    assert np.abs(logprobs - expected).max() < 3e-6
    assert same(highs, LOGITS.max(-1)) and np.abs(masses - log_mass).max() < 1e-6
    assert (np.asarray(tokens)[DRAWN >= 0] == 3).all() and (np.asarray(tokens) < 1000).all()


@pytest.mark.parametrize("body", BODIES)
def test_a_row_alone_is_the_row_in_a_batch(body):
    whole = calls.draw(LOGITS, UNIFORMS, DRAWN, BODIES[0])
    for size in SIZES:
        rows = slice(ROWS - size, ROWS)
        found = calls.draw(*(np.asarray(x)[rows] for x in (LOGITS, UNIFORMS, DRAWN)), body)
        assert all(same(x, np.asarray(y)[rows]) for x, y in zip(found, whole, strict=True)), size


def test_draws_follow_the_distribution():
    """Chi-square over the tokens of one row."""
    n, row = 4096, jnp.asarray(RNG.normal(size=256), jnp.float32)
    uniforms = jnp.asarray(RNG.uniform(size=(n, 2)), jnp.float32)
    tokens = calls.draw(jnp.tile(row, (n, 1)), uniforms, jnp.full(n, -1, jnp.int32))[0]
    expected = f64(jax.nn.softmax(row)) * n
    found = np.bincount(np.asarray(tokens), minlength=256)
    chi = ((found - expected) ** 2 / expected).sum()
    assert 255 - 5 * np.sqrt(510) < chi < 255 + 5 * np.sqrt(510)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_no_numbers_says_so_and_harms_no_other(bad):
    tokens, logprobs, *_ = calls.draw(LOGITS.at[4, 77].set(bad), UNIFORMS, DRAWN)
    assert np.isnan(logprobs[4]) and 0 <= tokens[4] < VOCABULARY
    whole = calls.draw(LOGITS, UNIFORMS, DRAWN)
    others = np.arange(ROWS) != 4
    assert same(np.asarray(logprobs)[others], np.asarray(whole[1])[others])


def test_the_gradient():
    """Of the logprob and of the log mass, as XLA has it of the reference."""

    def loss(draw):
        def of(logits):
            out = draw(logits)
            return (out.logprobs * jnp.arange(8)).sum() + (out.log_masses**2).sum()

        return jax.grad(of)(LOGITS[16:24, :256])

    own = loss(lambda logits: CpuDraw("best").draw_and_score(logits, jnp.arange(8, dtype=jnp.int32)))
    plain = loss(lambda logits: draw_reference(logits, jnp.zeros((8, 2)), jnp.arange(8, dtype=jnp.int32)))
    assert np.abs(own - plain).max() < 1e-5 and np.abs(own).max() > 0.1
