"""Every kernel: a row alone against the same row in a batch, by bits, and the whole against the kernel's twin.

The twin is given the same numbers as float32, except for 8-bit pages. A CPU interprets some of a TPU's kernels and some
of a GPU's.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from kernel_rows import attention_operands, is_plain

from accelerator_stages import here
from accelerator_stages.kernel_subjects import Case, Chain, name_of, smaller, subject_of, widened
from accelerator_stages.measurement import Measurement, Row, Settings
from jaxengine.engine.step_variants import equal_bits
from pallas_kernels.cases import attention as attention_cases
from pallas_kernels.cases import draw as draw_cases
from pallas_kernels.cases import grouped_matmul as grouped_cases
from pallas_kernels.cases import matmul as matmul_cases
from pallas_kernels.cases.attention import AttentionCase
from pallas_kernels.cases.draw import DrawCase
from pallas_kernels.cases.grouped_matmul import GroupedCase
from pallas_kernels.cases.matmul import MatmulCase
from pallas_kernels.implementations import Implementation, choose
from pallas_kernels.kv_write import kv_write
from pallas_kernels.paged_attention_inputs import PagedBlocks

# Those that a decode step has come first. Attention's own cases are cut: its twin loops over every tile.
ATTENTION = tuple(smaller(case, 8, 2048) for case in attention_cases.DECODER)
PRODUCTS = [case for case in matmul_cases.DECODER if case.rows in (64, 512)]
CHAIN = (list(map(Chain, PRODUCTS)), [Chain(case) for case in ATTENTION if is_plain(case)])
CASES = (
    PRODUCTS,
    [*ATTENTION, *attention_cases.DECODE, *attention_cases.PREFILL],
    [*draw_cases.DECODER, *draw_cases.SMALL],
    [*grouped_cases.DECODER, *grouped_cases.SMALL],
    matmul_cases.SMALL,
)
WRITTEN = (dataclasses.replace(attention_cases.BIG, lengths=(300,) * 16), AttentionCase((38, 0, 1, 70), chunk=22))
TINY_PRODUCT = MatmulCase(19, 130, 48, residual=True)
TINY = ([TINY_PRODUCT], [GroupedCase((3, 0, 4), 130, 48, "float32")])
TINY_CHAIN = ([Chain(TINY_PRODUCT)], [Chain(AttentionCase((40, 30, 1)))], [DrawCase(5, 256)])
TINY_WRITTEN = (AttentionCase((20, 3), chunk=4, dtype="bfloat16"),)


def measurements(settings: Settings) -> list[Measurement]:
    if here.platform() == "cpu":
        of_tpu, of_gpu = choose("pallas_interpret"), choose("pallas_gpu_interpret")
        of_a_tpu = listed("a TPU's ", (*TINY_CHAIN, *TINY), (), of_tpu)
        return of_a_tpu + listed("a GPU's ", TINY_CHAIN, TINY_WRITTEN, of_gpu)
    kinds = (*TINY_CHAIN, *TINY) if settings.tiny else (*CHAIN, *CASES)
    return listed("", kinds, TINY_WRITTEN if settings.tiny else WRITTEN, here.own_kernels())


def listed(
    whose: str, kinds: Sequence[Sequence[Case]], written: Sequence[AttentionCase], kernels: Implementation
) -> list[Measurement]:
    """A case of every kind, then the next of every kind; the writes come early."""
    in_turns = filter(None, itertools.chain(*itertools.zip_longest(*kinds)))
    checks = [Measurement(f"{whose}{name_of(case)}", functools.partial(check, case, kernels)) for case in in_turns]
    writes = [Measurement(f"{whose}kv_write {case}", functools.partial(check_write, case, kernels)) for case in written]
    return checks[: len(kinds)] + writes + checks[len(kinds) :]


def check(case: Case, kernels: Implementation) -> Iterator[Row]:
    """One kernel at one case."""
    subject = subject_of(case)
    run = jax.jit(functools.partial(subject.run, kernels))
    out = run(*subject.operands)
    parts = parts_of(subject.rows)
    equal = [same_rows(run(*subject.cut(rows)), out, rows) for rows in parts]
    exact = jax.jit(functools.partial(subject.twin, twin_of(kernels)))(*widened(subject))
    off = difference(subject.number(out), subject.number(exact))
    yield {
        "parts as in the batch": f"{sum(equal)} of {len(equal)}",
        "from float32": off,
        "limit": subject.limit,
        "holds": all(equal) and off <= subject.limit,
    }


def twin_of(kernels: Implementation) -> Implementation:
    """With the sizes of the kernels' own device."""
    return dataclasses.replace(kernels, name="xla")


def parts_of(rows: int) -> list[slice]:
    """The first row, the last one, and some in the middle, or one where there are few."""
    middle = rows // 3
    return [slice(0, 1), slice(rows - 1, rows), slice(middle, middle + (5 if rows > 8 else 1))]


def same_rows(part: Any, out: Any, rows: slice) -> bool:
    """Whether the results of a part are those rows of the whole; tokens of a block may be rows of their own."""
    pairs = zip(jax.tree.leaves(part), jax.tree.leaves(out), strict=True)
    return all(equal_bits(np.asarray(a).reshape(b[rows].shape), np.asarray(b[rows])) for a, b in pairs)


def difference(a: Array, b: Array) -> float:
    """The largest, over the largest value."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.abs(a - b).max() / np.abs(b).max())


def check_write(case: AttentionCase, kernels: Implementation) -> Iterator[Row]:
    """All blocks at once against one after the other, and against the twin: pools of the same bits."""
    q, pages, blocks = attention_operands(case)
    k, v = (q[:, :, : case.num_kv_heads].astype(case.dtype) + part for part in (0, 1))
    write, twin = (jax.jit(functools.partial(kv_write, implementation=own)) for own in (kernels, twin_of(kernels)))
    at_once, in_turn = write(pages, k, v, blocks), pages
    for b in range(len(k)):
        one = PagedBlocks(blocks.tables, *(x[b, None] for x in blocks[1:4]), jnp.int32(1))
        in_turn = write(in_turn, k[b, None], v[b, None], one)
    alone, as_twin = (same_rows(pools, at_once, slice(None)) for pools in (in_turn, twin(pages, k, v, blocks)))
    changed = int(jnp.sum(at_once.keys != pages.keys))
    yield {
        "parts as in the batch": f"{len(k) if alone else 'fewer than ' + str(len(k))} of {len(k)}",
        "from float32": 0.0 if as_twin else "other bits",
        "note": f"{changed} numbers of keys written",
        "holds": alone and as_twin and changed > 0,
    }
