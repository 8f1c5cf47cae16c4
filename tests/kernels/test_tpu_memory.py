"""The TPU's kernels in the interpreter that knows a TPU's memory.

It runs copies only when something waits for them, finds those that overlap with other accesses, and fills memory that
nothing has written with NaN. It takes no kernel under `jax.vmap`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import draw, grouped_matmul, kv_write, matmul, paged_attention
from pallas_kernels.cases.attention import AttentionCase, with_padding
from pallas_kernels.cases.draw import DrawCase
from pallas_kernels.cases.grouped_matmul import GroupedCase
from pallas_kernels.cases.matmul import MatmulCase
from pallas_kernels.implementations import choose
from pallas_kernels.paged_attention_inputs import PagedBlocks, Scoring
from pallas_kernels.paged_attention_tpu_pages import Fetch

INTERPRETED = choose("pallas_interpret")
WATCHED = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
ATTENTION = AttentionCase((40, 0, 70, 1, 33), dtype="bfloat16", has_sinks=True)  # 2, 0, 3, 1 and 2 tiles


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """Every TPU body runs in that interpreter, whose state an error would leave behind."""
    for op in (draw, grouped_matmul, kv_write, matmul, paged_attention):
        body: Any = op.BODIES["pallas_tpu"]
        monkeypatch.setitem(op.BODIES, "pallas_interpret", functools.partial(body, interpret=WATCHED))
    yield
    pltpu.reset_tpu_interpret_mode_state()


def run(function: Callable, *operands: Any) -> tuple[Any, bool]:
    """(the function's results, whether accesses overlapped)."""
    out = jax.tree.map(np.asarray, jax.jit(function)(*operands))
    races = interpret_pallas_call.races
    assert races is not None, "no kernel ran"
    return out, races.races_found


def clean(function: Callable, *operands: Any) -> Any:
    out, has_races = run(function, *operands)
    assert not has_races
    return out


def attend(scoring: Scoring, q, pages, blocks: PagedBlocks, sinks):
    return paged_attention.paged_attention(q, pages, blocks, sinks=sinks, scoring=scoring, implementation=INTERPRETED)


def attention_operands(case: AttentionCase, r: int, slots: tuple[int, ...] | None = None) -> tuple:
    """The operands of `attend`, with three blocks of padding, and the number of blocks before them."""
    tokens = case.tokens()
    pages, _ = case.pages(*tokens[1:])
    blocks, rows = case.blocks(r, slots)
    q, blocks = with_padding(case.queries(tokens[0], rows, r), blocks, 3)
    return (q, pages, blocks, case.sinks()), len(rows)


def attended(case: AttentionCase, r: int, slots: tuple[int, ...] | None = None) -> np.ndarray:
    operands, num_blocks = attention_operands(case, r, slots)
    out = clean(functools.partial(attend, case.scoring), *operands)
    assert np.isnan(out[num_blocks:]).all(), "a block of padding was computed"
    return out[:num_blocks]


def bits(x: np.ndarray) -> list:
    return np.asarray(x, np.float32).view(np.uint32).tolist()


def test_decode():
    """The copies go on from block to block, over one that has no key, and a block alone has the bits of the batch."""
    together = attended(ATTENTION, 1)
    assert np.isfinite(together).all() and together[0].any() and not together[1].any()
    assert bits(attended(ATTENTION, 1, (2,))) == bits(together[2:3])


def test_prefill():
    case = AttentionCase((21, 40), chunk=21, dtype="int8", page_size=32, window=20)
    assert np.isfinite(attended(case, 8)).all()


@pytest.mark.parametrize("chunk, r", [(1, 1), (5, 1), (6, 2)])
def test_kv_write(chunk, r):
    case = AttentionCase((20, 3, 0, 18), chunk=chunk, dtype="bfloat16")
    (_, pages, blocks, _), num_blocks = attention_operands(case, r)
    pages = pages._replace(keys=jnp.zeros_like(pages.keys), values=jnp.zeros_like(pages.values))
    shape = (len(blocks.slots), r, *case.shape[2:])
    k, v = (jnp.arange(np.prod(shape), dtype=jnp.bfloat16).reshape(shape) + i for i in (1, 2))

    def write(implementation, pages, k, v, blocks):
        return kv_write.kv_write(pages, k, v, blocks, implementation=implementation)[:2]

    found = clean(functools.partial(write, INTERPRETED), pages, k, v, blocks)
    expected = write(choose("xla"), pages, k, v, blocks)
    for pool, wanted in zip(found, expected, strict=True):
        assert np.asarray(wanted).any() and bits(pool) == bits(wanted)


def test_matmul_of_leaves():
    case = MatmulCase(20, 200, 272, "float32", residual=True, gated=True)
    (x, w, _, residual), (_, v, *_) = case.operands(), case.operands(seed=1)

    def product(x, w, residual):
        return matmul.matmul(x, w, residual=residual, gated=True, implementation=INTERPRETED)

    leaves = clean(product, x, jnp.stack([w, v]), jnp.stack([residual, residual]))
    assert np.isfinite(leaves).all() and bits(leaves[1]) == bits(clean(product, x, v, residual))


def test_grouped_matmul():
    x, w, sizes = GroupedCase((3, 0, 15), 200, 96, "float32").operands()
    x = jnp.pad(x, ((0, 30), (0, 0)), constant_values=jnp.nan)  # rows of no expert
    out = clean(lambda *x: grouped_matmul.grouped_matmul(*x, implementation=INTERPRETED), x, w, sizes)
    assert np.isfinite(out).all() and out[:18].all() and not out[18:].any()


def test_draw():
    logits, uniforms = DrawCase(3, 256).operands()
    out = clean(
        lambda *x: draw.draw_and_score(*x, implementation=INTERPRETED), logits, jnp.array([-1, 5, -1]), uniforms
    )
    assert out.tokens[1] == 5 and np.isfinite(out.logprobs).all()


@pytest.mark.parametrize("method", ("wait", "tile"))
def test_a_wait_that_is_left_out_is_caught(method, monkeypatch):
    """A test of these tests: no tile is waited for, or each is read from the buffer to which the next is copied."""
    own_tile = Fetch.tile
    broken = {"wait": lambda *_: None, "tile": lambda self, buffer: own_tile(self, 1 - buffer)}
    monkeypatch.setattr(Fetch, method, broken[method])
    operands, num_blocks = attention_operands(ATTENTION, 1)
    out, has_races = run(functools.partial(attend, ATTENTION.scoring), *operands)
    assert has_races or np.isnan(out[:num_blocks]).any()
