"""The CPU's attention: against float64, and a query's bits whatever stands beside it, however it came there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpu_kernels import BODIES, DTYPES, bits, f64, same

from pallas_kernels.cpu import calls
from pallas_kernels.numbers import ceil_to
from pallas_kernels.paged_attention_inputs import PagedBlocks

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 200)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences of some lengths, in pages of a pool in which nothing else is a number."""

    lengths: tuple[int, ...] = LENGTHS
    queries: int = 4
    heads: int = 2
    width: int = 32
    leaves: int = 1
    page_size: int = 16
    dtype: str = "bfloat16"
    normed: bool = True
    body: str = "best"
    seed: int = 0

    @property
    def geometry(self) -> calls.Geometry:
        return calls.Geometry(self.leaves, self.queries, self.width, 1e-6, 1.1, self.dtype)

    def packed(self) -> np.ndarray:
        """The projection of every token of every sequence, [S, T, N]."""
        columns = (self.queries + 2 * self.heads) * self.width
        rows = [np.random.default_rng([self.seed, i]).normal(size=(n, columns)) for i, n in enumerate(self.lengths)]
        return np.stack([np.pad(x, ((0, max(self.lengths) - len(x)), (0, 0))) for x in rows]).astype(np.float32)

    def norms(self):
        if not self.normed:
            return None, None
        return tuple(jnp.linspace(low, 1.5, self.width, dtype=self.dtype) for low in (0.5, -1.0))

    def frequencies(self) -> np.ndarray:
        return (1e4 ** (-np.arange(0, self.width, 2) / self.width)).astype(np.float32)

    def run(self, parts: list[list[tuple[int, int, int]]], tokens: int, gap: int | None = None) -> dict:
        """{(sequence, position): attended} of query blocks (sequence, start, count), a call for each part.

        A block has as many rows as it has tokens, and `gap` more; without one each has `tokens`.
        """
        needed = [-(-length // self.page_size) for length in self.lengths]
        ids = np.random.default_rng(1).permutation(sum(needed) + 2)
        tables = np.full((len(needed), max(needed)), -7, np.int32)  # no page, after the context
        for slot, count in enumerate(needed):
            tables[slot, :count], ids = ids[:count], ids[count:]
        storage = jnp.float32 if self.dtype == "float32" else jnp.uint16
        shapes = calls.page_shapes(self.heads, sum(needed) + 2, self.page_size, self.width, storage)
        nan = np.nan if self.dtype == "float32" else 0x7FFF
        keys, values = (jnp.full(x.shape, nan, x.dtype) for x in shapes)
        packed, found = self.packed(), {}
        for own in parts:
            size = ceil_to(len(own) + 1, 64)  # padding, too
            slots, starts, counts = np.pad(np.asarray(own, np.int32), ((0, size - len(own)), (0, 0))).T
            firsts = np.cumsum([0, *(counts + gap)[:-1]]) if gap is not None else np.arange(size) * tokens
            rows = np.full((firsts[-1] + tokens, packed.shape[2]), np.nan, np.float32)
            for (slot, start, count), first in zip(own, firsts, strict=False):
                rows[first : first + count] = packed[slot, start : start + count]
            located = PagedBlocks(jnp.asarray(tables), slots, starts, counts, jnp.int32(len(own)))
            first_rows = None if gap is None else jnp.asarray(firsts, jnp.int32)
            keys, values, y = self._step(keys, values, rows, located, first_rows)
            y = np.asarray(y, np.float32)
            for i, (slot, start, count) in enumerate(own):
                last = gap is not None and i == len(own) - 1  # what comes after it is no block's
                between = y[firsts[i] + count : firsts[i] + count if last else firsts[i + 1]]
                assert (bits(between) == 0).all(), "rows of a block that are no tokens"
                found |= {(slot, start + t): y[firsts[i] + t] for t in range(count)}
        return found

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def _step(self, keys, values, rows, located, first_rows):
        q, keys, values = calls.rotate_and_write(
            self.geometry,
            rows,
            self.norms(),
            jnp.asarray(self.frequencies()),
            keys,
            values,
            located,
            self.body,
            first_rows,
        )
        return keys, values, calls.attend(q, keys, values, located, self.dtype, self.body, first_rows)

    def decoded(self, slots=None) -> dict:
        """Every token of the sequences one after the other, all sequences at once."""
        slots = range(len(self.lengths)) if slots is None else slots
        longest = max(self.lengths[slot] for slot in slots)
        blocks = [(slot, t, 1) for t in range(longest) for slot in slots if t < self.lengths[slot]]
        # A token is written before it is seen, so that the order within one call does not matter.
        return self.run([blocks], 1)

    def prefilled(self, tokens: int = 16, slots=None, steps: int = 1) -> dict:
        """Every sequence in blocks of `tokens`."""
        slots = range(len(self.lengths)) if slots is None else slots
        blocks = [
            (slot, start, min(tokens, self.lengths[slot] - start))
            for slot in slots
            for start in range(0, self.lengths[slot], tokens)
        ]
        each = -(-len(blocks) // steps)
        return self.run([blocks[i : i + each] for i in range(0, len(blocks), each)], tokens)

    def mixed(self, gap: int) -> dict:
        """Every sequence up to its last token in blocks of 16, and the last tokens alone, all in one call."""
        ends = [(slot, length - 1, 1) for slot, length in enumerate(self.lengths)]
        blocks = [(slot, start, min(16, last - start)) for slot, last, _ in ends for start in range(0, last, 16)]
        return self.run([ends[::2] + blocks + ends[1::2]], 16, gap)

    def expected(self, slot: int) -> np.ndarray:
        """Attention of one sequence in float64, over keys and values rounded as the pages have them."""
        length, per = self.lengths[slot], self.queries // self.leaves
        own = f64(self.packed()[slot, :length]).reshape(length, self.leaves, -1, self.width)
        q, k, v = np.split(own, [per, per + self.heads // self.leaves], axis=2)
        q, k, v = (x.reshape(length, -1, self.width) for x in (q, k, v))
        angles = f64(np.float32(np.arange(length))[:, None] * self.frequencies())[:, None]
        cos, sin = np.cos(angles) * 1.1, np.sin(angles) * 1.1
        rounded = lambda x: f64(jnp.asarray(x, jnp.float32).astype(self.dtype))

        def prepared(x, norm):
            if norm is not None:
                x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * f64(norm)
            a, b = np.split(x, 2, axis=-1)
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        q, k, v = prepared(q, self.norms()[0]), rounded(prepared(k, self.norms()[1])), rounded(v)
        group = self.queries // self.heads
        scores = np.einsum("tkgh,skh->kgts", q.reshape(length, -1, group, self.width), k) * self.width**-0.5
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("kgts,skh->tkgh", weights, v).reshape(length, -1)


def equal(found: dict, whole: dict) -> bool:
    return len(found) > 0 and all(same(y, whole[place]) for place, y in found.items())


CASES = [
    Case(),
    Case(dtype="float32", page_size=64, width=24, queries=6, leaves=2, normed=False),
    Case(dtype="float16", page_size=32, width=128, queries=7, heads=1),
    Case(width=256, queries=2, heads=2),
    Case(lengths=(5, 40), width=8, queries=3, heads=3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case):
    found = case.prefilled()
    rounding = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 2e-6}[case.dtype]
    for slot, length in enumerate(case.lengths):
        y = np.stack([found[slot, t] for t in range(length)])
        assert np.abs(y - case.expected(slot)).max() < rounding * np.abs(case.expected(slot)).max()


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_query_is_the_same_however_it_came(case, body):
    case = dataclasses.replace(case, body=body)
    whole = case.prefilled()
    assert len(whole) == sum(case.lengths)
    assert equal(case.decoded(), whole), "one token at a time"
    assert equal(case.prefilled(steps=3), whole), "in chunks"
    assert equal(case.mixed(gap=0), whole) and equal(case.mixed(gap=3), whole), "in blocks of different sizes"
    for slot in range(0, len(case.lengths), 3):
        assert equal(case.prefilled(slots=[slot]), whole), "alone"
    for page_size in (16, 32, 64):
        assert equal(dataclasses.replace(case, page_size=page_size).prefilled(), whole), page_size


@pytest.mark.parametrize("body", BODIES[1:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_bodies_give_the_same_bits(case, body):
    first, other = (dataclasses.replace(case, body=each) for each in (BODIES[0], body))
    assert equal(other.prefilled(), first.prefilled())


@pytest.mark.parametrize("body", BODIES)
def test_a_long_context_is_the_same_whether_threads_share_it(body):
    """One key head alone is shared among threads by splits of the context; sixteen sequences are not."""
    long = (1023, 1024, 1025, 2049, 2500)
    case = Case(lengths=long + tuple(range(1, 12)), queries=2, heads=1, width=16, dtype="float32", body=body)
    whole = case.prefilled()
    for slot, length in enumerate(long):
        before = [(slot, t, 1) for t in range(length - 1)]
        alone = case.run([before, [(slot, length - 1, 1)]], 1)
        assert equal({(slot, length - 1): alone[slot, length - 1]}, whole)
    y = np.stack([whole[4, t] for t in range(2500)])
    assert np.abs(y - case.expected(4)).max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written(dtype):
    """Keys and values of a token stand where its table says, and zeros after a value."""
    case = Case(lengths=(20,), width=24, dtype=dtype, normed=False)
    storage = jnp.float32 if dtype == "float32" else jnp.uint16
    keys, values = (jnp.ones(x.shape, x.dtype) for x in calls.page_shapes(2, 3, 16, 24, storage))
    rows = case.packed()[0]
    blocks = PagedBlocks(
        jnp.asarray([[2, 0]], jnp.int32), *(jnp.asarray([x], jnp.int32) for x in (0, 16, 3)), jnp.int32(1)
    )
    padded = jnp.pad(rows[16:19], ((0, 13), (0, 0)))
    given = case.geometry, padded, (None, None), jnp.zeros(12), keys + 0, values + 0, blocks
    written = [np.asarray(x) for x in calls.rotate_and_write(*given)[1:]]
    parts = rows[16:19].reshape(3, -1, 24)
    turned = np.asarray(parts[:, 4:6] * np.float32(1.1))
    for found, expected in zip(calls.by_token(*written), (turned, parts[:, 6:]), strict=True):
        assert np.array_equal(found[0, :3], np.asarray(jnp.asarray(expected).astype(dtype)).view(found.dtype))
        assert (found[0, 3:] == 1).all() and (found[1:] == 1).all()
    pairs = written[1][0].reshape(2, 8, 32, 2)
    assert (pairs[:, 0, 24:] == 0).all() and (pairs[:, 1, 24:, 0] == 0).all()
    assert (pairs[:, 1, :, 1] == 1).all(), "the other token of a pair"


def test_pages_by_token():
    """Pairs of the head of a token are neighbours, by sixteen tokens; and pairs of tokens of a number of the head."""
    keys, values = (np.arange(np.prod(x.shape)).reshape(x.shape) for x in calls.page_shapes(2, 3, 32, 24, jnp.uint16))
    k, v = calls.by_token(keys, values)
    assert k.shape == v.shape == (3, 32, 2, 24)
    for page, token, head, i in np.random.default_rng(0).integers(0, k.shape, (50, 4)):
        assert k[page, token, head, i] == keys[page, head, token // 16, i // 2 * 32 + token % 16 * 2 + i % 2]
        assert v[page, token, head, i] == values[page, head, token // 2, 2 * i + token % 2]


@pytest.mark.parametrize(
    ("first_rows", "why"),
    [([0, 2], "lie over each other"), ([-1, 9], "lie over each other"), ([0, 14], "after the last row")],
)
def test_rows_that_are_not_the_blocks_own_are_refused(first_rows, why):
    case = Case()
    keys, values = (jnp.zeros(x.shape, x.dtype) for x in calls.page_shapes(2, 3, 16, 32, jnp.uint16))
    numbers = (jnp.asarray([x, x], jnp.int32) for x in (0, 0, 3))
    blocks, firsts = PagedBlocks(jnp.zeros((1, 1), jnp.int32), *numbers, jnp.int32(2)), jnp.asarray(first_rows)
    with pytest.raises(jax.errors.JaxRuntimeError, match=why):
        calls.attend(jnp.zeros((16, 4, 32)), keys, values, blocks, "bfloat16", first_rows=firsts).block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match=why):
        given = jnp.zeros((16, 8 * 32)), case.norms(), jnp.zeros(16), keys, values, blocks
        calls.rotate_and_write(case.geometry, *given, first_rows=firsts)[0].block_until_ready()


@pytest.mark.parametrize(
    ("table", "start", "count", "why"),
    [
        ([3, 0], 0, 1, "names a page that there is not"),
        ([-1, 0], 0, 1, "names a page that there is not"),
        ([0, 1], 32, 1, "after the end of its table"),
        ([0, 1], -1, 1, "begins before 0"),
        ([0, 1], 0, 17, "more than it can"),
    ],
)
def test_tables_that_lead_elsewhere_are_refused(table, start, count, why):
    case = Case()
    keys, values = (jnp.zeros(x.shape, x.dtype) for x in calls.page_shapes(2, 3, 16, 32, jnp.uint16))
    numbers = (jnp.asarray([x], jnp.int32) for x in (0, start, count))
    blocks = PagedBlocks(jnp.asarray([table], jnp.int32), *numbers, jnp.int32(1))
    with pytest.raises(jax.errors.JaxRuntimeError, match=why):
        calls.attend(jnp.zeros((16, 4, 32)), keys, values, blocks, "bfloat16").block_until_ready()
    with pytest.raises(jax.errors.JaxRuntimeError, match=why):
        rows = jnp.zeros((16, 8 * 32))
        out = calls.rotate_and_write(case.geometry, rows, case.norms(), jnp.zeros(16), keys, values, blocks)
        out[0].block_until_ready()
