"""Kernels at their cases: what is called, and what is taken for a part of the rows."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array
from kernel_rows import attention_operands, bare, chain_attention, chain_product, our_matmul

from pallas_kernels.cases.attention import AttentionCase
from pallas_kernels.cases.draw import DrawCase
from pallas_kernels.cases.grouped_matmul import GroupedCase
from pallas_kernels.cases.matmul import MatmulCase
from pallas_kernels.draw import draw_and_score
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.implementations import Implementation
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention_inputs import EIGHT_BIT, PagedBlocks


class Chain(NamedTuple):
    """A case of the chain's kernels."""

    case: MatmulCase | AttentionCase

    def __str__(self) -> str:
        return f"chain {name_of(self.case)}"


Case = MatmulCase | GroupedCase | DrawCase | AttentionCase | Chain
# How far a kernel may be from float32, over the largest value. A product's inputs are exact in float32; attention
# rounds queries and weights to the pages' dtype.
PRODUCT_LIMIT = 1e-4
ATTENTION_LIMITS = {"float32": 1e-4, "float16": 1e-2}
ROUNDED_LIMIT = 5e-2


class Subject(NamedTuple):
    """A kernel's call on all rows of a case."""

    run: Callable  # (implementation, *operands) -> an array or several, a row a row
    operands: tuple
    cut: Callable[[slice], tuple]  # operands of some rows
    rows: int
    number: Callable[[Any], Array]  # what of the results is compared with float32
    limit: float
    twin: Callable  # as `run`, for the twin's implementation


def subject_of(case: Case) -> Subject:
    return MAKERS[type(case)](case)


def name_of(case: Case) -> str:
    names = {MatmulCase: "matmul", GroupedCase: "grouped", DrawCase: "draw", AttentionCase: "attention"}
    return f"{names[type(case)]} {case}" if type(case) in names else str(case)


def whole(out: Array) -> Array:
    return out


def of_matmul(case: MatmulCase) -> Subject:
    x, w, bias, residual = case.operands()

    def cut(rows: slice) -> tuple:
        return x[rows], w, bias, None if residual is None else residual[rows]

    run = functools.partial(our_matmul, case)
    return Subject(run, (x, w, bias, residual), cut, case.rows, whole, PRODUCT_LIMIT, run)


def of_grouped(case: GroupedCase) -> Subject:
    x, w, sizes = case.operands()
    ends = jnp.cumsum(sizes)

    def run(implementation: Implementation, x: Array, w: Array, sizes: Array) -> Array:
        return grouped_matmul(x, w, sizes, gated=case.gated, implementation=implementation)

    def cut(rows: slice) -> tuple:
        own = jnp.minimum(ends, rows.stop) - jnp.maximum(ends - sizes, rows.start)
        return x[rows], w, jnp.maximum(own, 0)

    return Subject(run, (x, w, sizes), cut, case.rows, whole, PRODUCT_LIMIT, run)


def of_draw(case: DrawCase) -> Subject:
    """A token may differ from the twin's where a uniform lies on its edge, so the log-mass is compared."""
    logits, uniforms = case.operands()

    def run(implementation: Implementation, logits: Array, uniforms: Array) -> tuple[Array, Array, Array]:
        out = draw_and_score(logits, jnp.full(len(logits), -1), uniforms, implementation=implementation)
        return out.tokens, out.logprobs, out.log_masses

    def cut(rows: slice) -> tuple:
        return logits[rows], uniforms[rows]

    def log_masses(out: tuple[Array, Array, Array]) -> Array:
        return out[2]

    return Subject(run, (logits, uniforms), cut, case.rows, log_masses, PRODUCT_LIMIT, run)


def of_attention(case: AttentionCase) -> Subject:
    """A block's tokens alone are blocks of one token, as in decoding."""
    q, pages, blocks = attention_operands(case)
    sinks, tokens = case.sinks(), jnp.arange(q.shape[1])

    def run(implementation: Implementation, q: Array, pages: Any, blocks: PagedBlocks) -> Array:
        return paged_attention(q, pages, blocks, scoring=case.scoring, sinks=sinks, implementation=implementation)

    def cut(rows: slice) -> tuple:
        starts = (blocks.starts[rows, None] + tokens).reshape(-1)
        counts = (tokens < blocks.counts[rows, None]).astype(jnp.int32).reshape(-1)
        slots = jnp.repeat(blocks.slots[rows], len(tokens))
        own = PagedBlocks(blocks.tables, slots, starts, counts, jnp.int32(len(starts)))
        return q[rows].reshape(-1, 1, *q.shape[2:]), pages, own

    limit = ATTENTION_LIMITS.get(case.dtype, ROUNDED_LIMIT)
    return Subject(run, (q, pages, blocks), cut, len(q), whole, limit, run)


def of_chain(chain: Chain) -> Subject:
    """The products' twin is the matrix product's, attention's is that of paged attention."""
    if isinstance(chain.case, AttentionCase):
        return of_attention(chain.case)._replace(run=functools.partial(chain_attention, chain.case))
    case = bare(chain.case)
    x, w, *_ = case.operands()

    def twin(implementation: Implementation, x: Array, w: Array) -> Array:
        return our_matmul(case, implementation, x, w, None, None)

    def cut(rows: slice) -> tuple:
        return x[rows], w

    limit = ROUNDED_LIMIT if case.gated else PRODUCT_LIMIT  # what is gated is rounded to the weights' dtype
    return Subject(functools.partial(chain_product, case), (x, w), cut, case.rows, whole, limit, twin)


MAKERS: dict[type, Callable[[Any], Subject]] = {
    MatmulCase: of_matmul,
    GroupedCase: of_grouped,
    DrawCase: of_draw,
    AttentionCase: of_attention,
    Chain: of_chain,
}


def widened(subject: Subject) -> tuple:
    """The operands with their numbers as float32; 8-bit pages stay, because their scales belong to them."""
    leaves = jax.tree.leaves(subject.operands)
    if any(leaf.dtype.name in EIGHT_BIT for leaf in leaves):
        return subject.operands
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: x.astype(jnp.float32) if is_float(x) else x, subject.operands)


def smaller(case: AttentionCase, sequences: int, context: int) -> AttentionCase:
    """The case with fewer and shorter contexts, since a twin takes its time, and pages that divide every tile."""
    lengths = tuple(context - 7 * i for i in range(sequences))
    return dataclasses.replace(case, lengths=lengths, page_size=min(case.page_size, 32))
