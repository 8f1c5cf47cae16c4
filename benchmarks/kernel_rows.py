"""What accelerator.py measures: a kernel at decoders' shapes, XLA's operation on the same numbers, the work of both."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxengine.config import QUERY_BLOCK
from pallas_kernels.cases import attention as attention_cases
from pallas_kernels.cases import draw as draw_cases
from pallas_kernels.cases import grouped_matmul as grouped_cases
from pallas_kernels.cases import matmul as matmul_cases
from pallas_kernels.cases.attention import AttentionCase
from pallas_kernels.cases.grouped_matmul import GroupedCase
from pallas_kernels.cases.matmul import MatmulCase
from pallas_kernels.chain import chain_of
from pallas_kernels.draw import draw_and_score
from pallas_kernels.draw_reference import plain_draw
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.implementations import Implementation
from pallas_kernels.kv_write import kv_write
from pallas_kernels.matmul import matmul
from pallas_kernels.matmul_reference import finish, plain
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention_inputs import EIGHT_BIT, PagedBlocks, Pages
from pallas_kernels.pinned_math import LOG2_E

WRITES = 100  # of one call, so that bringing the pools into the call is no part of the time


@dataclasses.dataclass(frozen=True)
class Row:
    """A kernel's call beside XLA's. `theirs` is None where XLA has no such operation."""

    name: str
    ours: Callable
    theirs: Callable | None
    operands: tuple
    their_operands: tuple
    flops: float
    moved: float  # bytes that have to be read and written
    calls: int = 1  # of the kernel in one call of `ours`
    sdpa: dict[str, Any] | None = None  # the same for peer_torch_attention.py, if torch has it


def size_of(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def row(name: str, ours: Callable, theirs: Callable, operands: tuple, flops: float) -> Row:
    """Of a kernel that reads all its operands once."""
    return Row(name, ours, theirs, operands, operands, flops, size_of((operands, jax.eval_shape(ours, *operands))))


def matmul_rows(implementation: Implementation, cases: Sequence = matmul_cases.DECODER) -> Iterator[Row]:
    for case in cases:
        ours = jax.jit(functools.partial(our_matmul, case, implementation))
        theirs = jax.jit(functools.partial(plain_matmul, case))
        yield row(f"matmul {case}", ours, theirs, case.operands(), 2 * case.rows * case.inputs * case.outputs)


def our_matmul(case: MatmulCase, implementation: Implementation, x: Array, w: Array, bias, residual) -> Array:
    return matmul(x, w, bias=bias, residual=residual, gated=case.gated, implementation=implementation)


def plain_matmul(case: MatmulCase, x: Array, w: Array, bias, residual) -> Array:
    parts = 2 if case.gated else 1
    return plain(x, w.reshape(parts, -1, w.shape[1]), None if bias is None else bias.reshape(parts, -1), residual)


def chain_product(case: MatmulCase, implementation: Implementation, x: Array, w: Array) -> Array:
    """The product of the chain without bias and residual, and the kernel that adds its splits."""
    chain = chain_of(implementation)
    if case.gated:
        return chain.gated(x, w[None])
    sums = chain.summed(x, w[None])
    return chain.total(jnp.zeros(sums.shape[-2:], jnp.float32), sums, None)


def chain_product_rows(implementation: Implementation, cases: Sequence = matmul_cases.DECODER) -> Iterator[Row]:
    for case in map(bare, cases):
        x, w, *_ = case.operands()
        ours = jax.jit(functools.partial(chain_product, case, implementation))
        theirs = jax.jit(functools.partial(plain_matmul, case, bias=None, residual=None))
        yield row(f"chain product {case}", ours, theirs, (x, w), 2 * case.rows * case.inputs * case.outputs)


def bare(case: MatmulCase) -> MatmulCase:
    return dataclasses.replace(case, bias=False, residual=False)


def grouped_rows(implementation: Implementation, cases: Sequence = grouped_cases.DECODER) -> Iterator[Row]:
    for case in cases:
        ours = jax.jit(functools.partial(grouped_matmul, gated=case.gated, implementation=implementation))
        theirs = jax.jit(functools.partial(plain_grouped, case))
        yield row(f"grouped {case}", ours, theirs, case.operands(), 2 * case.rows * case.inputs * case.outputs)


def plain_grouped(case: GroupedCase, x: Array, w: Array, group_sizes: Array) -> Array:
    """XLA's own grouped dot."""
    sums = jax.lax.ragged_dot(x, w.swapaxes(1, 2), group_sizes, preferred_element_type=jnp.float32)
    return finish(jnp.split(sums, 2, axis=1), [], None) if case.gated else sums


