"""The KV write: every body moves the same bits to the same places, and touches nothing else."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cases.attention import AttentionCase
from pallas_kernels.implementations import Implementation, choose
from pallas_kernels.kv_write import BODIES, kv_write
from pallas_kernels.kv_write_gpu import kv_write_gpu
from pallas_kernels.paged_attention_inputs import EIGHT_BIT, PagedBlocks, Pages

DTYPES = ("bfloat16", "float32", "float16", *EIGHT_BIT)
CASES = tuple(
    AttentionCase((38, 0, 1, 70), chunk=chunk, page_size=32, dtype=dtype)
    for chunk, dtype in (
        (1, "bfloat16"),
        (22, "bfloat16"),
        (22, "float32"),
        (22, "float16"),
        *((22, dtype) for dtype in EIGHT_BIT),
    )
)


def bits(x) -> np.ndarray:
    return np.asarray(x).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def expected(pages: Pages, k: np.ndarray, v: np.ndarray, tables: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """The pools' bits, written token by token."""
    pools = [bits(pages.keys).copy(), bits(pages.values).copy()]
    for b, (slot, start, count) in enumerate(rows):
        for t in range(count):
            page, offset = tables[slot, (start + t) // pages.keys.shape[2]], (start + t) % pages.keys.shape[2]
            for pool, x, scales in zip(pools, (k, v), (pages.key_scales, pages.value_scales), strict=True):
                own = None if scales is None else np.asarray(scales[page])
                pool[page, :, offset] = bits(stored(x[b, t], pages.keys.dtype, own))
    return pools


def stored(x: np.ndarray, dtype: jnp.dtype, scales: np.ndarray | None) -> np.ndarray:
    if scales is None:
        return x.astype(dtype)
    scaled = x / scales[:, None]
    if dtype == jnp.int8:
        return np.clip(np.rint(scaled), -127, 127).astype(dtype)
    largest = float(jnp.finfo(dtype).max)
    return np.clip(scaled, -largest, largest).astype(dtype)


class Body:
    """What every implementation must hold. A subclass says how it runs."""

    def run(self, pages: Pages, k, v, blocks: PagedBlocks) -> Pages:
        raise NotImplementedError

    def check(self, case: AttentionCase, r: int) -> None:
        tokens = case.tokens()
        pages, tables = case.pages(*tokens[1:])
        blocks, rows = case.blocks(r)
        # Other numbers than the pages hold, some too large for 8 bits. Rows past a count are 7, not NaN, because
        # the engine's are finite too.
        new = [np.nan_to_num(case.queries(5 * x[:, :, ::-1], rows, r), nan=7.0) for x in tokens[1:]]
        given = new if pages.key_scales is not None else [x.astype(case.dtype) for x in new]
        found = jax.jit(self.run)(pages, *given, blocks)
        for pool, wanted in zip(found[:2], expected(pages, *map(np.asarray, new), tables, rows), strict=True):
            assert np.array_equal(bits(pool), wanted)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_only_the_tokens_rows_change(self, case):
        self.check(case, 8 if case.chunk > 1 else 1)

    def test_blocks_that_share_a_memory_tile(self):
        self.check(CASES[1], 2)

    def test_pages_are_updated_in_place_where_they_are_donated(self):
        case = CASES[0]
        pages, _ = case.pages(*case.tokens()[1:])
        blocks, _ = case.blocks(1)
        k = jnp.ones((blocks.slots.shape[0], 1, *case.shape[2:]), case.dtype)
        memory = jax.jit(self.run, donate_argnums=0).lower(pages, k, k, blocks).compile().memory_analysis()
        assert memory.alias_size_in_bytes == pages.keys.nbytes + pages.values.nbytes


class TestReference(Body):
    implementation = choose("xla")

    def run(self, pages, k, v, blocks):
        return kv_write(pages, k, v, blocks, implementation=self.implementation)

    def test_narrow_heads_are_filled_with_zeros(self):
        case = dataclasses.replace(CASES[0], page_width=64)
        pages, tables = case.pages(*case.tokens()[1:])
        blocks, _ = case.blocks(1)
        k = jnp.full((blocks.slots.shape[0], 1, *case.shape[2:]), jnp.nan, case.dtype)
        found = self.run(pages, k, k, blocks)
        row = np.asarray(found.keys[tables[0, 1], :, 5], np.float32)  # of token 37
        assert np.isnan(row[:, :32]).all() and not row[:, 32:].any()


@pytest.mark.long
class TestTpuBody(TestReference):
    implementation = choose("pallas_interpret")


@pytest.mark.long
class TestGpuBody(Body):
    def run(self, pages, k, v, blocks):
        with mock.patch.dict(BODIES, pallas_interpret=functools.partial(kv_write_gpu, interpret=True)):
            return kv_write(pages, k, v, blocks, implementation=choose("pallas_interpret"))


@pytest.mark.parametrize("body", (TestTpuBody, TestGpuBody))
def test_every_body_in_short(body):
    body().check(AttentionCase((20, 3), chunk=6, dtype="bfloat16"), 2)


class TestErrors:
    @pytest.mark.parametrize(
        "message, shape, dtype",
        (
            (r"k and v must be \[B, r, 2, h\] with h at most the pages' width of 32", (4, 1, 3, 32), "bfloat16"),
            ("k and v must have the pages' dtype bfloat16, got float32", (4, 1, 2, 32), "float32"),
        ),
    )
    def test_shapes_and_dtypes(self, message, shape, dtype):
        case = CASES[0]
        pages, _ = case.pages(*case.tokens()[1:])
        k = jnp.ones(shape, dtype)
        with pytest.raises(ValueError, match=message):
            kv_write(pages, k, k, case.blocks(1)[0], implementation=choose("xla"))

    def test_what_a_tpu_cannot_copy(self):
        tpu = Implementation("pallas_tpu", "TPU v5e")
        for found, case in (
            ("width|wide, got 32", CASES[0]),
            ("float16 pages", dataclasses.replace(CASES[3], page_width=128)),
        ):
            pages, _ = case.pages(*case.tokens()[1:])
            k = jnp.ones((4, 1, 2, 32), case.dtype)
            with pytest.raises(ValueError, match=found):
                kv_write(pages, k, k, dataclasses.replace(case, chunk=1).blocks(1)[0], implementation=tpu)
