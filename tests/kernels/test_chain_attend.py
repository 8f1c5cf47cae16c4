"""The prefill of a Hopper GPU's attention, interpreted: blocks of one sequence that share a program have the bits that
each has alone. What a block may not read is NaN.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.chain_gpu import attend, blocks, sizes
from pallas_kernels.paged_attention_inputs import PagedBlocks

SIZES = sizes.ChainSizes(depth=32, split=64, kv_tile=32, kv_split=64, columns=64, warps=4, stages=2, attend_rows=128)
TOKENS, PAGE, PAGES, SLOTS = 4, 16, 12, 5  # of a block, of a page, of a context of three splits
BLOCKS = (
    # slot, start, count
    *((0, start, 4) for start in range(37, 73, 4)),  # from the middle of a tile into the next split
    (0, 73, 2),
    (1, 149, 1),
    (0, 0, 0),
    (0, 0, 0),
    (2, 28, 4),
    (2, 32, 4),
    (2, 36, 3),
    (3, 100, 4),
    (3, 108, 4),  # not the next tokens
    (4, 20, 3),
    (4, 24, 4),  # nor here, because the block before is short
    (1, 60, 4),
    (2, 64, 4),  # the next position, of another sequence
    (1, 64, 4),
    (0, 0, 0),
    (1, 68, 4),
    (3, 180, 4),
    (3, 184, 3),
    (0, 0, 0),
    (0, 0, 0),
)


def as_blocks(tables, rows) -> PagedBlocks:
    slots, starts, counts = (jnp.asarray(column, jnp.int32) for column in zip(*rows, strict=True))
    return PagedBlocks(tables, slots, starts, counts, jnp.int32(len(rows)))


def poisoned(pool: np.ndarray, tables: np.ndarray, rows) -> np.ndarray:
    """The pool with NaN in every place that no block of `rows` sees."""
    seen = np.zeros((SLOTS, PAGES * PAGE), bool)
    for slot, start, count in rows:
        seen[slot, : start + count if count else 0] = True
    out = np.full_like(pool, np.nan)
    for slot, position in zip(*np.nonzero(seen), strict=True):
        cell = tables[slot, position // PAGE], slice(None), position % PAGE
        out[cell] = pool[cell]
    return out


def of_many(group: int, width: int, dtype: np.dtype, apart: bool):
    """What all blocks attend to, and each of them alone: [blocks, tokens, H * width] twice, as the bits of float32."""
    rng, page_width, heads = np.random.default_rng(0), max(16, 1 << (width - 1).bit_length()), 2 * group
    tables = 1 + rng.permutation(SLOTS * PAGES).reshape(SLOTS, PAGES)
    pools = [rng.normal(size=(1 + SLOTS * PAGES, 2, PAGE, page_width)).astype(np.float32) for _ in range(2)]
    q = 2 * rng.normal(size=(len(BLOCKS), TOKENS, heads, width)).astype(np.float32)
    for block, (_, _, count) in enumerate(BLOCKS):
        q[block, count:] = np.nan

    @jax.jit
    def run(q, keys, values, blocks):
        return attend.attend(q, keys, values, blocks, SIZES, interpret=True, apart=apart)

    def bits_of(q: np.ndarray, rows) -> np.ndarray:
        keys, values = (jnp.asarray(poisoned(pool, tables, rows), dtype) for pool in pools)
        queries = jnp.asarray(q.reshape(-1, heads, width), dtype)
        out = run(queries, keys, values, as_blocks(jnp.asarray(tables), rows))
        return np.asarray(out, np.float32).reshape(len(rows), TOKENS, -1).view(np.uint32)

    alone = [bits_of(q[block : block + 1], BLOCKS[block : block + 1]) for block in range(len(BLOCKS))]
    return bits_of(q, BLOCKS), np.concatenate(alone)


def assert_equal(together: np.ndarray, alone: np.ndarray) -> None:
    for block, (slot, start, count) in enumerate(BLOCKS):
        own = together[block, :count]
        assert np.isfinite(own.view(np.float32)).all(), (slot, start)
        assert np.array_equal(own, alone[block, :count]), (slot, start)


@pytest.mark.parametrize(
    ("group", "width", "dtype", "apart"),
    [(1, 24, "float32", False), (2, 16, "bfloat16", True), (7, 40, "float32", False)],
)
def test_blocks_that_share_a_program_have_the_bits_that_each_has_alone(group, width, dtype, apart):
    assert_equal(*of_many(group, width, jnp.dtype(dtype), apart))


def test_a_sum_over_keys_does_not_know_how_many_rows_there_are():
    """XLA's own on a CPU does."""
    x = jnp.asarray(np.random.default_rng(0).random((32, 128)), jnp.float32)
    total = jax.jit(functools.partial(blocks.over_keys, interpret=True))
    for rows in (16, 32, 64):
        assert np.array_equal(total(x[:, :rows]), total(x)[:rows]), rows


@pytest.mark.parametrize("rows", [16, 64])
def test_how_many_rows_a_program_takes_is_free(rows, monkeypatch):
    expected, _ = of_many(2, 16, jnp.dtype("bfloat16"), False)
    monkeypatch.setattr(attend, "attend_sizes", lambda *_: sizes.AttendSizes(rows, 4, 2))
    found, _ = of_many(2, 16, jnp.dtype("bfloat16"), False)
    for block, (_, _, count) in enumerate(BLOCKS):
        assert np.array_equal(found[block, :count], expected[block, :count]), block


def test_what_a_program_takes():
    """Consecutive blocks of one sequence are taken by the first of them in the group. NumPy raises where an index lies
    outside, as no kernel does.
    """
    blocks: Any = jax.tree.map(np.asarray, as_blocks(jnp.zeros((SLOTS, PAGES)), BLOCKS))

    def taken(together: int) -> list[int]:
        return [int(attend.tokens_taken(blocks, b, TOKENS, together)) for b in range(len(BLOCKS))]

    assert taken(1) == [count for _, _, count in BLOCKS]
    assert taken(4) == [16, 0, 0, 0, 16, 0, 0, 0, 6, 0, 1, 0, 0, 11, 0, 0, 4, 4, 3, 4, 4, 4, 4, 0, 4, 7, 0, 0, 0]
    assert taken(8)[:10] == [32, 0, 0, 0, 0, 0, 0, 0, 6, 0]


def test_a_row_tile_is_wide_where_registers_allow_it():
    hopper = sizes.chain_sizes("Hopper", np.dtype(jnp.bfloat16))
    of = functools.partial(sizes.attend_sizes, hopper, 16)
    assert of(group=2, width=64).rows == 128
    assert of(group=4, width=128).rows == 64


def test_no_zero_has_a_sign():
    """A tile of which a row sees nothing adds zeros to its sums, so the sign of a zero says which tiles it met."""
    y = attend.finished(jnp.array([1.0, 0.0, 2.0]), jnp.array([-0.0, -0.0, -3.0]))
    expected = np.array([0.0, 0.0, -1.5], np.float32)
    assert np.array_equal(np.asarray(y).view(np.uint32), expected.view(np.uint32))
