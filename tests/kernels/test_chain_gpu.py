"""The chain of a Hopper GPU's kernels, interpreted: each against float64, and a row alone against the row in a batch,
by bits. Rows come in numbers that take each tile of rows, weights in sizes that fill no tile.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chain_cases import BATCHES, GEOMETRY, LENGTHS, RNG, ROWS, array, bits, f64, heads_inputs, naive, silu

from pallas_kernels.chain_gpu import attend, heads, product, residual
from pallas_kernels.chain_gpu.sizes import ChainSizes, chain_sizes, split_of, stages_of
from pallas_kernels.sizes import INTERPRETED

SIZES = ChainSizes(depth=32, split=64, kv_tile=32, kv_split=64, columns=64, warps=4, stages=2, attend_rows=128)
LEAVES, WIDTH, OUTPUTS = 2, 168, 72  # three splits, the last one short; columns that fill no tile


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_products(dtype):
    """Of shared rows, of each leaf's own, gated, and in one split."""
    x, w = array(ROWS, WIDTH, dtype=dtype), array(LEAVES, 2 * OUTPUTS, WIDTH, dtype=dtype)
    flat = w.reshape(-1, WIDTH)
    run = {
        "outputs": jax.jit(lambda x: product.outputs(x[None], flat, SIZES, interpret=True).sum(0)),
        "summed": jax.jit(lambda x: product.summed(jnp.tile(x, 2), w, SIZES, interpret=True).sum(1)[1]),
        "gated": jax.jit(lambda x: product.gated(x, w, SIZES, interpret=True)),
        "finished": jax.jit(lambda x: product.finished(jnp.stack([x, x]), flat, SIZES, interpret=True)),
    }
    y = f64(x) @ f64(flat).T
    gate, up = f64(x) @ f64(w[:, :OUTPUTS]).swapaxes(1, 2), f64(x) @ f64(w[:, OUTPUTS:]).swapaxes(1, 2)
    gated = (silu(gate) * up).swapaxes(0, 1).reshape(ROWS, -1)
    expected = {"outputs": y, "summed": y[:, 2 * OUTPUTS :], "gated": gated, "finished": 2 * y}
    for name, function in run.items():
        whole, size = function(x), np.abs(expected[name]).max()
        rounding = 1e-2 if name == "gated" and dtype == jnp.bfloat16 else 1e-6
        assert np.abs(f64(whole) - expected[name]).max() < rounding * size, name
        for rows in BATCHES:
            assert (bits(function(x[rows])) == bits(whole[rows])).all(), (name, rows)


def test_splits_side_by_side_are_those_in_turn(monkeypatch):
    """132 tiles fill a Hopper's processors; here as many as we say."""
    x, w = array(1, 20, WIDTH), array(OUTPUTS, WIDTH)
    apart = product.outputs(x, w, SIZES, interpret=True)
    gated = product.gated(x[0], w[None], SIZES, interpret=True)
    monkeypatch.setattr(product, "PROCESSORS", 1)
    in_turn = product.outputs(x, w, SIZES, interpret=True)
    assert (apart.shape[0], in_turn.shape[0]) == (3, 1)
    assert (bits((apart[0] + apart[1]) + apart[2]) == bits(in_turn[0])).all()
    assert (bits(product.gated(x[0], w[None], SIZES, interpret=True)) == bits(gated)).all()


def test_the_stream_is_settled():
    """Splits in order, leaves by the tree; the norm's three bfloat16 parts are a float32 number."""
    x, sums, bias, norm = array(ROWS, WIDTH), array(4, 3, ROWS, WIDTH), array(WIDTH), array(WIDTH)
    settle = functools.partial(residual.settle, eps=1e-6, interpret=True)
    total, (y,) = settle(x, sums, bias, norm, dtype=jnp.float32)
    leaves = [(s[0] + s[1]) + s[2] for s in sums]
    assert (bits(total) == bits(x + ((leaves[0] + leaves[1]) + (leaves[2] + leaves[3])) + bias)).all()
    expected = f64(total) / np.sqrt((f64(total) ** 2).mean(-1, keepdims=True) + 1e-6) * f64(norm)
    assert np.abs(f64(y) - expected).max() < 1e-5
    assert (bits(residual.total(x, sums, bias, interpret=True)) == bits(total)).all()
    parts = settle(x, sums, bias, norm, dtype=jnp.bfloat16, parts=3)[1].astype(jnp.float32)
    assert (bits(parts[0] + (parts[1] + parts[2])) == bits(y)).all()
    for rows in BATCHES:
        alone = settle(x[rows], sums[:, :, rows], bias, norm, dtype=jnp.float32)
        assert (bits(alone[0]) == bits(total[rows])).all() and (bits(alone[1][0]) == bits(y[rows])).all()


