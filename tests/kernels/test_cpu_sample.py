"""The op that goes from hidden states to tokens has the bits of the head, the division, the cuts and the draw."""

import jax.numpy as jnp
import numpy as np
import pytest
from cpu_kernels import BODIES, DTYPES, bits

from pallas_kernels.cpu import calls
from pallas_kernels.wanted import DRAWN, LIKELIEST, Wanted

ROWS, WIDTH, LEAVES, OUTPUTS, VOCABULARY, EPS = 37, 72, 4, 96, 379, 1e-6
NONE = dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, given=DRAWN)
ASKED = [
    {},
    dict(temperature=0.7),
    dict(temperature=1e-3),
    dict(given=LIKELIEST),
    dict(given=5),
    dict(given=VOCABULARY - 1, temperature=2.5),
    dict(top_k=7),
    dict(top_p=0.8, temperature=1.3),
    dict(min_p=0.2),
    dict(top_k=50, top_p=0.9, min_p=0.01, temperature=0.9),
]


class Case:
    """Rows that ask for everything in turn. Some repeat the one before; one has no finite logits."""

    def __init__(self, dtype: str) -> None:
        rng = np.random.default_rng(1)
        self.x = rng.normal(size=(ROWS, WIDTH)).astype(np.float32) * 3
        self.x[11] = np.nan
        self.norm = np.asarray(rng.normal(size=WIDTH), jnp.dtype(dtype))
        self.head = np.asarray(rng.normal(size=(LEAVES, OUTPUTS, WIDTH)), jnp.dtype(dtype))
        self.fresh = np.arange(ROWS) % 5 != 3
        self.live = np.arange(ROWS) < ROWS - 4
        asked = [NONE | ASKED[i % len(ASKED)] for i in range(ROWS)]
        of = lambda name, dtype: np.array([each[name] for each in asked], dtype)
        temperature, top_p, min_p = (of(name, np.float32) for name in ("temperature", "top_p", "min_p"))
        top_k, given = of("top_k", np.int32), of("given", np.int32)
        uniforms = rng.random((ROWS, 2), np.float32)
        self.wanted = Wanted(self.fresh, self.live, temperature, top_k, top_p, min_p, given, uniforms)

    def sampled(self, body: str, rows=slice(None), *, with_fresh: bool = True, vocabulary: int = VOCABULARY):
        wanted = Wanted(*(each[rows] for each in self.wanted))
        wanted = wanted if with_fresh else wanted._replace(fresh=None)
        found = calls.sample(self.x[rows], self.norm, EPS, self.head, wanted, vocabulary, body)
        return [np.asarray(each) for each in found]

    def expected(self, body: str, *, with_fresh: bool = True, vocabulary: int = VOCABULARY):
        w = self.wanted
        logits = np.array(calls.logits(self.x, self.norm, EPS, self.head, self.fresh if with_fresh else None, body))
        finite = np.isfinite(logits[:, :vocabulary]).all(-1)
        logits[:, vocabulary:] = -np.inf
        scaled = logits * (np.float32(1) / w.temperature)[:, None]
        kept = np.asarray(calls.kept(scaled, w.top_k, w.top_p, w.min_p, body))
        given = np.where(w.given == LIKELIEST, logits.argmax(-1), w.given)
        tokens, logprobs, *_ = calls.draw(np.where(kept, scaled, -np.inf), w.uniforms, given, body)
        tokens, logprobs = np.asarray(tokens), np.asarray(logprobs)
        return tokens, logprobs, finite & ~np.isnan(logprobs)


@pytest.mark.parametrize("with_fresh", [True, False])
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_the_ops_one_by_one(dtype, body, with_fresh):
    case = Case(dtype)
    (tokens, logprobs, finite), expected = (of(body, with_fresh=with_fresh) for of in (case.sampled, case.expected))
    assert np.array_equal(finite, expected[2] | ~case.live) and not finite[11]
    good = finite & case.live
    assert np.array_equal(tokens[good], expected[0][good])
    assert np.array_equal(bits(logprobs[good]), bits(expected[1][good]))
    assert (tokens[~case.live] == 0).all() and (logprobs[~case.live] == 0).all()


def test_all_bodies_give_the_same_bits():
    case = Case("bfloat16")
    found = [case.sampled(body) for body in BODIES]
    good = found[0][2]
    for tokens, logprobs, finite in found:
        assert np.array_equal(finite, good) and np.array_equal(tokens[good], found[0][0][good])
        assert np.array_equal(bits(logprobs[good]), bits(found[0][1][good]))


def test_a_row_alone_has_the_bits_of_the_row_in_a_batch():
    case = Case("bfloat16")
    tokens, logprobs, _ = case.sampled("best", with_fresh=False)
    for row in (0, 9, 10, 22):
        alone = case.sampled("best", slice(row, row + 1), with_fresh=False)
        assert alone[0] == tokens[row] and bits(alone[1]) == bits(logprobs[row : row + 1])


def test_padding_of_the_vocabulary_is_neither_drawn_nor_looked_at():
    """A column of NaN after the vocabulary fails no row, and a large one is no row's likeliest token."""
    case = Case("float32")
    expected = case.sampled("best")
    case.head = case.head.copy()
    case.head.reshape(-1, WIDTH)[VOCABULARY:] = np.array([[np.nan], [1e6], [-1e6], [1e6], [np.nan]])
    for found, was in zip(case.sampled("best"), expected, strict=True):
        assert np.array_equal(found[expected[2]], was[expected[2]])
