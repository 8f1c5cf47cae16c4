"""The order of the CPU's attention in NumPy, one rounding after the other: attend.h says what it is."""

import numpy as np

TILE, CHUNK, SPLIT, LANES, MASKED = 64, 32, 1024, 16, np.float32(-1e30)
SMALLEST = np.finfo(np.float32).tiny
POLYNOMIAL = (2.161291631637141e-4, 1.2467845808714628e-3, 9.675451554358006e-3, 5.5485282093286514e-2)
POLYNOMIAL += (0.2402293086051941, 0.6931470632553101, 1.0)


def rounded(x: np.ndarray) -> np.ndarray:
    """To float32, where subnormals are zero."""
    x = np.asarray(x).astype(np.float32)
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x)


def fma(a, b, c) -> np.ndarray:
    """A float64 one, rounded once more: that is exact but for one in about 2**28 sums of float32 products."""
    return rounded(np.float64(a) * np.float64(b) + np.float64(c))


def product(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """a [m, k] times b [k, n], added to the running sums."""
    padding = -a.shape[1] % CHUNK
    a, b = np.pad(a, ((0, 0), (0, padding))), np.pad(b, ((0, padding), (0, 0)))
    for first in range(0, a.shape[1], CHUNK):
        sums = [np.zeros_like(total), np.zeros_like(total)]
        for k in range(first, first + CHUNK):
            sums[k % 2] = fma(a[:, k, None], b[k], sums[k % 2])
        total = rounded(total + rounded(sums[0] + sums[1]))
    return total


def weight_of(x: np.ndarray) -> np.ndarray:
    """2**x of x <= 0."""
    x = np.maximum(x, np.float32(-200))
    floor = np.floor(x)
    f, y = rounded(x - floor), np.float32(POLYNOMIAL[0])
    for c in POLYNOMIAL[1:]:
        y = fma(y, f, np.float32(c))
    return rounded(np.ldexp(np.float64(y), floor.astype(int)))


def softmax(q: np.ndarray, k: np.ndarray, v: np.ndarray, narrow) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(highs [m], totals [m, 16], sums [m, h]) of queries over the keys of a split."""
    high, total = np.full(len(q), MASKED), np.zeros((len(q), LANES), np.float32)
    sums = np.zeros((len(q), v.shape[1]), np.float32)
    for first in range(0, len(k), TILE):
        own = slice(first, first + TILE)
        scores = product(q, k[own].T, np.zeros((len(q), len(k[own])), np.float32))
        before, high = high, np.maximum(high, np.ceil(scores.max(1)))
        shrink = np.exp2(before - high)[:, None]
        weights = weight_of(scores - high[:, None])
        total, sums = rounded(total * shrink), rounded(sums * shrink)
        for n in range(0, len(k[own]), LANES):
            lanes = weights[:, n : n + LANES]
            total[:, : lanes.shape[1]] += lanes
        sums = product(narrow(weights), v[own], sums)
    return high, total, sums


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, narrow) -> np.ndarray:
    """Of one token's queries [m, h] over all the keys [n, h] that it sees, float32. `narrow` rounds to the pages' type
    where that is bfloat16."""
    q = narrow(q)
    high, total, sums = softmax(q, k[:SPLIT], v[:SPLIT], narrow)
    for first in range(SPLIT, len(k), SPLIT):
        own = slice(first, first + SPLIT)
        other_high, other_total, other_sums = softmax(q, k[own], v[own], narrow)
        before, high = high, np.maximum(high, other_high)
        mine, other = (np.exp2(x - high)[:, None] for x in (before, other_high))
        total = rounded(rounded(total * mine) + rounded(other_total * other))
        sums = rounded(rounded(sums * mine) + rounded(other_sums * other))
    while total.shape[1] > 1:  # lanes, halves first
        total = rounded(total[:, : total.shape[1] // 2] + total[:, total.shape[1] // 2 :])
    return rounded(sums / total)
