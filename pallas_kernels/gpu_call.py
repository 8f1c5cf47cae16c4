"""How a GPU's kernels are called: with refs of whole arrays, of which each program takes what it wants."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def call(
    name: str,
    kernel: Callable,
    grid: tuple[int, ...],
    out: Any,
    *inputs: Any,
    interpret: bool,
    warps: int = 4,
    stages: int = 2,
    aliases: dict[int, int] | None = None,
) -> Any:
    """`kernel(*refs of the inputs, refs of the outputs)` for every program of the grid. Refs are of whole arrays."""
    whole = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=jax.tree.map(lambda _: whole, inputs),
        out_specs=jax.tree.map(lambda _: whole, out),
        out_shape=out,
        name=name,
        input_output_aliases=aliases or {},
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
    )(*inputs)
