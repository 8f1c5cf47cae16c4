"""What the compilers of accelerators make of decode and prefill steps: a Markdown table. No accelerator is needed.

    python benchmarks/programs.py [--target h100 v6e …] [--model qwen3-8b-shape …] [--devices 1 4] [--out FILE]

It needs jax[cuda13] or jax[tpu], as sharding/topology.py says. A row is the widest plain step of its kind. Figures are
of a program of `--layers` layers; "a layer" is what one of a layer more has more. What stands in a loop counts once.
On a TPU a launch is an instruction that stands in no fusion. MiB moved are operands and results of Pallas kernels, each
whole; pages are left out, of which a kernel reads what a request has, and the table of which the lookup reads rows.
"""

import argparse
import dataclasses
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import jax

from jaxengine.command.bench_models import SHAPES
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.device import kv_cache
from jaxengine.device.needs import Needs
from jaxengine.engine.desk_plan import compiled, kernels_for
from jaxengine.engine.memory import size_on_one
from jaxengine.engine.step_variants import variants_of
from sharding.gpu_program import GpuProgram
from sharding.topology import TARGETS, Compiled, missing

SMALL = dict(vocab_size=32_000, num_hidden_layers=4, max_position_embeddings=4096, reduction_leaves=4)
STEP_TEST = dataclasses.replace(SHAPES["qwen3-0.6b-shape"], **SMALL)  # tests/aot/test_lowering.py's
MODELS = {"step-test": STEP_TEST} | {name: config.with_leaves() for name, config in SHAPES.items()}
ENGINE = EngineConfig(max_num_seqs=128, max_model_len=4096, max_num_batched_tokens=2048, num_pages=1024)
COMPILERS = "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc"
LOOKUP = "chain_embed"  # reads a row of its table a token


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=["h100"], metavar="TARGET")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 4], help="that share the model")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a file for the table; it is written after every row")
    return parser.parse_args()


def main() -> None:
    given, lines = arguments(), []
    for target in given.target:
        reason = missing(TARGETS[target])
        if reason:
            raise SystemExit(f"{target}: {reason}")
    for row in rows(given):
        lines = lines or [heading(), "", table_line(row), table_line(["---"] * len(row))]
        lines.append(table_line(row.values()))
        print(lines[-1], flush=True)
        if given.out:
            given.out.write_text("\n".join(lines) + "\n")
    print("\n".join(["", *lines]))


def rows(given: argparse.Namespace) -> Iterator[dict[str, object]]:
    for target in given.target:
        for model in given.model:
            for devices in given.devices:
                for kind, cells in steps(target, MODELS[model], devices, given.layers):
                    yield dict(target=target, model=model, devices=devices, step=kind) | cells


def steps(target: str, model_config: ModelConfig, devices: int, layers: int) -> Iterator[tuple[str, dict[str, object]]]:
    """(kind, cells) of a decode and of a prefill step."""
    mesh, kernels = kernels_for(model_config, TARGETS[target], devices)
    few, more = (dataclasses.replace(model_config, num_hidden_layers=n) for n in (layers, layers + 1))
    cache = kv_cache.abstract(few, ENGINE, kernels)
    pools = {size_on_one(pool) for pool in (*cache.keys, *cache.values)}
    for variant in variants_of(few, ENGINE, kernels).widest(Needs.PLAIN):
        first, next_one = (compiled(mesh, kernels, ENGINE, variant, config) for config in (few, more))
        yield variant.kind, cells_of(first, next_one, pools)


def cells_of(first: Compiled, next_one: Compiled, pools: set[int]) -> dict[str, object]:
    """A row of the table, of programs that differ by a layer."""
    moved = megabytes(first, pools)
    cells: dict[str, object] = {
        "launches": first.launches,
        "a layer": next_one.launches - first.launches,
        "kernels a layer": len(next_one.calls) - len(first.calls),
        "loops": first.loops,
        "loops a layer": next_one.loops - first.loops,
        "conditionals": first.conditionals,
        "float operations outside kernels": len(first.float_operations),
        "of them a layer": len(next_one.float_operations) - len(first.float_operations),
        "MiB moved": f"{moved:.1f}",
        "MiB a layer": f"{megabytes(next_one, pools) - moved:.1f}",
        "workspace MiB": f"{first.workspace_bytes / 2**20:.1f}",
        "seconds": f"{first.seconds:.0f}",
    }
    return cells | gpu_cells(first.gpu)


def gpu_cells(gpu: GpuProgram | None) -> dict[str, object]:
    names = "pieces", "the host steers", "most registers", "spilled B", "float atomics", "not pinned", "with fma"
    if gpu is None:
        return dict.fromkeys(names, "")
    kernels = gpu.kernels
    registers, spilled = max(kernel.registers for kernel in kernels), sum(kernel.spilled for kernel in kernels)
    atomics, unpinned = sum(kernel.float_atomics for kernel in kernels), sum(kernel.unpinned for kernel in kernels)
    fused = ", ".join(sorted(kernel.symbol for kernel in kernels if kernel.fused))
    return dict(zip(names, (gpu.pieces, gpu.steered, registers, spilled, atomics, unpinned, fused), strict=True))


def megabytes(program: Compiled, pools: set[int]) -> float:
    """MiB that the kernels' operands and results take, but for pages and the rows of the lookup."""
    return sum(call.num_bytes(pools) for call in program.calls if call.name != LOOKUP) / 2**20


def table_line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def heading() -> str:
    installed = {package.name: package.version for package in metadata.distributions()}
    compilers = ", ".join(f"{name} {installed[name]}" for name in COMPILERS if name in installed)
    return f"{compilers}; decode of {ENGINE.max_num_seqs} rows, prefill of {ENGINE.max_num_batched_tokens} tokens"


if __name__ == "__main__":
    jax.config.update("jax_enable_compilation_cache", False)
    main()
