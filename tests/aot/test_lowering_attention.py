"""Paged attention and KV write, compiled by the TPU's and the GPU's own compilers on a machine that has neither.

Run in environments of their own: `pytest -m aot -k tpu` with jax[tpu], `-k gpu` with jax[cuda13] (sharding/topology.py says what it wants).
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.cases.attention import BIG, DECODER, AttentionCase
from pallas_kernels.implementations import choose
from pallas_kernels.kv_write import kv_write
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention_inputs import EIGHT_BIT
from sharding.topology import TARGETS, compile_ahead, mesh_of, missing

pytestmark = pytest.mark.aot
NAMES = {name: f"{'tpu' if target.platform == 'tpu' else 'gpu'}-{name}" for name, target in TARGETS.items()}
H100 = Path(__file__).parent / "targets" / "h100.pbtxt"


@pytest.fixture(scope="module", params=TARGETS, ids=NAMES.get)
def target(request) -> str:
    reason = missing(request.param)
    if reason:
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def mesh(target):
    return mesh_of(target, gpu_config=H100.read_text())


@pytest.fixture(scope="module")
def kernels(target, mesh):
    """The target's own implementation."""
    return choose(
        "pallas_gpu" if TARGETS[target].platform == "cuda" else "pallas_tpu", mesh.devices.flat[0].device_kind
    )


@pytest.fixture
def report(target, request, capsys):
    """Prints what a compiled program takes, past pytest's capture."""

    def say(compiled):
        with capsys.disabled():
            print(f"\n{target} {request.node.name}: {compiled}", end="")
        return compiled

    return say


def block_length(case: AttentionCase) -> int:
    return 1 if case.chunk == 1 else 16


@pytest.mark.parametrize("case", DECODER, ids=str)
def test_paged_attention(case, mesh, kernels, report):
    attend = functools.partial(paged_attention, scoring=case.scoring, implementation=kernels)
    run = jax.jit(lambda q, pages, blocks, sinks: attend(q, pages, blocks, sinks=sinks))
    pages = case.abstract(1)[1]
    compiled = report(compile_ahead(mesh, run, *case.abstract(block_length(case))))
    assert any(name.startswith("paged_attention_") for name in compiled.kernels)
    assert compiled.workspace_bytes < pages.keys.size * pages.keys.dtype.itemsize, "the pool is copied"


def test_tables_of_long_contexts(mesh, kernels, report):
    """More of them than a TPU's scalar memory holds."""
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
