"""What nobody should give the CPU's kernels: tables that lead anywhere, lengths of any size, pages of NaN.

They refuse it, or answer; test_cpu_sanitized.py watches that they touch nothing of others' meanwhile.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_kernels import BODIES, bits

from pallas_kernels.cpu import calls
from pallas_kernels.paged_attention_inputs import PagedBlocks

PAGES, HEADS, WIDTH, SLOTS, BLOCKS = 3, 2, 24, 4, 64
ODD = np.array([-(2**31), -7, -1, 0, 1, 2, 3, 15, 16, 17, 47, 48, 2**31 - 1])
every_body = pytest.mark.parametrize("body", BODIES)


def pools(dtype: str) -> tuple[jax.Array, jax.Array]:
    storage, nan = (jnp.float32, jnp.nan) if dtype == "float32" else (jnp.uint16, 0x7FFF)
    keys, values = (jnp.full(x.shape, nan, x.dtype) for x in calls.page_shapes(HEADS, PAGES, 16, WIDTH, storage))
    return keys, values


@every_body
@pytest.mark.parametrize("tokens, dtype", [(1, "bfloat16"), (16, "float32")])
def test_blocks_of_any_numbers(tokens, dtype, body):
    """At random between what is right and what is not: about half are refused."""
    rng, refused = np.random.default_rng(tokens), 0
    geometry = calls.Geometry(1, 4, WIDTH, 1e-6, 1.0, dtype)
    rows = rng.normal(size=(BLOCKS * tokens, (4 + 2 * HEADS) * WIDTH)).astype(np.float32)

    def numbers(end: int, *shape: int, odd: float) -> np.ndarray:
        return np.where(rng.random(shape) < odd, rng.choice(ODD, shape), rng.integers(0, end, shape)).astype(np.int32)

    for odd in (0.0, 0.02) * 20:
        tables, slots = numbers(PAGES, SLOTS, 3, odd=odd), numbers(SLOTS, BLOCKS, odd=odd)
        starts, counts = numbers(48 // tokens, BLOCKS, odd=odd) * tokens, numbers(tokens + 1, BLOCKS, odd=odd)
        ends = np.cumsum(np.clip(counts, 0, tokens))
        first_rows = np.where(rng.random(BLOCKS) < odd, rng.choice(ODD, BLOCKS), np.append(0, ends[:-1])).astype(
            np.int32
        )
        packed = jnp.asarray(first_rows) if rng.random() < 0.5 else None
        blocks = PagedBlocks(
            *(jnp.asarray(x, jnp.int32) for x in (tables, slots, starts, counts)), jnp.int32(rng.choice([*ODD, BLOCKS]))
        )
        try:
            q, *pages = calls.rotate_and_write(
                geometry, rows, (None, None), jnp.zeros(12), *pools(dtype), blocks, body, packed
            )
            y = np.asarray(calls.attend(q, *pages, blocks, dtype, body, packed))
        except (ValueError, jax.errors.JaxRuntimeError) as error:  # at the call, or when it is waited for
            assert "jaxengine's CPU kernels" in str(error)
            refused += 1
        else:
            assert y.shape == (BLOCKS * tokens, 4 * WIDTH)
    assert 5 < refused < 25


@every_body
def test_counts_and_ids_of_any_size(body):
    """Of rows that are live, and of tokens that there are not."""
    rng = np.random.default_rng(0)
    x, norm, w = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 70), (70,), (2, 33, 70)))
    whole = calls.outputs(x, norm, 1e-6, w, None, calls.Live(jnp.int32(5), 4), body)
    for count in ODD:
        found = calls.outputs(x, norm, 1e-6, w, None, calls.Live(jnp.int32(count), 4), body)
        live = int(np.clip(count, 0, 5))
        assert np.array_equal(bits(found)[:live], bits(whole)[:live])
        embedded = calls.embed(w, jnp.asarray(ODD[:5], jnp.int32), calls.Live(jnp.int32(count), 4), body)
        assert np.array_equal(bits(embedded)[:live], bits(w.reshape(66, 70)[np.clip(ODD[:live], 0, 65)]))


@every_body
def test_a_draw_of_any_numbers(body):
    """Given tokens outside of the vocabulary, uniforms that are none, rows without one number."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(len(ODD), 256)).astype(np.float32)
    logits[3], logits[4], logits[5] = -np.inf, np.nan, np.inf
    for uniforms in (np.full((len(ODD), 2), value, np.float32) for value in (-1, 0, 1, 2, np.nan, np.inf)):
        tokens, *_ = calls.draw(logits, uniforms, jnp.asarray(ODD, jnp.int32), body)
        assert ((np.asarray(tokens) >= 0) & (np.asarray(tokens) < 256)).all()
    for value in (-np.inf, -1.0, np.nan, np.inf):
        settings = jnp.asarray(ODD, jnp.int32), jnp.full(len(ODD), value), jnp.full(len(ODD), value)
        kept = np.asarray(calls.kept(logits, *settings, body))
        for row in range(len(ODD)):
            if row in (3, 4, 5) or value == np.inf:  # no distribution, or nothing is likely enough
                assert not kept[row].any()
            else:
                assert kept[row].any() and logits[row][kept[row]].min() > logits[row][~kept[row]].max(initial=-np.inf)
