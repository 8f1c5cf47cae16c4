"""Kernels and whole steps, compiled by the TPU's and the GPU's own compilers on a machine that has neither.

machines.py says how to run them.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import machines
import pytest
from conftest import pool_bytes, step_call
from jax.experimental import pallas as pl
from jax.sharding import Mesh

from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.device import kv_cache, steps
from jaxengine.device.needs import Needs
from jaxengine.engine.memory import abstract_weights
from jaxengine.models import params
from jaxengine.ops.kernels import Kernels, checked_for, kernels_of, sharded
from jaxengine.ops.tiles import ROW_UNIT, Tile
from pallas_kernels.cases.draw import DrawCase
from pallas_kernels.cases.grouped_matmul import GroupedCase
from pallas_kernels.cases.matmul import MatmulCase
from pallas_kernels.chain import chain_of
from pallas_kernels.draw import draw_and_score
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.matmul import matmul
from pallas_kernels.truncation import kept
from sharding.gpu_program import GpuProgram
from sharding.mesh import make_mesh
from sharding.topology import TARGETS, Compiled, compile_ahead, devices_of

pytestmark = pytest.mark.aot
target, mesh, kernels, report = machines.target, machines.mesh, machines.kernels, machines.report  # fixtures
# Whole steps for v5p are compiled by hand, `-m 'aot and long'`: it differs from v5e in its kernels' sizes alone.
TARGETS_OF_STEPS = [pytest.param(name, marks=pytest.mark.long if name == "v5p" else ()) for name in TARGETS]
GPU = pytest.mark.parametrize("target", ["h100"], indirect=True, ids=machines.NAMES.get)
STEP_TARGETS = pytest.mark.parametrize("target", TARGETS_OF_STEPS, indirect=True, ids=machines.NAMES.get)

MATMULS = (
    MatmulCase(8, 1024, 4096),
    MatmulCase(512, 1024, 4096),
    MatmulCase(1, 1024, 256, "float32"),
    MatmulCase(64, 2048, 1024, residual=True),
    MatmulCase(64, 4096, 6144, bias=True, residual=True),
    MatmulCase(64, 1024, 6144, gated=True),
    MatmulCase(1024, 2048, 8192, residual=True, gated=True),  # what takes the most VMEM
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
# Kernels with libdevice's cosine and sine, or logarithm, which fuse multiplications and additions within themselves.
OF_LIBDEVICE = "chain_heads", "draw_gpu_draw", "truncation"
DRAWS = (DrawCase(8, 151_936), DrawCase(64, 128_256), DrawCase(1, 1024), DrawCase(3, 262_144))


@pytest.mark.parametrize("case", MATMULS, ids=str)
def test_matmul(case, mesh, kernels, report):
    @jax.jit
    def run(x, w, bias, residual):
        return matmul(x, w, bias=bias, residual=residual, gated=case.gated, implementation=kernels)

    assert calls(report(compile_ahead(mesh, run, *jax.eval_shape(case.operands))), "matmul_")


def test_matmul_of_leaves(mesh, kernels, report):
    x, w, *_ = jax.eval_shape(MATMULS[0].operands)
    weights = jax.ShapeDtypeStruct((4, *w.shape), w.dtype)
    run = jax.jit(functools.partial(matmul, implementation=kernels))
    assert calls(report(compile_ahead(mesh, run, x, weights)), "matmul_")


@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_grouped_matmul(case, mesh, kernels, report):
    run = jax.jit(functools.partial(grouped_matmul, gated=case.gated, implementation=kernels))
    assert calls(report(compile_ahead(mesh, run, *jax.eval_shape(case.operands))), "grouped_matmul_")


@pytest.mark.parametrize("case", DRAWS, ids=str)
def test_draw_and_score(case, mesh, kernels, report):
    logits, uniforms = jax.eval_shape(case.operands)
    given = jax.ShapeDtypeStruct((case.rows,), jnp.int32)
    run = jax.jit(functools.partial(draw_and_score, implementation=kernels))
    assert calls(report(compile_ahead(mesh, run, logits, given, uniforms)), "draw_")


@GPU
@pytest.mark.parametrize("case", DRAWS, ids=str)
def test_truncation(case, mesh, kernels, report):
    """TPUs have no kernel of their own for it."""
    logits, _ = jax.eval_shape(case.operands)
    per_row = [jax.ShapeDtypeStruct((case.rows,), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)]
    compiled = report(compile_ahead(mesh, jax.jit(functools.partial(kept, implementation=kernels)), logits, *per_row))
    assert calls(compiled, "truncation") == 1


def calls(compiled: Compiled, name: str) -> int:
    """How many kernels the program calls whose names begin with `name`."""
    return sum(kernel.startswith(name) for kernel in compiled.kernels)


def compiled_step(
    kind: str, mesh: Mesh, ops: Kernels, state: tuple, needs: Needs = Needs.PLAIN, model_config: ModelConfig = MODEL
) -> Compiled:
    step, inputs, static = step_call(kind, ENGINE, needs=needs)
    if mesh.devices.flat[0].platform != "tpu":
        step = steps.captured(step)
        static |= dict(tile=Tile(1, ROW_UNIT)) if kind == "decode" else {}
    return compile_ahead(mesh, step, *state, *inputs, model_config=model_config, kernels=ops, **static)


def assert_kernels(compiled: Compiled) -> None:
    """A layer has four products, attention and a write; a step the head and the draw."""
    layers = MODEL.num_hidden_layers
    if compiled.gpu is not None:
        assert_chain(compiled.gpu, layers)
        assert_pinned(compiled.gpu)
        assert_float_operations(compiled)
        return
    # The head's tiles are a loop, as are a prefill's copies of forks' pages.
    assert compiled.conditionals == 0 and compiled.loops <= 6
    assert_float_operations(compiled)
    assert calls(compiled, "matmul_") == 4 * layers + 1
    assert calls(compiled, "chain_settle") == 2 * layers + 1 and calls(compiled, "chain_heads") == layers
    assert calls(compiled, "paged_attention_") == calls(compiled, "kv_write_") == layers
    assert calls(compiled, "draw_") >= 1


def assert_chain(program: GpuProgram, layers: int) -> None:
    """On a GPU a step is one command buffer with no conditional, and a layer at most ten kernels, between which XLA
    only copies."""
    assert program.pieces == 1 and program.steered == program.conditionals == 0, str(program)
    chain = [name.startswith("chain_") or name == "kCopy" for name in program.straight]
    first = next(i for i, name in enumerate(program.straight) if name.startswith("chain_"))
    last = max(i for i, name in enumerate(program.straight) if name.startswith("chain_")) + 1
    launches = program.straight[first:last]
    assert all(chain[first:last]), [name for name in launches if not name.startswith("chain_")]
    assert launches.count("chain_gated") + launches.count("chain_silu") == layers
    assert len(launches) <= 10 * layers + 4, launches


def assert_pinned(program: GpuProgram) -> None:
    """On a GPU no kernel spills or adds by atomics, and none of Pallas' leaves a rounding open."""
    for kernel in program.kernels:
        assert kernel.spilled == kernel.float_atomics == kernel.unpinned == 0, kernel
        assert kernel.fused == 0 or kernel.symbol in OF_LIBDEVICE or "fusion" in kernel.symbol, kernel


