"""Tests of the tests: what a step's program may not have is found where it is.

machines.py says how to run them.
"""

import jax
import jax.numpy as jnp
import machines
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from sharding.topology import Compiled, compile_ahead

pytestmark = pytest.mark.aot
target, mesh, report = machines.target, machines.mesh, machines.report  # fixtures
GPU = pytest.mark.parametrize("target", ["h100"], indirect=True, ids=machines.NAMES.get)
BLOCK = jax.ShapeDtypeStruct((64, 128), jnp.float32)
ONE_TRITON_WARP = dict(compiler_params=plgpu.CompilerParams(num_warps=1))


def more(x_ref, out_ref):
    out_ref[...] = x_ref[...] + 1


def test_arithmetic_between_kernels(mesh, report):
    kernel = pl.pallas_call(more, out_shape=BLOCK, name="more")
    straight = report(compile_ahead(mesh, jax.jit(lambda x: kernel(kernel(x))), BLOCK))
    planted = compile_ahead(mesh, jax.jit(lambda x: kernel(kernel(x) * jnp.exp2(x).sum())), BLOCK)
    assert straight.kernels == planted.kernels == ("more", "more")
    assert straight.float_operations == ()
    assert {"multiply", "add"} < {operation.kind for operation in planted.float_operations}
    assert straight.launches < planted.launches


def own_kernels(compiled: Compiled) -> list:
    """The kernels of a GPU's program that are Pallas'."""
    assert compiled.gpu is not None
    return [kernel for kernel in compiled.gpu.kernels if kernel.symbol == "planted"]


@GPU
def test_a_float_atomic(mesh, report):
    def body(x_ref, out_ref):
        plgpu.atomic_add(out_ref, (pl.ds(0, 1),), x_ref[pl.ds(pl.program_id(0), 1)])

    x = jax.ShapeDtypeStruct((128,), jnp.float32)
    run = pl.pallas_call(
        body, out_shape=jax.ShapeDtypeStruct((1,), x.dtype), grid=128, name="planted", **ONE_TRITON_WARP
    )
    (kernel,) = own_kernels(report(compile_ahead(mesh, jax.jit(run), x)))
    assert kernel.float_atomics == 1 and kernel.spilled == 0


@GPU
def test_a_spill(mesh, report):
    """A thread of one warp holds 256 numbers between two uses of them, and has at most 255 registers."""

    def body(x_ref, out_ref):
        x = x_ref[...]
        out_ref[...] = x - jnp.sum(x)

    run = pl.pallas_call(body, out_shape=BLOCK, name="planted", **ONE_TRITON_WARP)
    (kernel,) = own_kernels(report(compile_ahead(mesh, jax.jit(run), BLOCK)))
    assert kernel.spilled > 0 == kernel.float_atomics


@GPU
def test_fused_arithmetic(mesh, report):
    """libdevice's cosine has multiplications and additions that are rounded once; a kernel's own are left apart."""

    def body(x_ref, out_ref, *, of):
        x = x_ref[...]
        out_ref[...] = x * x + of(x)

    def kernel_of(of):
        x = jax.ShapeDtypeStruct((128,), jnp.float32)
        run = pl.pallas_call(lambda *refs: body(*refs, of=of), out_shape=x, name="planted", **ONE_TRITON_WARP)
        (kernel,) = own_kernels(report(compile_ahead(mesh, jax.jit(run), x)))
        return kernel

    plain, cosine = kernel_of(jnp.abs), kernel_of(jnp.cos)
    assert plain.fused == plain.unpinned == 0 < cosine.fused
