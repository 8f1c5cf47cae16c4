"""The CPU's products: against float64, in the order that product.h writes down, and a row alone against the row in a
batch by bits.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from cpu_kernels import BODIES, DTYPES, SIZES, bits, f64, same

from pallas_kernels.cpu import calls

ROWS, EPS = 131, 1e-6
SHAPES = [(1, 256, 96), (4, 100, 37), (2, 72, 48), (calls.MOST_LEAVES, 40, 18)]  # leaves, inputs, outputs of a leaf
ROUNDING = {"bfloat16": 6e-3, "float16": 8e-4, "float32": 1e-6}  # of a row or a result in that type


class Case:
    """Weights, rows, and each op as a function of (rows, how many are live)."""

    def __init__(self, dtype: str, leaves: int, inputs: int, outputs: int, body: str = "best") -> None:
        rng = np.random.default_rng(0)
        array = lambda *shape, dtype=dtype: np.asarray(rng.normal(size=shape), jnp.dtype(dtype))
        self.leaves, self.dtype = leaves, dtype
        self.x, self.inner = array(ROWS, inputs, dtype="float32"), array(ROWS, leaves * inputs)
        self.residual = array(ROWS, outputs, dtype="float32")
        self.norm, self.bias = array(inputs), array(leaves, outputs)
        self.w, self.w2 = array(leaves, outputs, inputs), array(leaves, 2 * outputs, inputs)
        self.ids = rng.integers(0, leaves * outputs, ROWS, dtype=np.int32)
        live = lambda count: calls.Live(jnp.int32(count), 8)
        own = dict(body=body)
        self.run = {
            "outputs": lambda s, n: calls.outputs(self.x[s], self.norm, EPS, self.w, self.bias, live(n), **own),
            "gated": lambda s, n: calls.gated(self.x[s], self.norm, EPS, self.w2, live(n), **own),
            "added": lambda s, n: calls.added(self.residual[s], self.inner[s], self.w, self.bias[0], live(n), **own),
            "logits": lambda s, n: calls.logits(self.x[s], self.norm, EPS, self.w, **own),
            "embed": lambda s, n: calls.embed(self.w, self.ids[s], live(n), **own),
        }

    @functools.cached_property
    def whole(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(run(slice(None), ROWS)) for name, run in self.run.items()}

    def expected(self) -> dict[str, np.ndarray]:
        x = f64(self.x)
        y = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * f64(self.norm)
        rounded = f64(jnp.asarray(y, jnp.float32).astype(self.dtype))
        each = lambda rows, w: np.einsum("rk,lnk->rln", rows, f64(w))
        gate, up = np.split(each(rounded, self.w2), 2, axis=-1)
        inner = f64(self.inner).reshape(ROWS, self.leaves, -1)
        return {
            "outputs": (each(rounded, self.w) + f64(self.bias)).reshape(ROWS, -1),
            "gated": (gate / (1 + np.exp(-gate)) * up).reshape(ROWS, -1),
            "added": f64(self.residual) + np.einsum("rlk,lnk->rn", inner, f64(self.w)) + f64(self.bias[0]),
            "logits": each(y, self.w).reshape(ROWS, -1),
            "embed": f64(self.w).reshape(-1, self.w.shape[-1])[self.ids],
        }


@functools.cache
def case(*how) -> Case:
    return Case(*how)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(dtype, shape):
    found, expected = case(dtype, *shape).whole, case(dtype, *shape).expected()
    for name, y in expected.items():
        rounding = ROUNDING[dtype] if name in ("gated", "outputs") else 1e-6
        assert np.abs(f64(found[name]) - y).max() < rounding * np.abs(y).max(), name


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_is_the_row_in_a_batch(dtype, body):
    whole = case(dtype, *SHAPES[1], body)
    for i, size in enumerate(SIZES if dtype == "bfloat16" else SIZES[::4]):
        first = min(5 * i, ROWS - size)
        rows = slice(first, first + size)
        for name, run in whole.run.items():
            assert same(run(rows, size), whole.whole[name][rows]), (name, size)


@pytest.mark.parametrize("body", BODIES[1:])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_bodies_give_the_same_bits(dtype, body):
    for shape in SHAPES:
        for name, y in case(dtype, *shape, body).whole.items():
            assert same(y, case(dtype, *shape, BODIES[0]).whole[name]), name


def in_order(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x @ w.T of float32 arrays by the order, one rounding after the other.

    A fused multiply-add is a float64 one that is rounded once more, which is exact for factors of 16 bits and sums of
    like size.
    """
    x, w = (np.pad(a, ((0, 0), (0, -a.shape[1] % 32))).astype(np.float64) for a in (x, w))
    total = np.zeros((x.shape[0], w.shape[0]), np.float32)
    for k in range(0, x.shape[1], 32):
        halves = []
        for parity in (0, 1):
            chain = np.zeros_like(total)
            for i in range(k + parity, k + 32, 2):
                chain = (x[:, i, None] * w[None, :, i] + chain).astype(np.float32)
            halves.append(chain)
        total = total + (halves[0] + halves[1])
    return total


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_order(dtype, body):
    rng = np.random.default_rng(1)
    x, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((7, 4 * 90), (4, 21, 90)))
    zero = jnp.zeros((7, 21), jnp.float32)
    found = calls.added(zero, x, w, None, calls.Live(jnp.int32(7), 1), body)
    x, w = np.asarray(x, np.float32).reshape(7, 4, 90), np.asarray(w, np.float32)
    leaves = [in_order(x[:, leaf], w[leaf]) for leaf in range(4)]
    assert same(found, (leaves[0] + leaves[1]) + (leaves[2] + leaves[3]))


