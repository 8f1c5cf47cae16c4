"""The CPU's attention has the bits of its order, with every body, and none of what a query does not see."""

import dataclasses
import functools

import attention_order
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_kernels import BODIES, DTYPES, bits, same

from pallas_kernels.cpu import calls
from pallas_kernels.paged_attention_inputs import PagedBlocks

every_body = pytest.mark.parametrize("body", BODIES)
NOT_FINITE = np.nan, np.inf, -np.inf


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences of some lengths, all of whose tokens attend."""

    lengths: tuple[int, ...] = (1, 20, 77, 130)
    group: int = 2
    heads: int = 2
    width: int = 32
    page_size: int = 16
    dtype: str = "bfloat16"
    spread: float = 3.0  # of scores

    @functools.cached_property
    def tokens(self) -> list[list[np.ndarray]]:
        """(q [n, H, h], k [n, K, h], v [n, K, h]) of each sequence, k and v as the pages have them."""
        found = []
        for slot, n in enumerate(self.lengths):
            rng = np.random.default_rng([slot, self.width])
            q = rng.normal(size=(n, self.heads * self.group, self.width)) * (self.spread * self.width**-0.5)
            k, v = (self.stored(rng.normal(size=(n, self.heads, self.width))) for _ in range(2))
            found.append([q.astype(np.float32), k, v])
        return found

    def stored(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(jnp.asarray(x, jnp.float32).astype(self.dtype).astype(jnp.float32))

    def narrow(self, x: np.ndarray) -> np.ndarray:
        return self.stored(x) if self.dtype == "bfloat16" else x

    def expected(self, slot: int, position: int) -> np.ndarray:
        q, k, v = self.tokens[slot]
        heads = [
            attention_order.attention(
                q[position, head * self.group : (head + 1) * self.group],
                *(x[: position + 1, head] for x in (k, v)),
                self.narrow,
            )
            for head in range(self.heads)
        ]
        return self.stored(np.concatenate(heads).reshape(-1))

    def attended(self, body: str, block: int = 16, unused: float = np.nan, tokens=None) -> list[np.ndarray]:
        """[n, Hh] of each sequence, in blocks of `block` tokens. Cells of no token hold `unused`."""
        tokens = self.tokens if tokens is None else tokens
        needed = [-(-n // self.page_size) for n in self.lengths]
        ids = np.random.default_rng(0).permutation(sum(needed) + 1)
        shape = len(ids), self.page_size, self.heads, self.width
        pages = [np.full(shape, unused, np.float32) for _ in range(2)]
        tables, blocks = np.full((len(needed), max(needed)), -7, np.int32), []
        for slot, (n, count) in enumerate(zip(self.lengths, needed, strict=True)):
            tables[slot, :count], ids = ids[:count], ids[count:]
            for pool, x in zip(pages, tokens[slot][1:], strict=True):
                position = np.arange(n)
                pool[tables[slot, position // self.page_size], position % self.page_size] = x
            blocks += [(slot, start, min(block, n - start)) for start in range(0, n, block)]
        slots, starts, counts = (jnp.asarray(x, jnp.int32) for x in zip(*blocks, strict=True))
        located = PagedBlocks(jnp.asarray(tables), slots, starts, counts, jnp.int32(len(blocks)))
        q = np.concatenate([x[0] for x in tokens])
        firsts = np.cumsum([0, *np.asarray(counts)[:-1]], dtype=np.int32)
        y = calls.attend(jnp.asarray(q), *self.pools(*pages), located, self.dtype, body, jnp.asarray(firsts))
        return np.split(np.asarray(y, np.float32), np.cumsum(self.lengths)[:-1])

    def pools(self, k: np.ndarray, v: np.ndarray) -> list[jax.Array]:
        """Pages [P, p, K, h] as the kernels have them."""
        shapes = calls.page_shapes(self.heads, len(k), self.page_size, self.width, jnp.float32)
        padding = shapes[1].shape[3] // 2 - self.width
        k = k.reshape(len(k), -1, calls.LANES, self.heads, self.width // 2, 2).transpose(0, 3, 1, 4, 2, 5)
        v = np.pad(v, ((0, 0), (0, 0), (0, 0), (0, padding))).reshape(len(v), -1, 2, self.heads, self.width + padding)
        stored = (jnp.asarray(x).astype(self.dtype) for x in (k, v.transpose(0, 3, 1, 4, 2)))
        storage = jnp.float32 if self.dtype == "float32" else jnp.uint16
        return [x.view(storage).reshape(shape.shape) for x, shape in zip(stored, shapes, strict=True)]


WIDTHS = (16, 24, 64, 80, 96, 128, 256)
CASES = [
    Case(group=(1, 2, 3, 4, 8)[(i + j) % 5], width=width, page_size=(16, 32, 64)[(i + j) % 3], dtype=dtype)
    for i, width in enumerate(WIDTHS)
    for j, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_are_those_of_the_order(case):
    found = {body: case.attended(body) for body in BODIES}
    for slot, length in enumerate(case.lengths):
        for position in {0, length // 2, length - 1}:
            assert same(found[BODIES[0]][slot][position], case.expected(slot, position)), (slot, position)
        for body in BODIES[1:]:
            assert same(found[body][slot], found[BODIES[0]][slot]), (body, slot)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_long_context(dtype):
    case = Case(lengths=(2100, 1024, 30), group=1, heads=1, width=16, page_size=32, dtype=dtype)
    found = {body: case.attended(body) for body in BODIES}
    for slot, position in [(0, 1023), (0, 1024), (0, 2099), (1, 1023)]:
        assert same(found[BODIES[0]][slot][position], case.expected(slot, position)), (slot, position)
    for body in BODIES[1:]:
        assert all(map(same, found[body], found[BODIES[0]])), body


@every_body
@pytest.mark.parametrize("spread", (0.01, 60.0, 1e4))
def test_weights_of_all_sizes(body, spread):
    """All about the same, many that round to nothing, and one beside zeros."""
    case = Case(spread=spread)
    found = case.attended(body)
    for slot, length in enumerate(case.lengths):
        assert same(found[slot][length - 1], case.expected(slot, length - 1))


@every_body
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", (1, 2), ids=("key", "value"))
def test_a_later_token_that_is_not_finite_changes_nothing(body, dtype, side):
    """Whether queries before it stand in its block, or in its tile of keys."""
    case = Case(lengths=(130,), width=24, group=3, dtype=dtype)
    whole = case.attended(body, block=48)[0]
    assert np.isfinite(whole).all()
    for i, position in enumerate((1, 15, 16, 31, 47, 62, 63, 64, 65, 95, 96, 129)):
        tokens = [[x.copy() for x in case.tokens[0]]]
        tokens[0][side][position, 0, 5 * i % 24] = NOT_FINITE[i % 3]
        for block in (16, 48):
            found = case.attended(body, block, tokens=tokens)[0]
            assert same(found[:position], whole[:position]), (position, block)
            assert side == 1 or not np.isfinite(found[position]).all()
            assert same(found[:, 3 * 24 :], whole[:, 3 * 24 :]), "another key head"


@every_body
@pytest.mark.parametrize("dtype", DTYPES)
def test_cells_of_no_token_may_hold_anything(body, dtype):
    for page_size in (16, 32, 64):
        case = Case(dtype=dtype, page_size=page_size, lengths=(1, 15, 16, 17, 31, 33, 63, 65, 100))
        whole = case.attended(body, unused=0.0)
        for unused in NOT_FINITE:
            for block in (1, 16, 48):
                assert all(map(same, case.attended(body, block, unused), whole)), (unused, block)


@every_body
def test_a_query_that_is_no_number_is_alone(body):
    case = Case(lengths=(70,))
    tokens = [[x.copy() for x in case.tokens[0]]]
    tokens[0][0][40] = np.nan
    found, whole = case.attended(body, tokens=tokens)[0], case.attended(body)[0]
    others = np.arange(70) != 40
    assert np.isnan(found[40]).all() and np.array_equal(bits(found)[others], bits(whole)[others])
