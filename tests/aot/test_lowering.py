"""Kernels and whole steps, compiled by the TPU's and the GPU's own compilers on a machine that has neither.

Run in environments of their own: `pytest -m aot -k tpu` with jax[tpu], `-k gpu` with jax[cuda13] (sharding/topology.py says what it wants).
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import pool_bytes, step_call
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.device import kv_cache
from jaxengine.models import params
from jaxengine.ops.kernels import Kernels, kernels_of
from jaxengine.ops.sharded import sharded
from pallas_kernels.cases.grouped_matmul import GroupedCase
from pallas_kernels.cases.matmul import MatmulCase
from pallas_kernels.cases.sampling import SamplingCase
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.implementations import choose
from pallas_kernels.matmul import matmul
from pallas_kernels.sampling import draw_and_score
from sharding.topology import TARGETS, Compiled, compile_ahead, mesh_of, missing

pytestmark = pytest.mark.aot
NAMES = {name: f"{'tpu' if target.platform == 'tpu' else 'gpu'}-{name}" for name, target in TARGETS.items()}
STEP_TARGETS = pytest.mark.parametrize(  # whole steps for v5p by hand, `-m 'aot and long'`: what differs from v5e are its kernels' tables
    "target",
    [pytest.param(name, marks=pytest.mark.long if name == "v5p" else ()) for name in TARGETS],
    indirect=True,
    ids=NAMES.get,
)
H100 = Path(__file__).parent / "targets" / "h100.pbtxt"

MATMULS = (
    MatmulCase(8, 1024, 4096),
    MatmulCase(512, 1024, 4096),
    MatmulCase(1, 1024, 256, "float32"),
    MatmulCase(64, 2048, 1024, residual=True),
    MatmulCase(64, 4096, 6144, bias=True, residual=True),
    MatmulCase(64, 1024, 6144, gated=True),
    MatmulCase(600, 3072, 1024, "float32", bias=True),
    MatmulCase(100, 200, 96),
    MatmulCase(24, 200, 48, "float32", gated=True),
)
GROUPED = (
    GroupedCase((4,) * 128, 2048, 1536, gated=True),
    GroupedCase((32,) * 16, 768, 2048),
    GroupedCase((3, 0, 5), 200, 96, "float32"),
)
MODEL = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=32_000,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=4096,
    qk_norm=True,
    tie_word_embeddings=True,
    reduction_leaves=4,
    dtype="bfloat16",
)
ENGINE = EngineConfig(max_num_seqs=32, max_model_len=2048, num_pages=4096)
SAMPLING = (SamplingCase(8, 151_936), SamplingCase(64, 128_256), SamplingCase(1, 1024), SamplingCase(3, 262_144))


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


@pytest.mark.parametrize("case", MATMULS, ids=str)
def test_matmul(case, mesh, kernels, report):
    x, w, bias, residual = jax.eval_shape(case.operands)
    run = functools.partial(matmul, gated=case.gated, implementation=kernels)
    compiled = report(
        compile_ahead(mesh, jax.jit(lambda x, w, b, r: run(x, w, bias=b, residual=r)), x, w, bias, residual)
    )
    assert any(name.startswith("matmul_") for name in compiled.kernels)


def test_matmul_of_leaves(mesh, kernels, report):
    x, w, *_ = jax.eval_shape(MATMULS[0].operands)
    leaves = [jax.ShapeDtypeStruct((4, *a.shape), a.dtype) for a in (x, w)]
    compiled = report(
        compile_ahead(mesh, jax.jit(jax.vmap(functools.partial(matmul, implementation=kernels))), *leaves)
    )
    assert any(name.startswith("matmul_") for name in compiled.kernels)


@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_grouped_matmul(case, mesh, kernels, report):
    x, w, sizes = jax.eval_shape(case.operands)
    run = functools.partial(grouped_matmul, gated=case.gated, implementation=kernels)
    assert any(
        name.startswith("grouped_matmul_") for name in report(compile_ahead(mesh, jax.jit(run), x, w, sizes)).kernels
    )


@pytest.mark.parametrize("case", SAMPLING, ids=str)
def test_sampling_tail(case, mesh, kernels, report):
    logits, uniforms = jax.eval_shape(case.operands)
    given = jax.ShapeDtypeStruct((case.rows,), jnp.int32)
    run = functools.partial(draw_and_score, implementation=kernels)
    assert any(
        name.startswith("sampling_")
        for name in report(compile_ahead(mesh, jax.jit(run), logits, given, uniforms)).kernels
    )


def compiled_step(kind: str, mesh: Mesh, ops: Kernels, state: tuple) -> Compiled:
    step, inputs, static = step_call(kind, ENGINE)
    return compile_ahead(mesh, step, *state, *inputs, model_config=MODEL, kernels=ops, **static)


def assert_kernels(compiled: Compiled) -> None:
    """Each layer's four products, attention and write are there, the head's product and the draw. On a GPU one may be two kernels."""
    calls = lambda name: sum(kernel.startswith(name) for kernel in compiled.kernels)
    layers = MODEL.num_hidden_layers
    assert calls("matmul_") >= 4 * layers + 1 and calls("paged_attention_") >= layers and calls("kv_write_") == layers
    assert calls("sampling_") >= 1


@STEP_TARGETS
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_step(kind, mesh, kernels, report):
    """A whole step of a 4-layer model on the device's own kernels."""
    ops = kernels_of(kernels)
    state = params.abstract(MODEL), kv_cache.abstract(MODEL, ENGINE, ops)
    compiled = report(compiled_step(kind, mesh, ops, state))
    weights_and_pages = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert compiled.argument_bytes >= weights_and_pages
    assert compiled.workspace_bytes < pool_bytes(state[1]), "the step copies what it should update in place"
    assert_kernels(compiled)


@STEP_TARGETS
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_step_sharded(kind, target, kernels, report):
    """The same steps on four devices, each with a leaf of its own: they gather, and no sum of floats goes over the wire."""
    if TARGETS[target].platform == "cuda":
        pytest.skip("the GPU that is described here is one alone")
    mesh = mesh_of(target, MODEL.reduction_leaves)
    ops = sharded(kernels_of(kernels), mesh, "devices")
    split = lambda _, p: NamedSharding(mesh, PartitionSpec("devices" if p.axes[0] == "leaf" else None))
    weights = jax.tree.map(
        lambda x, sharding: x.update(sharding=sharding), params.abstract(MODEL), params.map_declared(split, MODEL)
    )
    state = weights, kv_cache.abstract(MODEL, ENGINE, ops)
    compiled = report(compiled_step(kind, mesh, ops, state))
    shared = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim > 1)
    assert shared / 4 <= compiled.argument_bytes < shared / 4 + 2**20, "a device holds more than its leaves"
    assert compiled.workspace_bytes < pool_bytes(state[1]) / 4
    assert_kernels(compiled)


def test_plain_xla_has_no_kernel(mesh):
    """The test of the tests: a program without a Pallas kernel is seen to have none."""
    x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
    assert compile_ahead(mesh, jax.jit(lambda x: x @ x.T), x).kernels == ()


def test_a_broken_kernel_is_refused(mesh, target):
    """A kernel that the interpreter runs and the hardware cannot: a sort inside."""

    def body(x_ref, out_ref):
        out_ref[...] = jnp.sort(x_ref[...], axis=0)

    broken = lambda x: pl.pallas_call(body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)
    with pytest.raises(NotImplementedError, match="sort"):
        compile_ahead(mesh, jax.jit(broken), jax.ShapeDtypeStruct((64, 128), jnp.float32))
