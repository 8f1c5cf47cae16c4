"""Each kernel on the accelerator of this machine, beside XLA's own operation at the same shapes.

    python benchmarks/kernels.py [--repeats 20]

A share of "copy" is of the bandwidth of copying a GiB on this device, a share of "peak" of the best bf16 dot of 8192 x 8192 x 8192, both
measured in the same run. A CPU is refused: the kernels only run interpreted there.
"""
import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.cases import grouped_matmul as grouped_cases
from pallas_kernels.cases import matmul as matmul_cases
from pallas_kernels.cases import sampling as sampling_cases
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul_reference import grouped_plain
from pallas_kernels.implementations import choose
from pallas_kernels.matmul import matmul
from pallas_kernels.matmul_reference import plain
from pallas_kernels.sampling import sampling_tail
from pallas_kernels.sampling_reference import draw_blocks, log_softmax

GIB = 2**30


def seconds(function: Callable, operands: tuple, repeats: int) -> float:
    """The shortest of three means over `repeats` runs of a jitted function."""
    jax.block_until_ready(function(*operands))
    means = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            out = function(*operands)
        jax.block_until_ready(out)
        means.append((time.perf_counter() - start) / repeats)
    return min(means)


def copy_bandwidth(repeats: int) -> float:
    """Bytes per second, read and written."""
    x = jnp.zeros(GIB // 4, jnp.float32)
    return 2 * GIB / seconds(jax.jit(lambda x: x + 1), (x,), repeats)


def dot_peak(repeats: int) -> float:
    """Floating point operations per second of XLA's best large bf16 dot."""
    x = jnp.ones((8192, 8192), jnp.bfloat16)
    return 2 * 8192**3 / seconds(jax.jit(lambda a, b: a @ b.T), (x, x), repeats)


def matmul_rows(implementation):
    for case in matmul_cases.DECODER:
        x, w, bias, residual = case.operands()
        parts = 2 if case.gated else 1
        in_parts = lambda a, parts=parts: None if a is None else a.reshape(parts, -1, *a.shape[1:])
        ours = jax.jit(functools.partial(lambda x, w, b, r, gated: matmul(x, w, bias=b, residual=r, gated=gated,
                                                                          implementation=implementation), gated=case.gated))
        theirs = jax.jit(lambda x, w, b, r, in_parts=in_parts: plain(x, in_parts(w), in_parts(b), r))
        yield f"matmul {case}", ours, theirs, (x, w, bias, residual), 2 * case.rows * case.inputs * case.outputs


def grouped_rows(implementation):
    for case in grouped_cases.DECODER:
        x, w, sizes = case.operands()
        parts = 2 if case.gated else 1
        ours = jax.jit(functools.partial(grouped_matmul, gated=case.gated, implementation=implementation))
        theirs = jax.jit(lambda x, w, s, parts=parts: grouped_plain(x, w.reshape(w.shape[0], parts, -1, w.shape[2]), s))
        yield f"grouped {case}", ours, theirs, (x, w, sizes), 2 * case.rows * case.inputs * case.outputs


def sampling_rows(implementation):
    for case in sampling_cases.DECODER:
        logits, uniforms = case.operands()
        ours = jax.jit(functools.partial(sampling_tail, implementation=implementation))
        theirs = jax.jit(lambda x, given, u: draw_blocks(log_softmax(x), u))
        yield f"sampling {case}", ours, theirs, (logits, jnp.full(case.rows, -1), uniforms), 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    device = jax.devices()[0]
    if device.platform == "cpu":
        parser.exit(1, "no accelerator here: nothing is measured\n")
    implementation = choose("pallas_tpu" if device.platform == "tpu" else "pallas_gpu")
    bandwidth, peak = copy_bandwidth(arguments.repeats), dot_peak(arguments.repeats)
    print(f"{device.device_kind}, jax {jax.__version__}, {implementation}; "
          f"copy {bandwidth / 1e9:.0f} GB/s, peak {peak / 1e12:.0f} Tflop/s\n")
    print("| kernel and shape | µs | share of copy | share of peak | XLA's own, µs | kernel / XLA speed |\n|---|---|---|---|---|---|")
    for rows in (matmul_rows, grouped_rows, sampling_rows):
        for name, ours, theirs, operands, flops in rows(implementation):
            mine, xla = (seconds(f, operands, arguments.repeats) for f in (ours, theirs))
            moved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((operands, jax.eval_shape(ours, *operands))))
            print(f"| {name} | {mine * 1e6:.1f} | {moved / mine / bandwidth:.0%} | {flops / mine / peak:.0%} | {xla * 1e6:.1f} | "
                  f"{xla / mine:.2f} |", flush=True)


if __name__ == "__main__":
    main()
