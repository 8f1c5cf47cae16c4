"""Paged attention and KV write, compiled by the TPU's and the GPU's own compilers on a machine that has neither.

machines.py says how to run them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import machines
import pytest

from pallas_kernels.cases.attention import BIG, DECODER, AttentionCase
from pallas_kernels.kv_write import kv_write
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention_inputs import EIGHT_BIT
from sharding.topology import compile_ahead

pytestmark = pytest.mark.aot
target, mesh, kernels, report = machines.target, machines.mesh, machines.kernels, machines.report  # fixtures


def block_length(case: AttentionCase) -> int:
    return 1 if case.chunk == 1 else 16


@pytest.mark.parametrize("case", DECODER, ids=str)
def test_paged_attention(case, mesh, kernels, report):
    @jax.jit
    def run(q, pages, blocks, sinks):
        return paged_attention(q, pages, blocks, sinks=sinks, scoring=case.scoring, implementation=kernels)

    pages = case.abstract(1)[1]
    compiled = report(compile_ahead(mesh, run, *case.abstract(block_length(case))))
    assert any(name.startswith("paged_attention_") for name in compiled.kernels)
    assert compiled.workspace_bytes < pages.keys.size * pages.keys.dtype.itemsize, "the pool is copied"


def test_tables_of_long_contexts(mesh, kernels, report):
    """The tables are larger than a TPU's scalar memory."""
    case = dataclasses.replace(BIG, lengths=(32_768,) * 256, page_size=32)
    run = jax.jit(functools.partial(paged_attention, scoring=case.scoring, implementation=kernels))
    assert report(compile_ahead(mesh, run, *case.abstract(1)[:3])).kernels


@pytest.mark.parametrize("case", DECODER, ids=str)
def test_kv_write(case, mesh, kernels, report):
    q, pages, blocks, _ = case.abstract(block_length(case))
    dtype = jnp.float32 if case.dtype in EIGHT_BIT else pages.keys.dtype
    new = jax.ShapeDtypeStruct((*q.shape[:2], case.num_kv_heads, case.head_dim), dtype)
    run = jax.jit(functools.partial(kv_write, implementation=kernels), donate_argnums=0)
    compiled = report(compile_ahead(mesh, run, pages, new, new, blocks))
    assert any(name.startswith("kv_write_") for name in compiled.kernels)
    assert compiled.workspace_bytes < pages.keys.size * pages.keys.dtype.itemsize, "the pool is copied"