def draw_rows(implementation: Implementation, cases: Sequence = draw_cases.DECODER) -> Iterator[Row]:
    for case in cases:
        logits, uniforms = case.operands()
        ours = jax.jit(functools.partial(draw_and_score, implementation=implementation))
        theirs = jax.jit(lambda logits, given, uniforms: plain_draw(logits, uniforms, given))
        yield row(f"draw {case}", ours, theirs, (logits, jnp.full(case.rows, -1), uniforms), 0)


# -- attention --------------------------------------------------------------------------------------------------------


def attention_operands(case: AttentionCase) -> tuple[Array, Pages, PagedBlocks]:
    """(queries, a pool of random pages, blocks), made on the device, because a case fills its pool token by token."""
    r = 1 if case.chunk == 1 else QUERY_BLOCK
    blocks, rows = case.blocks(r)
    keys = jax.random.split(jax.random.key(0), 3)
    shape = int(blocks.tables.max()) + 1, case.num_kv_heads, case.page_size, case.page_width or case.head_dim
    inside = jnp.arange(shape[3]) < case.head_dim
    if case.dtype in EIGHT_BIT:
        pools = [(20 * jax.random.normal(key, shape)).astype(case.dtype) for key in keys[:2]]
        scales = [jnp.full(shape[:2], 0.05, jnp.float32)] * 2
    else:
        pools, scales = [jnp.where(inside, jax.random.normal(key, shape), 0).astype(case.dtype) for key in keys[:2]], []
    q = 2 * jax.random.normal(keys[2], (len(rows), r, case.num_heads, case.head_dim), jnp.float32)
    return q, Pages(*pools, *scales), blocks


def seen_keys(case: AttentionCase) -> int:
    """Pairs of a query and a key that it sees."""
    each = (
        min(position + 1, case.window or position + 1)
        for length in case.lengths
        for position in range(max(length - case.chunk, 0), length)
    )
    return sum(each)


def attention_moved(case: AttentionCase, q: Array) -> float:
    """Bytes of queries and answers, and of the keys and values that some query sees."""
    tokens = sum(min(length, case.chunk - 1 + case.window) if case.window else length for length in case.lengths)
    width = jnp.dtype(case.dtype).itemsize
    return 2 * tokens * case.num_kv_heads * case.head_dim * width + 2 * q.size * q.dtype.itemsize


def plain_attention(case: AttentionCase, q: Array, k: Array, v: Array) -> Array:
    """XLA's own on contexts without pages. q [S, c, H, h], k and v [S, C, K, h]."""
    lengths = jnp.asarray(case.lengths)[:, None]
    positions = lengths - case.chunk + jnp.arange(case.chunk)
    distance = positions[:, :, None] - jnp.arange(k.shape[1])
    mask = (distance >= 0) & (distance < (case.window or k.shape[1]))
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=case.scoring.scale)


def in_a_row(case: AttentionCase, pool: Array, tables: Array) -> Array:
    """Contexts of one length out of their pages, [S, C, K, h]."""
    contexts = pool[tables].swapaxes(2, 3).reshape(len(case.lengths), -1, *pool.shape[1::2])
    return contexts[:, : case.lengths[0], :, : case.head_dim]


