"""Paged attention: every body against float64; a query's bits alone, in a batch, in other chunks, pages and splits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cases.attention import DECODE, GROUPS, PREFILL, AttentionCase, with_padding
from pallas_kernels.implementations import choose
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention_gpu import paged_attention_gpu
from pallas_kernels.paged_attention_inputs import PagedBlocks, Pages, Scoring
from pallas_kernels.paged_attention_softmax import combine, empty, fold, lane_sum
from pallas_kernels.sizes import INTERPRETED
from pallas_kernels.sizes_attention import attention_sizes

LONG = AttentionCase((131, 20), chunk=24, dtype="bfloat16", num_heads=6)


def reference(case: AttentionCase, tokens, pages: Pages, tables: np.ndarray) -> list[np.ndarray]:
    """Attention of every position of each sequence, [length, H, h] in float64, over the numbers that the pages hold."""
    results, group = [], case.num_heads // case.num_kv_heads
    widened = [np.asarray(pool.astype(jnp.float32), np.float64) for pool in pages[:2]]
    if pages.key_scales is not None:
        widened = [x * np.asarray(s, np.float64)[..., None, None] for x, s in zip(widened, pages[2:], strict=True)]
    for slot, length in enumerate(case.lengths):
        keys, values = (
            x[tables[slot]].swapaxes(1, 2).reshape(-1, *x.shape[1::2])[:length, :, : case.head_dim].repeat(group, 1)
            for x in widened
        )
        scores = np.einsum("qhd,khd->hqk", np.asarray(tokens[0][slot, :length], np.float64), keys) * case.head_dim**-0.5
        scores = scores if case.soft_cap is None else case.soft_cap * np.tanh(scores / case.soft_cap)
        distance = np.arange(length)[:, None] - np.arange(length)
        scores = np.where((distance >= 0) & (distance < (case.window or length + 1)), scores, -np.inf)
        sinks = np.full(case.num_heads, -np.inf) if case.sinks() is None else np.asarray(case.sinks())
        sinks = np.broadcast_to(sinks[:, None, None], (case.num_heads, length, 1))
        scores = np.concatenate([scores, sinks], -1)
        weights = np.exp(scores - scores.max(-1, keepdims=True, initial=-1e9))
        results.append(np.einsum("hqk,khd->qhd", weights[..., :-1] / weights.sum(-1, keepdims=True), values))
    return results


def rounding(case: AttentionCase) -> float:
    """How far rounding queries and weights to the dots' dtype may move a result: scores and values are below 4."""
    return {"float32": 4e-6, "float16": 6e-3}.get(case.dtype, 5e-2)


def long(*values) -> list:
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


@functools.cache
def jitted(body: type):
    return jax.jit(body().run, static_argnums=0)


@functools.cache
def computed(body: type, case: AttentionCase, r: int, slots: tuple[int, ...] | None) -> dict:
    tokens = case.tokens()
    pages, _ = case.pages(*tokens[1:])
    blocks, rows = case.blocks(r, slots)
    out = np.asarray(jitted(body)(case.scoring, case.queries(tokens[0], rows, r), pages, blocks, case.sinks()))
    assert out.dtype == np.float32
    for b, (_, _, count) in enumerate(rows):
        assert not out[b, count:].any(), "a token past the count has a result"
    return {(slot, start + t): out[b, t] for b, (slot, start, count) in enumerate(rows) for t in range(count)}


class Body:
    """What every implementation must hold. A subclass says how it runs."""

    def run(self, scoring: Scoring, q, pages: Pages, blocks: PagedBlocks, sinks):
        raise NotImplementedError

    def rows_of(self, case: AttentionCase, r: int, slots: tuple[int, ...] | None = None) -> dict:
        """(slot, position) -> the query's result, computed in blocks of r."""
        return computed(type(self), case, r, slots)

    def check(self, case: AttentionCase, r: int) -> None:
        tokens = case.tokens()
        expected = reference(case, tokens, *case.pages(*tokens[1:]))
        found = self.rows_of(case, r)
        assert len(found) == sum(min(case.chunk, length) for length in case.lengths)
        for (slot, position), row in found.items():
            error = np.abs(row - expected[slot][position]).max()
            assert error <= rounding(case), f"off by {error} at sequence {slot}, position {position}"

    @pytest.mark.parametrize("case", [*long(*DECODE[:3]), *DECODE[3:]], ids=str)
    def test_decode_is_within_rounding_of_float64(self, case):
        self.check(case, 1)

    @pytest.mark.parametrize("case", [*long(PREFILL[0]), *PREFILL[1:]], ids=str)
    def test_prefill_is_within_rounding_of_float64(self, case):
        self.check(case, 16)

    @pytest.mark.parametrize("case", [GROUPS[0], GROUPS[6], *long(*GROUPS[1:6], *GROUPS[7:])], ids=str)
    def test_every_group_size(self, case):
        self.check(case, 1)

    @pytest.mark.parametrize("case", [DECODE[1], *long(DECODE[0], DECODE[2])], ids=str)
    def test_a_query_alone_has_the_bits_of_a_batch(self, case):
        together = self.rows_of(case, 1)
        for slot in (1, 2, 9):
            assert_same_bits(self.rows_of(case, 1, (slot,)), together)
        assert_same_bits(self.rows_of(case, 1, (8, 3, 8, 4)), together)

    @pytest.mark.parametrize("r", (24, *long(4)))
    def test_chunks_of_any_length_have_the_bits_of_decoding(self, r):
        assert_same_bits(self.rows_of(LONG, r), self.rows_of(LONG, 1))

    def test_page_sizes_have_the_same_bits(self):
        assert_same_bits(self.rows_of(dataclasses.replace(LONG, page_size=32), 8), self.rows_of(LONG, 8))

    def test_a_window_has_the_bits_of_chunks_too(self):
        """Blocks of other lengths begin at other tiles and splits."""
        windowed = dataclasses.replace(LONG, window=40, has_sinks=True, chunk=90)
        assert_same_bits(self.rows_of(windowed, 24), self.rows_of(windowed, 1))


