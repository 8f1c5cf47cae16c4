"""What benchmarks/accelerator.py compares: kernels, interpreted here, and operations of XLA that compute the same."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from pallas_kernels.cases.attention import AttentionCase
from pallas_kernels.cases.draw import DrawCase
from pallas_kernels.cases.grouped_matmul import GroupedCase
from pallas_kernels.cases.matmul import MatmulCase
from pallas_kernels.implementations import choose

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
DECODING = AttentionCase((40, 40), dtype="float32")
ATTENTION = (DECODING, dataclasses.replace(DECODING, chunk=20, window=10))
CASES = {
    "attention": ATTENTION,
    "kv_write": (dataclasses.replace(DECODING, chunk=24),),
    "matmul": (MatmulCase(9, 200, 96, "float32"),),
    "grouped": (GroupedCase((3, 0, 5), 200, 96, "float32"),),
    "draw": (DrawCase(5, 256),),
}


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kernel_rows

    monkeypatch.setattr(kernel_rows, "WRITES", 2)
    return kernel_rows


KINDS = [kind if kind in ("kv_write", "matmul") else pytest.param(kind, marks=pytest.mark.long) for kind in CASES]


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_compute_the_same(rows, kind):
    for row in getattr(rows, f"{kind}_rows")(choose("pallas_interpret"), CASES[kind]):
        ours, theirs = jax.tree.leaves(row.ours(*row.operands)), jax.tree.leaves(row.theirs(*row.their_operands))
        if kind == "attention":  # blocks of 16 queries, of which the last may be short
            theirs = [theirs[0].reshape(-1, *theirs[0].shape[2:])]
            counts = np.asarray(row.operands[2].counts)
            ours = [np.concatenate([block[:count] for block, count in zip(np.asarray(ours[0]), counts, strict=True)])]
        assert row.moved > 0 and len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-4)


def test_work_is_counted_as_it_is(rows):
    """Two sequences of 40 tokens, 4 heads and 2 key-value heads of 32, in float32."""
    one, windowed = (next(rows.attention_rows(choose("xla"), [case])) for case in ATTENTION)
    query, key = 4 * 32 * 4, 2 * 32 * 4  # bytes
    assert one.flops == 4 * (2 * 40) * 4 * 32 and one.moved == 2 * 2 * 40 * key + 2 * 2 * query
    assert windowed.flops == 4 * (2 * 20 * 10) * 4 * 32
    assert windowed.moved == 2 * 2 * (20 + 9) * key + 2 * (2 * 32) * query