@pytest.mark.parametrize("body", BODIES)
def test_subnormals_are_zero(body):
    """As AMX takes them, whatever the thread's settings: those that are read, and those that would come out."""
    tiny, huge = 2.0**-130, 2.0**120
    x = jnp.asarray([[tiny] * 32, [huge] * 32, [2.0**-100] * 32, [2.0**-63] * 32], jnp.bfloat16)
    w = jnp.asarray([[[huge] * 32, [tiny] * 32, [2.0**-30] * 32, [2.0**-63] * 32]], jnp.bfloat16)
    run = lambda: np.asarray(calls.added(jnp.zeros((4, 4)), x, w, None, calls.Live(jnp.int32(4), 1), body))
    found = run()
    assert (found[0] == 0).all() and (found[:, 1] == 0).all(), "read"
    assert found[2, 2] == 0 and found[3, 3] == 2.0**-121, "a chain of products that underflow, and one that does not"
    assert bits(run()).tolist() == bits(found).tolist()


@pytest.mark.parametrize("body", BODIES)
def test_rows_that_are_padding(body):
    """They are not read; zeros stand up to the end of the tile."""
    c = case("bfloat16", *SHAPES[0], body)
    whole, count = dict(c.whole), 19
    kept, c.x = c.x, np.where(np.arange(ROWS)[:, None] < count, c.x, np.nan).astype(np.float32)
    try:
        for name in ("outputs", "gated"):
            found = np.asarray(c.run[name](slice(None), count))
            assert same(found[:count], whole[name][:count]) and (bits(found[count:24]) == 0).all(), name
            c.run[name](slice(0, 24), 0).block_until_ready()  # none are live: a division by 0 would end the process
    finally:
        c.x = kept


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_fresh(dtype, body):
    """They are not read, and get the logits of the last fresh one before them, which row 0 always is."""
    c, rng = case(dtype, *SHAPES[1], body), np.random.default_rng(3)
    patterns = [rng.random(ROWS) < share for share in (0.0, 0.1, 0.5, 0.9, 1.0)]
    patterns += [np.arange(32) < 20, np.arange(32) % 16 == 0, np.zeros(1, bool)]
    for fresh in patterns:
        fresh, count = np.where(np.arange(len(fresh)) == 1, False, fresh), len(fresh)
        is_read = fresh | (np.arange(count) == 0)
        x = np.where(is_read[:, None], c.x[:count], np.nan).astype(np.float32)
        found = calls.logits(x, c.norm, EPS, c.w, fresh, body)
        assert same(found, c.whole["logits"][np.maximum.accumulate(np.where(is_read, np.arange(count), 0))])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_embedding(dtype):
    table = jnp.asarray(np.random.default_rng(2).normal(size=(2, 50, 37)), dtype)
    ids = jnp.asarray([0, 99, 50, 7, 7, 3], jnp.int32)
    found = calls.embed(table, ids, calls.Live(jnp.int32(5), 6))
    assert same(found[:5], table.reshape(100, 37)[ids[:5]].astype(jnp.float32)) and (bits(found[5]) == 0).all()
