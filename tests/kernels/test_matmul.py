"""The matrix product: every body against float64, and a row alone against the same row in a batch, by bits."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cases.matmul import SMALL, MatmulCase
from pallas_kernels.implementations import choose
from pallas_kernels.matmul import matmul
from pallas_kernels.matmul_gpu import matmul_gpu
from pallas_kernels.sizes import MatmulSizes, matmul_sizes

# Three splits or more, of two steps each.
GPU_SIZES = MatmulSizes(rows=16, columns=64, depth=64, shared_tiles=1, split=128)
EPS = float(jnp.finfo(jnp.float32).eps)
BATCHES = (slice(0, 1), slice(5, 6), slice(36, 37), slice(3, 19))
LONG = pytest.mark.long
CASES = [case if case in (SMALL[0], SMALL[3], SMALL[9]) else pytest.param(case, marks=LONG) for case in SMALL]


def same_bits(a, b) -> bool:
    return np.array_equal(np.asarray(a, np.float32).view(np.uint32), np.asarray(b, np.float32).view(np.uint32))


def reference(case: MatmulCase, x, w, bias, residual) -> tuple[np.ndarray, np.ndarray]:
    """(result, bound on its rounding) in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    sums, size = x @ w.T, np.abs(x) @ np.abs(w).T
    if bias is not None:
        sums, size = sums + np.asarray(bias, np.float64), size + np.abs(np.asarray(bias, np.float64))
    error = case.inputs * EPS * size
    if case.gated:
        (gate, up), (gate_error, up_error) = np.split(sums, 2, axis=1), np.split(error, 2, axis=1)
        silu = gate / (1 + np.exp(-gate))
        sums, error = silu * up, 1.1 * gate_error * np.abs(up) + np.abs(silu) * up_error + 8 * EPS * np.abs(silu * up)
    if residual is not None:
        sums, error = sums + np.asarray(residual, np.float64), error + EPS * np.abs(residual)
    return sums, error


@functools.cache
def jitted(body: type) -> Callable:
    """One jitted function a body, so that its tests share what is compiled."""
    return jax.jit(body().run, static_argnums=0)


class Body:
    """What every implementation must hold. A subclass says how it runs."""

    def run(self, case: MatmulCase, x, w, bias, residual):
        raise NotImplementedError

    @property
    def jitted(self):
        return jitted(type(self))

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_result_is_within_rounding_of_float64(self, case):
        operands = case.operands()
        expected, error = reference(case, *operands)
        assert (np.abs(np.asarray(self.jitted(case, *operands), np.float64) - expected) <= error).all()

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_a_row_has_the_same_bits_in_any_batch(self, case):
        x, w, bias, residual = case.operands()
        whole = self.jitted(case, x, w, bias, residual)
        for rows in BATCHES:
            part = self.jitted(case, x[rows], w, bias, None if residual is None else residual[rows])
            assert same_bits(part, whole[rows]), f"rows {rows} alone differ from those in a batch of {len(x)}"

    def test_rows_beside_are_not_read(self):
        case = SMALL[0]
        x, w, *_ = case.operands()
        poisoned = jnp.full_like(x, jnp.nan).at[7].set(x[7])
        assert same_bits(self.jitted(case, poisoned, w, None, None)[7], self.jitted(case, x, w, None, None)[7])

    def test_a_row_has_the_same_bits_in_any_place(self):
        case = SMALL[0]
        x, w, *_ = case.operands()
        order = np.random.RandomState(0).permutation(len(x))
        assert same_bits(self.jitted(case, x[order], w, None, None), self.jitted(case, x, w, None, None)[order])


class TestReference(Body):
    implementation = choose("xla")

    def run(self, case, x, w, bias, residual):
        return matmul(x, w, bias=bias, residual=residual, gated=case.gated, implementation=self.implementation)

    @pytest.mark.parametrize(
        "case", [case if case is SMALL[3] else pytest.param(case, marks=pytest.mark.long) for case in SMALL], ids=str
    )
    def test_gradients_are_those_of_float32(self, case):
        operands = case.operands()
        weight = jax.random.normal(jax.random.key(9), (case.rows, case.width))

        def loss(some):
            out = self.run(case, *some)
            return (out * weight).sum(), out

        (_, value), found = jax.jit(jax.value_and_grad(loss, has_aux=True))(operands)
        assert same_bits(value, self.jitted(case, *operands)), "the value inside value_and_grad is another"
        widened = jax.tree.map(lambda a: a.astype(jnp.float32), operands)
        expected = jax.grad(lambda some: (plain_float32(case, *some) * weight).sum())(widened)
        for f, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            tolerance = float(jnp.abs(e).max()) * (1e-2 if f.dtype == jnp.bfloat16 else 1e-5)
            np.testing.assert_allclose(f.astype(jnp.float32), e, rtol=0, atol=tolerance)

    @pytest.mark.parametrize("shared", (False, True))
    def test_leaves_have_the_bits_of_each_alone(self, shared):
        """The decoder's weights have a leading leaf axis; x is each leaf's own, or the same for all."""
        case = SMALL[4]
        some, others = case.operands(), case.operands(seed=1)
        others = (some[0] if shared else others[0], *others[1:])
        leaves = [jnp.stack(pair) for pair in zip(some, others, strict=True)]
        found = self.jitted(case, some[0] if shared else leaves[0], *leaves[1:])
        assert same_bits(found, jnp.stack([self.jitted(case, *some), self.jitted(case, *others)]))

    def test_gradients_of_leaves(self):
        case, weight = SMALL[9], jax.random.normal(jax.random.key(9), (2, 37, 48))
        x, *own = jax.tree.map(lambda *leaves: jnp.stack(leaves), case.operands(), case.operands(seed=1))

        def loss(run, x, *own):
            return (run(x, *own) * weight).sum()

        shared = jax.vmap(functools.partial(plain_float32, case), in_axes=(None, 0, 0, 0))
        ours = functools.partial(self.run, case)
        found, expected = (jax.grad(functools.partial(loss, run), (0, 1, 2, 3))(x[0], *own) for run in (ours, shared))
        for f, e in zip(found, expected, strict=True):
            np.testing.assert_allclose(f, e, rtol=0, atol=1e-5 * float(jnp.abs(e).max()))


