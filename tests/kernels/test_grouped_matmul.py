"""The grouped product: every body against float64, and a row's bits whichever rows and experts are beside it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cases.grouped_matmul import SMALL, GroupedCase
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul_gpu import grouped_matmul_gpu
from pallas_kernels.grouped_matmul_reference import visits_of
from pallas_kernels.implementations import choose
from pallas_kernels.sizes import MatmulSizes

LONG = pytest.mark.long
CASES = [case if case in (SMALL[1], SMALL[6]) else pytest.param(case, marks=LONG) for case in SMALL]
GPU_SIZES = MatmulSizes(rows=16, columns=64, depth=64, shared_tiles=1, split=128)
EPS = float(jnp.finfo(jnp.float32).eps)


def same_bits(a, b) -> bool:
    return np.array_equal(np.asarray(a, np.float32).view(np.uint32), np.asarray(b, np.float32).view(np.uint32))


def reference(case: GroupedCase, x, w) -> tuple[np.ndarray, np.ndarray]:
    """(result, bound on its rounding) in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    out, bound, first = np.zeros((case.rows, case.width)), np.zeros((case.rows, case.width)), 0
    for expert, size in enumerate(case.sizes):
        rows = slice(first, first + size)
        sums, error = x[rows] @ w[expert].T, case.inputs * EPS * (np.abs(x[rows]) @ np.abs(w[expert]).T)
        if case.gated:
            (gate, up), (gate_error, up_error) = np.split(sums, 2, axis=1), np.split(error, 2, axis=1)
            silu = gate / (1 + np.exp(-gate))
            error = 1.1 * gate_error * np.abs(up) + np.abs(silu) * up_error + 8 * EPS * np.abs(silu * up)
            sums = silu * up
        out[rows], bound[rows], first = sums, error, first + size
    return out, bound


@functools.cache
def jitted(body: type) -> Callable:
    """One jitted function a body, so that its tests share what is compiled."""
    return jax.jit(body().run, static_argnums=0)


class Body:
    """What every implementation must hold. A subclass says how it runs."""

    def run(self, case: GroupedCase, x, w, sizes):
        raise NotImplementedError

    @property
    def jitted(self):
        return jitted(type(self))

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_result_is_within_rounding_of_float64(self, case):
        x, w, sizes = case.operands()
        expected, error = reference(case, x, w)
        assert (np.abs(np.asarray(self.jitted(case, x, w, sizes), np.float64) - expected) <= error).all()

    @pytest.mark.parametrize(
        "case", (pytest.param(SMALL[0], marks=LONG), SMALL[1], pytest.param(SMALL[4], marks=LONG)), ids=str
    )
    def test_a_row_has_the_same_bits_with_any_rows_beside_it(self, case):
        x, w, sizes = case.operands()
        whole = self.jitted(case, x, w, sizes)
        experts = np.repeat(np.arange(len(case.sizes)), case.sizes)
        for taken in ([7], [20], range(3, 23)):
            taken = np.array(taken)
            some = jnp.array(np.bincount(experts[taken], minlength=len(case.sizes)), jnp.int32)
            part = self.jitted(case, x[taken], w, some)
            assert same_bits(part, whole[taken]), f"rows {taken} differ from those in the whole batch"

    def test_other_experts_are_not_read(self):
        case = SMALL[1]
        x, w, sizes = case.operands()
        poisoned = jnp.full_like(w, jnp.nan).at[2].set(w[2])
        mine = slice(15, 32)  # rows of expert 2
        found = self.jitted(case, x.at[:15].set(jnp.nan), poisoned, sizes)
        assert same_bits(found[mine], self.jitted(case, x, w, sizes)[mine])


