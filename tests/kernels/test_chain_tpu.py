"""The chain of a TPU's kernels, interpreted: each against float64, and a row alone against the row in a batch, by bits.

Those that copy by themselves, and what is not live, in the interpreter that knows a TPU's memory (test_tpu_memory.py).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chain_cases import BATCHES, GEOMETRY, LENGTHS, ROWS, array, bits, f64, heads_inputs, naive, silu
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chain import TpuChain
from pallas_kernels.chain_tpu import residual, rows
from pallas_kernels.matmul_tpu import sum_of_leaves_tpu
from pallas_kernels.sizes import INTERPRETED, matmul_sizes

WATCHED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
CHAIN, WATCHED_CHAIN = TpuChain(INTERPRETED, True), TpuChain(INTERPRETED, WATCHED)
LEAVES, WIDTH, OUTPUTS = 4, 168, 72  # two steps along K, the second short; columns that fill no block
LIVE = 36  # of the rows: of two tiles a product's second block computes one, and there is none for the third


@pytest.fixture
def no_races():
    yield
    found = interpret_pallas_call.races
    assert found is not None and not found.races_found, "accesses of a kernel overlapped, or none ran"
    pltpu.reset_tpu_interpret_mode_state()


def computed(x: jax.Array, live: int) -> None:
    """That the first rows were, and no tile after them."""
    assert np.isfinite(f64(x[:live])).all() and np.isnan(f64(x[-rows.SUB_ROWS :])).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_products(dtype):
    """Of shared rows, of each leaf's own, gated, and of several parts."""
    x, w = array(ROWS, WIDTH, dtype=dtype), array(LEAVES, 2 * OUTPUTS, WIDTH, dtype=dtype)
    flat, many = w.reshape(-1, WIDTH), functools.partial(jnp.tile, reps=LEAVES)
    run = {
        "outputs": jax.jit(lambda x: CHAIN.outputs(x, flat)[0]),
        "summed": jax.jit(lambda x: CHAIN.summed(many(x), w)[0, 0]),
        "gated": jax.jit(lambda x: CHAIN.gated(x, w)),
        "finished": jax.jit(lambda x: CHAIN.finished(jnp.stack([x, x]), flat)),
    }
    y = f64(x) @ f64(flat).T
    gate, up = f64(x) @ f64(w[:, :OUTPUTS]).swapaxes(1, 2), f64(x) @ f64(w[:, OUTPUTS:]).swapaxes(1, 2)
    gated = (silu(gate) * up).swapaxes(0, 1).reshape(ROWS, -1)
    expected = {"outputs": y, "summed": (f64(x) @ f64(w).swapaxes(1, 2)).sum(0), "gated": gated, "finished": 2 * y}
    for name, function in run.items():
        whole, size = function(x), np.abs(expected[name]).max()
        rounding = 1e-2 if name == "gated" and dtype == jnp.bfloat16 else 1e-6
        assert np.abs(f64(whole) - expected[name]).max() < rounding * size, name
        for some in BATCHES[1:3]:
            assert (bits(function(x[some])) == bits(whole[some])).all(), (name, some)


def test_leaves_are_added_by_the_tree():
    """In a product's own memory, as if each leaf's product had been written out."""
    x, w = array(8, 40, WIDTH), array(8, OUTPUTS, WIDTH)
    sizes = matmul_sizes(INTERPRETED, w.dtype, OUTPUTS, WIDTH)
    one = [CHAIN.outputs(x[leaf], w[leaf])[0] for leaf in range(8)]
    while len(one) > 1:
        one = [a + b for a, b in zip(one[0::2], one[1::2], strict=True)]
    for leaves in (8, 1):
        found = sum_of_leaves_tpu(x[:leaves], w[:leaves], sizes, None, interpret=True)
        expected = one[0] if leaves == 8 else CHAIN.outputs(x[0], w[0])[0]
        assert (bits(found) == bits(expected)).all()