def attention_rows(
    implementation: Implementation, cases: Sequence[AttentionCase] = attention_cases.DECODER
) -> Iterator[Row]:
    for case in cases:
        q, pages, blocks = attention_operands(case)
        sinks = case.sinks()
        ours = jax.jit(
            functools.partial(paged_attention, sinks=sinks, scoring=case.scoring, implementation=implementation)
        )
        theirs, sdpa, their_operands = None, None, ()
        if case.dtype not in EIGHT_BIT and not case.has_sinks and case.soft_cap is None and len(set(case.lengths)) == 1:
            chunks = q.reshape(len(case.lengths), -1, *q.shape[2:])[:, : case.chunk]
            their_operands = (
                chunks.astype(case.dtype),
                *(in_a_row(case, pool, blocks.tables) for pool in (pages.keys, pages.values)),
            )
            theirs = jax.jit(functools.partial(plain_attention, case))
            sdpa = dict(
                sequences=len(case.lengths),
                context=case.lengths[0],
                chunk=case.chunk,
                heads=case.num_heads,
                kv_heads=case.num_kv_heads,
                head_dim=case.head_dim,
                dtype=case.dtype,
                window=case.window,
            )
        yield Row(
            f"attention {case}",
            ours,
            theirs,
            (q, pages, blocks),
            their_operands,
            4 * seen_keys(case) * case.num_heads * case.head_dim,
            attention_moved(case, q),
            sdpa=sdpa,
        )


def chain_attention(
    case: AttentionCase, implementation: Implementation, q: Array, pages: Pages, blocks: PagedBlocks
) -> Array:
    """The attention of the chain, in the pages' dtype. Tokens after a block's count may be anything."""
    scaled = (q * (case.scoring.scale * LOG2_E)).astype(pages.keys.dtype).reshape(-1, *q.shape[2:])
    return chain_of(implementation).attend(scaled, pages.keys, pages.values, blocks).reshape(q.shape)


def chain_attention_rows(implementation: Implementation, cases: Sequence[AttentionCase]) -> Iterator[Row]:
    for case, row in zip(cases, attention_rows(implementation, cases), strict=True):
        ours = jax.jit(functools.partial(chain_attention, case, implementation))
        yield dataclasses.replace(row, name=f"chain {row.name}", ours=ours)


def is_plain(case: AttentionCase) -> bool:
    """Whether the chain takes it."""
    extras = case.window, case.soft_cap, case.page_width, case.has_sinks or None
    return extras == (None,) * 4 and case.dtype not in EIGHT_BIT


def kv_write_rows(
    implementation: Implementation, cases: Sequence[AttentionCase] = attention_cases.DECODER
) -> Iterator[Row]:
    """In place, WRITES times in a call; XLA's own is a scatter."""
    for case in filter(is_written_alone, cases):
        q, pages, blocks = attention_operands(case)
        k, v = (q[:, :, : case.num_kv_heads].astype(case.dtype) + part for part in (0, 1))
        yield Row(
            f"kv_write {case}",
            many_times(functools.partial(kv_write, implementation=implementation)),
            many_times(scatter),
            (pages, k, v, blocks),
            (pages, k, v, blocks),
            0,
            2 * size_of((k, v)),
            calls=WRITES,
        )


def is_written_alone(case: AttentionCase) -> bool:
    """Whether a write is nothing but copying: no scales, and pages as wide as heads."""
    return case.dtype not in EIGHT_BIT and not case.page_width


def many_times(write: Callable) -> Callable:
    def run(pages: Pages, k: Array, v: Array, blocks: PagedBlocks) -> Pages:
        return jax.lax.fori_loop(0, WRITES, lambda _, pages: write(pages, k, v, blocks), pages)

    return jax.jit(run)


def scatter(pages: Pages, k: Array, v: Array, blocks: PagedBlocks) -> Pages:
    positions = blocks.starts[:, None] + jnp.arange(k.shape[1])
    size = pages.keys.shape[2]
    ids = jnp.take_along_axis(blocks.tables[blocks.slots], positions // size, axis=1)
    ids = jnp.where(jnp.arange(k.shape[1]) < blocks.counts[:, None], ids, pages.keys.shape[0])

    def put(pool: Array, x: Array) -> Array:
        return pool.at[ids, :, positions % size, : x.shape[-1]].set(x, mode="drop")

    return pages._replace(keys=put(pages.keys, k), values=put(pages.values, v))