class TestReference(Body):
    implementation = choose("xla")

    def run(self, case, x, w, sizes):
        return grouped_matmul(x, w, sizes, gated=case.gated, implementation=self.implementation)

    @pytest.mark.parametrize("case", (pytest.param(SMALL[1], marks=LONG), SMALL[6]), ids=str)
    def test_gradients_are_those_of_float32(self, case):
        x, w, sizes = case.operands()
        weight = jax.random.normal(jax.random.key(9), (case.rows, case.width))

        def loss(x, w):
            out = self.run(case, x, w, sizes)
            return (out * weight).sum(), out

        (_, value), found = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, w)
        assert same_bits(value, self.jitted(case, x, w, sizes)), "the value inside value_and_grad is another"
        widened = x.astype(jnp.float32), w.astype(jnp.float32)
        expected = jax.grad(lambda x, w: (dense_float32(case, x, w) * weight).sum(), (0, 1))(*widened)
        for f, e in zip(found, expected, strict=True):
            tolerance = float(jnp.abs(e).max()) * (1e-2 if f.dtype == jnp.bfloat16 else 1e-5)
            np.testing.assert_allclose(f.astype(jnp.float32), e, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["xla", "pallas_interpret", "pallas_gpu_interpret"])
def test_leaves_are_products_of_their_own(name):
    case = SMALL[5]
    (x, w, sizes), (y, v, _) = case.operands(), case.operands(seed=1)
    product = jax.jit(functools.partial(grouped_matmul, gated=True, implementation=choose(name)))
    both = product(jnp.stack([x, y]), jnp.stack([w, v]), sizes)
    assert same_bits(both, jnp.stack([product(x, w, sizes), product(y, v, sizes)]))


def dense_float32(case, x, w):
    """Expert by expert, in plain float32."""
    parts, first = [], 0
    for expert, size in enumerate(case.sizes):
        y = jnp.dot(x[first : first + size], w[expert].T, precision="highest")
        parts.append(jax.nn.silu(y[:, : case.width]) * y[:, case.width :] if case.gated else y)
        first += size
    return jnp.concatenate([*parts, jnp.zeros((case.rest, case.width))])


visits_jitted = jax.jit(visits_of, static_argnums=(1, 2))


class TestTpuBody(TestReference):
    implementation = choose("pallas_interpret")


class TestGpuBody(Body):
    def run(self, case, x, w, sizes):
        parts = 2 if case.gated else 1
        in_parts = w.reshape(w.shape[0], parts, -1, w.shape[2])
        return grouped_matmul_gpu(x, in_parts, sizes, GPU_SIZES, jnp.dtype(jnp.float32), interpret=True)


@pytest.mark.parametrize(
    "sizes", [(5, 0, 17, 1, 20), (0,) * 5, (16, 16, 0, 0, 0), (0, 0, 1, 0, 0), (0, 71, 0, 0, 0), (3, 3, 3, 3, 0)]
)
def test_visits_cover_every_row_once(sizes):
    tile = 8
    visits = visits_jitted(jnp.array(sizes, jnp.int32), 71, tile)
    seen = []
    for tile_index, start, end in zip(visits.tiles.tolist(), visits.starts, visits.ends, strict=True):
        seen += [row for row in range(tile_index * tile, (tile_index + 1) * tile) if start <= row < end]
    pairs = {(row // tile, expert) for row, expert in enumerate(np.repeat(np.arange(5), sizes))}
    assert int(visits.count) == len(pairs), "no visit without a row"
    assert sorted(seen) == list(range(sum(sizes))), "each row belongs to one visit"
    assert (np.diff(np.asarray(visits.tiles)) >= 0).all(), "visits of a tile follow each other"


def test_errors():
    x, w, xla = jnp.ones((3, 8)), jnp.ones((2, 4, 8)), choose("xla")
    for found, sizes, weights in (
        (r"w \[leaf, E, N, K\], got \(3, 8\), \(2, 4, 8\) and \(3,\)", jnp.ones(3, jnp.int32), w),
        (r"got \(3, 8\), \(1, 2, 4, 8\) and \(2,\)", jnp.ones(2, jnp.int32), w[None]),
        ("group_sizes must be integers, got float32", jnp.ones(2), w),
        ("N must be even, got 3", jnp.ones(2, jnp.int32), w[:, :3]),
    ):
        with pytest.raises(ValueError, match=found):
            grouped_matmul(x, weights, sizes, gated=True, implementation=xla)