def test_the_embedding_is_copied():
    table, ids = array(50, WIDTH, dtype=jnp.bfloat16), jnp.asarray(RNG.integers(0, 50, 9))
    assert (bits(residual.embed(table, ids, interpret=True)) == bits(table[ids].astype(jnp.float32))).all()


# -- attention ---------------------------------------------------------------------------------------------------------


def attended(starts, counts, slots, sums, r: int, apart: bool | None = None):
    """(what the blocks attend to, the pools)."""
    projection, pools, blocks = heads_inputs(starts, counts, slots, sums)
    q, keys, values = heads.rotate_and_write(GEOMETRY, projection, *pools, blocks, interpret=True)
    return attend.attend(q, keys, values, blocks, SIZES, interpret=True, apart=apart), keys, values


def test_attention():
    """The last tokens of five contexts: each alone, all together, as the end of a prefill's block, split either way."""
    slots, starts = list(range(len(LENGTHS))), [length - 1 for length in LENGTHS]
    ones, sums = [1] * len(LENGTHS), array(2, len(LENGTHS), (6 + 2 + 2) * GEOMETRY.width)
    together, keys, values = attended(starts, ones, slots, sums, r=1)
    assert np.isfinite(np.asarray(together)).all()
    for i in slots:
        alone, *pools = attended(starts[i : i + 1], [1], [i], sums[:, i : i + 1], r=1)
        assert (bits(alone[0]) == bits(together[i])).all(), LENGTHS[i]
        in_turn, *_ = attended(starts[i : i + 1], [1], [i], sums[:, i : i + 1], r=1, apart=False)
        assert (bits(in_turn[0]) == bits(together[i])).all(), LENGTHS[i]
    expected = naive(starts, sums, keys, values)
    assert np.abs(f64(together) - expected).max() < 1e-5


def test_a_block_of_a_prefill_has_the_bits_of_its_tokens():
    """Four tokens of two contexts in blocks of four, the second half empty, against decoding them one after another."""
    sums = array(1, 8, 10 * GEOMETRY.width)
    blocks, *pools = attended([64, 28], [4, 2], [3, 1], sums, r=4)
    for block, (slot, start, count) in enumerate(((3, 64, 4), (1, 28, 2))):
        for token in range(count):
            part = sums[:, 4 * block : 4 * block + token + 1]
            rows = range(start, start + token + 1)
            alone, *_ = attended(list(rows), [1] * len(rows), [slot] * len(rows), part, r=1)
            assert (bits(alone[-1]) == bits(blocks[4 * block + token])).all()


def test_sizes_are_of_the_weight_alone():
    hopper = chain_sizes("Hopper", np.dtype(jnp.bfloat16))
    assert split_of(hopper, 24576, 4096) == 4096 and split_of(hopper, 4096, 12288) == hopper.split
    assert split_of(hopper, 1024, 1024) == 1024
    with pytest.raises(ValueError, match="takes weights in bfloat16 or float32, got float16"):
        chain_sizes("Hopper", np.dtype(np.float16))
    assert chain_sizes(INTERPRETED, np.dtype(np.float32)).kv_tile == 32


def test_blocks_fit_an_h100s_shared_memory():
    """The head's three bfloat16 parts at 128 rows do not with as many stages as the table says."""
    hopper = chain_sizes("Hopper", np.dtype(jnp.bfloat16))
    assert stages_of(hopper, rows=128, itemsize=2) == hopper.stages
    head = stages_of(hopper, rows=3 * 128, itemsize=2)
    assert head == 3 and head * (3 * 128 + hopper.columns) * hopper.depth * 2 < 227 * 1024 - 4096