def assert_same_bits(some: dict, others: dict) -> None:
    assert some
    for at, row in some.items():
        same = np.array_equal(row.view(np.uint32), others[at].view(np.uint32))
        assert same, f"other bits at (sequence, position) {at}"


class TestReference(Body):
    implementation = choose("xla")

    def run(self, scoring, q, pages, blocks, sinks):
        return paged_attention(q, pages, blocks, scoring=scoring, sinks=sinks, implementation=self.implementation)


@pytest.mark.long
class TestTpuBody(TestReference):
    implementation = choose("pallas_interpret")

    def test_page_sizes_below_a_memory_tile_are_refused(self):
        case = AttentionCase((5,), page_size=8, dtype="bfloat16")
        with pytest.raises(ValueError, match="page size of a bfloat16 cache must be a multiple of 16, got 8"):
            self.rows_of(case, 1)


@pytest.mark.long
class TestGpuBody(Body):
    side_by_side = False

    def run(self, scoring, q, pages, blocks, sinks):
        sizes = attention_sizes(INTERPRETED, pages.keys.dtype, pages.keys.shape[3])
        return paged_attention_gpu(
            q, pages, blocks, sinks, scoring, sizes, interpret=True, side_by_side=self.side_by_side
        )

    def test_head_widths_that_triton_lacks_are_refused(self):
        with pytest.raises(ValueError, match="head widths 16, 32, 64, 128, 256, got 48"):
            self.rows_of(AttentionCase((5,), head_dim=48), 1)


class TestGpuBodySideBySide(TestGpuBody):
    side_by_side = True

    @pytest.mark.parametrize("case", (*DECODE, LONG), ids=str)
    def test_splits_side_by_side_have_the_bits_of_splits_in_turn(self, case):
        assert_same_bits(self.rows_of(case, 4), TestGpuBody().rows_of(case, 4))


def test_the_running_maximum_is_whole_and_a_tile_that_no_row_sees_changes_no_bit():
    scores, values = jnp.asarray(np.random.RandomState(0).randn(16, 32), jnp.float32), jnp.ones((32, 8))
    seen = jnp.ones((16, 32), bool)
    some = fold(empty(16, 8), scores, seen, values, None, lane_sum)
    assert np.array_equal(some.high, np.ceil(np.asarray(scores).max(-1, keepdims=True)))
    unseen = fold(some, scores, ~seen, values, None, lane_sum)
    for same in (unseen, combine(some, empty(16, 8)), combine(empty(16, 8), some)):
        for a, b in zip(some, same, strict=True):
            assert np.array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


QUICK = AttentionCase((71, 3), chunk=8, dtype="bfloat16", num_heads=6, has_sinks=True)


@pytest.mark.parametrize("body", (TestTpuBody, TestGpuBody, TestGpuBodySideBySide))
def test_every_body_in_short(body):
    body().check(QUICK, 8)
    assert_same_bits(body().rows_of(QUICK, 8), body().rows_of(QUICK, 1))


@pytest.mark.parametrize("num_blocks", (1, 3))
def test_blocks_of_padding_change_no_bit(num_blocks):
    """The same program for one block and for three; its blocks of padding are not computed."""
    tokens = QUICK.tokens()
    pages, _ = QUICK.pages(*tokens[1:])
    blocks, rows = QUICK.blocks(8, (0, 1, 0)[:num_blocks])
    q, padded = with_padding(QUICK.queries(tokens[0], rows, 8), blocks, 4 - num_blocks)
    out = np.asarray(jitted(TestTpuBody)(QUICK.scoring, q, pages, padded, QUICK.sinks()))
    expected = computed(TestTpuBody, QUICK, 8, None)
    assert np.isnan(out[num_blocks:]).all()
    for b, (slot, start, count) in enumerate(rows):
        assert_same_bits({(slot, start + t): out[b, t] for t in range(count)}, expected)