def assert_float_operations(compiled: Compiled) -> None:
    """Beside the kernels XLA multiplies logits by the temperatures' reciprocals, and makes uniforms of random bits,
    nothing else.

    What has no source is how a TPU's collectives and reductions combine two numbers.
    """
    sources = [operation.source.rpartition("/")[2] for operation in compiled.float_operations if operation.source]
    assert sorted(sources) == ["div", "mul", "sub"]


@pytest.mark.parametrize("rows, width, outputs, leaves", [(8, 1024, 2080, 1), (24, 200, 96, 2), (100, 72, 40, 4)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_chain(rows, width, outputs, leaves, dtype, mesh, kernels, report):
    """Its products and what stands between them, of few rows and of widths that fill no tile."""
    chain = chain_of(kernels)
    x, norm = jax.ShapeDtypeStruct((rows, width), jnp.float32), jax.ShapeDtypeStruct((width,), dtype)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    w = jax.ShapeDtypeStruct((leaves, outputs, width), dtype)

    def run(x, norm, w, count):
        stream, (y, *_) = chain.settle(x, None, norm, norm, 1e-6, w.dtype, live=count)
        _, parts = chain.settle(x, None, None, norm, 1e-6, w.dtype, 3 if dtype == "bfloat16" else 1)
        sums = chain.summed(jnp.tile(y, leaves), w, count)
        others = chain.outputs(y, w[0], count), chain.gated(y, w, count), chain.finished(parts, w[0])
        return chain.total(jnp.zeros(sums.shape[2:]), sums, None), stream, others

    compiled = report(compile_ahead(mesh, jax.jit(run), x, norm, w, count))
    assert len(compiled.calls) >= 6  # of one leaf a GPU's first two products are one
    if compiled.gpu is not None and dtype == "bfloat16":  # a dot of float32 is multiplications that are added at once
        assert_pinned(compiled.gpu)


@STEP_TARGETS
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_layer(kind, mesh, kernels, report):
    """What one of three layers adds to a step of two: kernels, and on a TPU what copies and names arrays for them."""
    ops, programs = kernels_of(kernels), []
    for layers in (2, 3):
        model_config = dataclasses.replace(MODEL, num_hidden_layers=layers)
        state = params.abstract(model_config), kv_cache.abstract(model_config, ENGINE, ops)
        programs.append(report(compiled_step(kind, mesh, ops, state, model_config=model_config)))
    two, three = programs
    own, launches = len(three.calls) - len(two.calls), three.launches - two.launches
    assert len(three.float_operations) == len(two.float_operations)
    assert 0 < own <= 10 and three.loops == two.loops
    if three.gpu is None:
        assert launches <= 50
    else:
        assert launches == own + 2 * (kind == "prefill")  # keys' and values' pages of forks


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


@GPU
@pytest.mark.parametrize("needs", [Needs.CUT, Needs.ALL])
def test_step_that_can_do_more(needs, mesh, kernels, report):
    """Whatever a GPU's decode step can do beside, nothing branches, and one kernel cuts the vocabulary."""
    ops = kernels_of(kernels)
    state = params.abstract(MODEL), kv_cache.abstract(MODEL, ENGINE, ops)
    compiled = report(compiled_step("decode", mesh, ops, state, needs))
    assert compiled.gpu is not None and compiled.gpu.straight.count("truncation") == 1
    assert_chain(compiled.gpu, MODEL.num_hidden_layers)
    assert_pinned(compiled.gpu)
    if needs == Needs.CUT:
        assert_float_operations(compiled)


@STEP_TARGETS
@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_step_sharded(kind, target, kernels, report):
    """The same steps on four devices, each with a leaf of its own: they gather, and send no sum of floats."""
    mesh = make_mesh(tensor=MODEL.reduction_leaves, devices=devices_of(TARGETS[target]))
    own = kernels_of(kernels)
    ops = sharded(own, checked_for(MODEL, own, mesh))
    state = abstract_weights(MODEL, ops), kv_cache.abstract(MODEL, ENGINE, ops)
    compiled = report(compiled_step(kind, mesh, ops, state))
    shared = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim > 1)
    assert shared / 4 <= compiled.argument_bytes < shared / 4 + 2**20, "a device holds more than its leaves"
    assert compiled.workspace_bytes < pool_bytes(state[1]) / 4
    if compiled.gpu is None:
        assert_kernels(compiled)
        return
    assert_pinned(compiled.gpu)
    assert_float_operations(compiled)
    # Collectives stand outside command buffers, so that there are many; a layer is the same few kernels as on one
    # device, and one more for each sum that travels.
    chain = [name for name in compiled.gpu.straight if name.startswith("chain_")]
    assert (
        compiled.gpu.conditionals == 0 and 8 * MODEL.num_hidden_layers < len(chain) <= 12 * MODEL.num_hidden_layers + 4
    )


def test_plain_xla_has_no_kernel(mesh):
    """A test of these tests: a program without a Pallas kernel is reported to have none."""
    x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
    assert compile_ahead(mesh, jax.jit(lambda x: x @ x.T), x).kernels == ()


def test_a_broken_kernel_is_refused(mesh, target):
    """The kernel sorts, which the interpreter can do and the hardware cannot."""

    def body(x_ref, out_ref):
        out_ref[...] = jnp.sort(x_ref[...], axis=0)

    x = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    with pytest.raises(NotImplementedError, match="sort"):
        compile_ahead(mesh, jax.jit(pl.pallas_call(body, out_shape=x)), x)