def plain_float32(case, x, w, bias, residual):
    y = jnp.dot(x, w.T, precision="highest")
    y = y if bias is None else y + bias
    y = jax.nn.silu(y[:, : case.width]) * y[:, case.width :] if case.gated else y
    return y if residual is None else y + residual


class TestTpuBody(TestReference):
    implementation = choose("pallas_interpret")


class TestGpuBody(Body):
    side_by_side = False

    def run(self, case, x, w, bias, residual):
        parts = 2 if case.gated else 1
        return matmul_gpu(
            x,
            w.reshape(parts, -1, w.shape[1]),
            None if bias is None else bias.reshape(parts, -1),
            residual,
            GPU_SIZES,
            jnp.dtype(jnp.float32),
            interpret=True,
            side_by_side=self.side_by_side,
        )


class TestGpuBodySideBySide(TestGpuBody):
    side_by_side = True

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_splits_in_parallel_have_the_bits_of_splits_in_turn(self, case):
        operands = case.operands()
        assert same_bits(self.jitted(case, *operands), jitted(TestGpuBody)(case, *operands))


class TestErrors:
    def test_shapes(self):
        x, w = jnp.ones((3, 8)), jnp.ones((4, 8))
        for message, weights, given in (
            (r"takes x \[M, K\] and w \[N, K\].*, got \(3, 8\) and \(4, 7\)", w[:, :7], {}),
            (r"got \(3, 8\) and \(4, 8, 1\)", w[..., None], {}),
            ("N must be even, got 3", w[:3], dict(gated=True)),
            (r"bias must be \[4\]", w, dict(bias=jnp.ones(3))),
            (r"residual must be \[3, 4\]", w, dict(residual=jnp.ones((3, 5)))),
            ("takes weights in bfloat16 or float32, got float16", w.astype(jnp.float16), {}),
        ):
            with pytest.raises(ValueError, match=message):
                matmul(x, weights, implementation=choose("xla"), **given)

    def test_implementations_are_chosen_by_name_and_logged(self, caplog):
        with pytest.raises(ValueError, match="unknown implementation 'palas_tpu', did you mean 'pallas_tpu'"):
            choose("palas_tpu")
        with pytest.raises(ValueError, match="'pallas_tpu' needs a tpu, the device is 'NVIDIA H100 80GB HBM3'"):
            choose("pallas_tpu", "NVIDIA H100 80GB HBM3")
        with pytest.raises(ValueError, match="no block sizes for device 'TPU v9'"):
            choose("pallas_tpu", "TPU v9")
        with caplog.at_level("INFO", "pallas_kernels"):
            choose("pallas_tpu", "TPU v5 lite")
        assert caplog.messages == ["kernels: pallas_tpu with the block sizes of TPU v5e"]

    def test_sizes_depend_on_geometry_and_never_on_the_batch(self):
        of_v5e = functools.partial(matmul_sizes, "TPU v5e", jnp.dtype("bfloat16"))
        for outputs, inputs, parts, expected in (
            (4096, 1024, 1, (1024, 1024)),
            (3072, 1024, 2, (512, 1024)),
            (4096, 3 * 768, 1, (1408, 768)),  # a depth that divides K is taken
            (4096, 1152, 1, (2048, 640)),  # none does: as many steps as there must be
            (4096, 128, 1, (2048, 128)),
            (100, 100, 1, (128, 128)),
        ):
            sizes = of_v5e(outputs, inputs, parts)
            assert (sizes.columns, sizes.depth) == expected


def test_the_gradient_of_rows_that_leaves_share_is_added_by_the_tree():
    """So that it does not know which of the leaves are here (sharding/leaves.py)."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (20, 72)), jax.random.normal(keys[1], (4, 48, 72))
    weight = jax.random.normal(keys[2], (4, 20, 48))

    @jax.jit
    def gradient(x, w, weight):
        return jax.grad(lambda x: (matmul(x, w, implementation=choose("pallas_interpret")) * weight).sum())(x)

    a, b, c, d = (gradient(x, w[i : i + 1], weight[i : i + 1]) for i in range(4))
    assert same_bits(gradient(x, w, weight), (a + b) + (c + d))