def test_the_stream_is_settled():
    """The norm's three bfloat16 parts are a float32 number."""
    x, sums, bias, norm = array(ROWS, WIDTH), array(4, ROWS, WIDTH), array(WIDTH), array(WIDTH)
    settle = functools.partial(residual.settle, eps=1e-6, interpret=True)
    total, (y,) = settle(x, sums, bias, norm, dtype=jnp.float32)
    assert (bits(total) == bits(x + ((sums[0] + sums[1]) + (sums[2] + sums[3])) + bias)).all()
    expected = f64(total) / np.sqrt((f64(total) ** 2).mean(-1, keepdims=True) + 1e-6) * f64(norm)
    assert np.abs(f64(y) - expected).max() < 1e-5
    assert (bits(residual.total(x, sums, bias, interpret=True)) == bits(total)).all()
    parts = settle(x, sums, bias, norm, dtype=jnp.bfloat16, parts=3)[1].astype(jnp.float32)
    assert (bits(parts[0] + (parts[1] + parts[2])) == bits(y)).all()
    for some in (*BATCHES, slice(0, 8)):
        alone = settle(x[some], sums[:, some], bias, norm, dtype=jnp.float32)
        assert (bits(alone[0]) == bits(total[some])).all() and (bits(alone[1][0]) == bits(y[some])).all()


def test_only_live_rows_are_computed(no_races):
    x, w, live = array(80, WIDTH), array(LEAVES, OUTPUTS, WIDTH), jnp.int32(LIVE)
    how = dict(live=live, interpret=WATCHED)
    y = WATCHED_CHAIN.outputs(x, w[0], live)[0]
    assert f64(y[32:LIVE]).all() and not f64(y[48:64]).any(), "a tile without a live row was computed"
    for out in (
        y,
        WATCHED_CHAIN.summed(jnp.tile(x, LEAVES), w, live)[0, 0],
        WATCHED_CHAIN.gated(x, w, live),
        residual.total(x, None, w[0, 0], **how),
        residual.settle(x, None, None, w[0, 0], 1e-6, jnp.float32, **how)[1][0],
    ):
        computed(out, LIVE)


# -- attention ---------------------------------------------------------------------------------------------------------


@jax.jit
def attend_after_write(projection, pools, blocks):
    q, keys, values = WATCHED_CHAIN.rotate_and_write(GEOMETRY, projection, *pools, blocks)
    return WATCHED_CHAIN.attend(q, keys, values, blocks), keys, values


def attended(starts, counts, slots, sums, size: int = 8):
    """(what the blocks attend to, the pools), with blocks of padding after them, up to `size`."""
    projection, pools, blocks = heads_inputs(starts, counts, slots, sums)
    dead, r = size - len(starts), sums.shape[1] // len(starts)
    of_slots, of_starts, of_counts = (jnp.pad(x, (0, dead)) for x in blocks[1:4])
    sums = jnp.pad(sums, ((0, 0), (0, dead * r), (0, 0)), constant_values=jnp.nan)
    blocks = blocks._replace(slots=of_slots, starts=of_starts, counts=of_counts)
    out, keys, values = attend_after_write(projection._replace(sums=sums), pools, blocks)
    assert np.isnan(f64(out[len(starts) * r :])).all()
    return out[: len(starts) * r], keys, values


def test_attention(no_races):
    """The last tokens of five contexts: each alone, and all together, before blocks of padding."""
    slots, starts = list(range(len(LENGTHS))), [length - 1 for length in LENGTHS]
    ones, sums = [1] * len(LENGTHS), array(1, len(LENGTHS), (6 + 2 + 2) * GEOMETRY.width)
    together, keys, values = attended(starts, ones, slots, sums)
    for i in slots:
        alone, *_ = attended(starts[i : i + 1], [1], [i], sums[:, i : i + 1])
        assert (bits(alone[0]) == bits(together[i])).all(), LENGTHS[i]
    assert np.abs(f64(together) - naive(starts, sums, keys, values)).max() < 1e-5


def test_a_block_of_a_prefill_has_the_bits_of_its_tokens(no_races):
    """Four tokens of two contexts in blocks of four, the second half empty, against decoding them one after another,
    where all write into one memory tile."""
    sums = array(1, 8, 10 * GEOMETRY.width)
    blocks, *_ = attended([64, 28], [4, 2], [3, 1], sums, 2)
    for block, (slot, start, count) in enumerate(((3, 64, 4), (1, 28, 2))):
        for token in range(count):
            part = sums[:, 4 * block : 4 * block + token + 1]
            places = range(start, start + token + 1)
            alone, *_ = attended(list(places), [1] * len(places), [slot] * len(places), part)
            assert (bits(alone[-1]) == bits(blocks[4 * block + token])).all()
