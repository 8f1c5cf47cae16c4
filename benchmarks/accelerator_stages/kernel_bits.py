"""Every kernel: a row alone against the same row in a batch, by bits, and the whole against the kernel's twin.

The twin is given the same numbers as float32, except for 8-bit pages. On a CPU the GPU's bodies are interpreted, and
one of the TPU's.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from kernel_rows import attention_operands

from accelerator_stages import here
from accelerator_stages.kernel_subjects import Case, smaller, subject_of, widened
from accelerator_stages.measurement import Measurement, Row, Settings
from jaxengine.engine.step_variants import equal_bits
from pallas_kernels import draw, grouped_matmul, kv_write, matmul, paged_attention
from pallas_kernels.cases import attention as attention_cases
from pallas_kernels.cases import draw as draw_cases
from pallas_kernels.cases import grouped_matmul as grouped_cases
from pallas_kernels.cases import matmul as matmul_cases
from pallas_kernels.cases.attention import AttentionCase
from pallas_kernels.cases.draw import DrawCase
from pallas_kernels.cases.grouped_matmul import GroupedCase
from pallas_kernels.cases.matmul import MatmulCase
from pallas_kernels.draw_gpu import draw_gpu
from pallas_kernels.grouped_matmul_gpu import grouped_matmul_gpu
from pallas_kernels.implementations import Implementation
from pallas_kernels.kv_write_gpu import kv_write_gpu
from pallas_kernels.matmul_gpu import matmul_gpu
from pallas_kernels.paged_attention_gpu import paged_attention_gpu

# Those that a decode step has come first. Attention's own cases are cut: its twin loops over every tile.
ATTENTION = tuple(smaller(case, 8, 2048) for case in attention_cases.DECODER)
CASES = (
    [case for case in matmul_cases.DECODER if case.rows in (64, 512)],
    [*ATTENTION, *attention_cases.DECODE, *attention_cases.PREFILL],
    [*draw_cases.DECODER, *draw_cases.SMALL],
    [*grouped_cases.DECODER, *grouped_cases.SMALL],
    matmul_cases.SMALL,
)
WRITTEN = (dataclasses.replace(attention_cases.BIG, lengths=(300,) * 16), AttentionCase((33, 0, 1, 70), chunk=21))
TINY_PRODUCTS = [MatmulCase(19, 130, 48, residual=True)]
TINY = (
    TINY_PRODUCTS,
    [AttentionCase((40, 3), chunk=2)],
    [DrawCase(5, 256)],
    [GroupedCase((3, 0, 4), 130, 48, "float32")],
)
TINY_WRITTEN = (AttentionCase((20, 3), chunk=2, dtype="bfloat16"),)
Bodies = Callable[[], contextlib.AbstractContextManager]  # in which the device's kernels are certain bodies


def measurements(settings: Settings) -> list[Measurement]:
    if here.platform() == "cpu":  # the GPU's bodies are the quicker ones to interpret
        of_tpu = listed("a TPU's ", [TINY_PRODUCTS], (), contextlib.nullcontext)
        return of_tpu + listed("a GPU's ", TINY, TINY_WRITTEN, gpu_bodies)
    if settings.tiny:
        return listed("", TINY, TINY_WRITTEN, contextlib.nullcontext)
    return listed("", CASES, WRITTEN, contextlib.nullcontext)


def listed(
    whose: str, kinds: Sequence[Sequence[Case]], written: Sequence[AttentionCase], bodies: Bodies
) -> list[Measurement]:
    """A case of every kind, then the next of every kind."""
    in_turns = itertools.chain(*itertools.zip_longest(*kinds))
    checks = [
        Measurement(f"{whose}{name_of(case)}", functools.partial(check, case, bodies)) for case in in_turns if case
    ]
    writes = [Measurement(f"{whose}kv_write {case}", functools.partial(check_write, case, bodies)) for case in written]
    return checks[:3] + writes + checks[3:]


def name_of(case: Case) -> str:
    names = {MatmulCase: "matmul", GroupedCase: "grouped", DrawCase: "draw", AttentionCase: "attention"}
    return f"{names[type(case)]} {case}"


@contextlib.contextmanager
def gpu_bodies() -> Iterator[None]:
    """The GPU's bodies in the place of the TPU's, interpreted."""

    def in_splits(body: Callable, *operands: Any) -> Array:
        *arrays, sizes, out_dtype = operands
        own = dataclasses.replace(sizes, columns=64, depth=64, split=128)
        return body(*arrays, own, out_dtype, interpret=True)

    pieces = (
        (matmul, functools.partial(in_splits, matmul_gpu)),
        (grouped_matmul, functools.partial(in_splits, grouped_matmul_gpu)),
        (paged_attention, functools.partial(paged_attention_gpu, interpret=True)),
        (draw, functools.partial(draw_gpu, interpret=True)),
        (kv_write, functools.partial(kv_write_gpu, interpret=True)),
    )
    with contextlib.ExitStack() as stack:
        for module, body in pieces:
            stack.enter_context(mock.patch.dict(module.BODIES, pallas_interpret=body))
        yield


def check(case: Case, bodies: Bodies) -> Iterator[Row]:
    """One kernel at one case."""
    subject, kernels = subject_of(case), here.own_kernels()
    with bodies():
        run = jax.jit(functools.partial(subject.run, kernels))
        out = run(*subject.operands)
        parts = parts_of(subject.rows)
        equal = [same_rows(run(*subject.cut(rows)), out, rows) for rows in parts]
    exact = jax.jit(functools.partial(subject.run, twin()))(*widened(subject))
    off = difference(subject.number(out), subject.number(exact))
    yield {
        "parts as in the batch": f"{sum(equal)} of {len(equal)}",
        "from float32": off,
        "limit": subject.limit,
        "holds": all(equal) and off <= subject.limit,
    }


def twin() -> Implementation:
    """With the sizes of the device's own kernels."""
    return dataclasses.replace(here.own_kernels(), name="xla")


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


def check_write(case: AttentionCase, bodies: Bodies) -> Iterator[Row]:
    """All blocks at once against one after the other, and against the twin: pools of the same bits."""
    q, pages, blocks = attention_operands(case)
    k, v = (q[:, :, : case.num_kv_heads].astype(case.dtype) + part for part in (0, 1))
    with bodies():
        write = jax.jit(functools.partial(kv_write.kv_write, implementation=here.own_kernels()))
        at_once, in_turn = write(pages, k, v, blocks), pages
        for b in range(len(k)):
            own = blocks._replace(
                slots=blocks.slots[b, None], starts=blocks.starts[b, None], counts=blocks.counts[b, None]
            )
            in_turn = write(in_turn, k[b, None], v[b, None], own)
    other = jax.jit(functools.partial(kv_write.kv_write, implementation=twin()))(pages, k, v, blocks)
    alone, as_twin = (same_rows(pools, at_once, slice(None)) for pools in (in_turn, other))
    changed = int(jnp.sum(at_once.keys != pages.keys))
    yield {
        "parts as in the batch": f"{len(k) if alone else 'fewer than ' + str(len(k))} of {len(k)}",
        "from float32": 0.0 if as_twin else "other bits",
        "note": f"{changed} numbers of keys written",
        "holds": alone and as_twin and changed > 0,
    }
