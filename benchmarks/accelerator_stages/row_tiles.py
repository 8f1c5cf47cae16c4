"""What the design rests on: do tiles of 16, 64 and 128 rows give one row the same bits?

On a GPU they are those of the product in product.py, on a TPU of the engine's own. Each tile is compared with the first
one, on all rows of a batch and on one row alone. A GPU's product with rows first is the contrast: there other bits are
no failure.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from accelerator_stages import here
from accelerator_stages.measurement import Measurement, Row, Settings
from accelerator_stages.product import Cut, product
from pallas_kernels.cases.matmul import MatmulCase
from pallas_kernels.matmul_reference import dot
from pallas_kernels.matmul_tpu import matmul_tpu
from pallas_kernels.sizes import matmul_sizes

TILES, TINY_TILES = (16, 64, 128), (16, 64)
TPU_TILES, TINY_TPU_TILES = (128, 8, 16, 32, 64, 256), (16, 32)
# Of an 8B and of Qwen3-0.6B: what attention and the MLP give back, and gate and up, which no cache holds.
CASES = (MatmulCase(256, 4096, 4096), MatmulCase(256, 3072, 1024), MatmulCase(256, 4096, 24576))
TINY_CASES = (MatmulCase(72, 256, 128),)
INSTRUCTION = re.compile(r"(?:wgmma\.mma_async|mma\.sync)\.[\w.]*?(m\d+n\d+k\d+)")
Product = Any  # a jitted function of x and w


def measurements(settings: Settings) -> list[Measurement]:
    tiny, kind = here.is_tiny(settings), here.platform()
    on_gpu, on_tpu = (swapped, straight), (of_a_tpu,)
    checks = {"gpu": on_gpu, "tpu": on_tpu, "cpu": on_gpu + on_tpu}[kind]
    return [
        Measurement(f"{NAMES[check]}, {case}", functools.partial(check, case, tiny))
        for case in (TINY_CASES if tiny else CASES)
        for check in checks
    ]


def gpu_product(cut: Cut) -> Product:
    return jax.jit(functools.partial(product, cut=cut, interpret=here.platform() == "cpu"))


def swapped(case: MatmulCase, tiny: bool) -> Iterator[Row]:
    tiles = {rows: gpu_product(Cut(rows)) for rows in (TINY_TILES if tiny else TILES)}
    for row, is_same in compared(case, tiles, tiny):
        yield row | {"holds": is_same}


def straight(case: MatmulCase, tiny: bool) -> Iterator[Row]:
    """The contrast: its wide tiles, and the narrow one that is an mma, beside the swapped narrow one."""
    x, w, *_ = case.operands()
    weights_first = gpu_product(Cut(16))(x, w)
    tiles = {rows: gpu_product(Cut(rows, is_swapped=False)) for rows in (TINY_TILES if tiny else TILES)}
    for row, is_same in compared(case, tiles, tiny):
        out = tiles[row["rows of a tile"]](x, w)
        same = {"as the first tile": "equal" if is_same else "other bits"}
        yield row | same | {"beside weights first": f"{differing(out, weights_first):.2%} differ"}


def of_a_tpu(case: MatmulCase, tiny: bool) -> Iterator[Row]:
    kernels = here.own_kernels()
    sizes = matmul_sizes(kernels.device, jnp.dtype(case.dtype), case.outputs, case.inputs)

    def with_tile(rows: int) -> Product:
        own = dataclasses.replace(sizes, rows=rows)
        run = functools.partial(matmul_tpu, interpret=here.platform() == "cpu")
        return jax.jit(lambda x, w: run(x, w[None], None, None, own, jnp.dtype(jnp.float32)))

    tiles = {rows: with_tile(rows) for rows in (TINY_TPU_TILES if tiny else TPU_TILES)}
    for row, is_same in compared(case, tiles, tiny):
        yield row | {"holds": is_same}


NAMES = {swapped: "weights first", straight: "rows first", of_a_tpu: "the engine's on a TPU"}


def compared(case: MatmulCase, tiles: dict[int, Product], tiny: bool) -> Iterator[tuple[Row, bool]]:
    """(cells, whether all bits are the first tile's) of each tile."""
    x, w, *_ = case.operands()
    exact = jax.jit(lambda x, w: dot(x.astype(jnp.float32), w.astype(jnp.float32)))(x, w)
    first = None
    for rows, run in tiles.items():
        batch, code = here.compiled(run.lower(x, w), {}, "*.ptx")
        out = batch(x, w)
        first = out if first is None else first
        off, alone_off = differing(out, first), differing(run(x[-1:], w), first[-1:])
        spent = here.seconds(run, (x[-1:], w), 2 if tiny else 20)
        cells = {
            "rows of a tile": rows,
            "elements with other bits": f"{off:.2%}",
            "of a row alone": f"{alone_off:.2%}",
            "from float32": float(jnp.abs(out - exact).max() / jnp.abs(exact).max()),
            "instructions": instructions(code),
            "µs for a row": spent * 1e6,
            "share of copy": w.nbytes / spent / here.copy_bandwidth(tiny),
        }
        yield cells, off == alone_off == 0


def differing(a: Array, b: Array) -> float:
    """The share of elements whose bits differ."""
    return float(np.mean(np.asarray(a).view(np.uint32) != np.asarray(b).view(np.uint32)))


def instructions(code: str) -> str:
    """The matrix instructions in PTX."""
    names = {f"{found.group().split('.')[0]} {found.group(1)}" for found in INSTRUCTION.finditer(code)}
    return ", ".join(sorted(names))
