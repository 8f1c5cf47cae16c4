"""Each kernel on the accelerator of this machine, beside XLA's own operation at the same shapes, and a whole decode
step.

    python benchmarks/kernels.py [--repeats 20] [--torch-python PEER/bin/python] [--only attention matmul …]

A share of "copy" is of the bandwidth of copying a GiB on this device, a share of "peak" of the best bf16 dot of
8192 x 8192 x 8192, both measured in the same run. With --torch-python attention is also compared with torch's
(peers/peer_torch_attention.py). A CPU is refused, because it can only interpret the kernels.
"""

import argparse
import json
import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from kernel_rows import ROWS, Row, size_of
from stepping import drain, queue, reads_prompts

from jaxengine.command import bench
from pallas_kernels.implementations import choose

GIB = 2**30
COLUMNS = (
    "kernel and shape",
    "µs",
    "share of copy",
    "share of peak",
    "XLA's own, µs",
    "kernel / XLA speed",
    "torch, µs",
)


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


class Torch:
    """peers/peer_torch_attention.py in another interpreter; without one it has no figures."""

    def __init__(self, python: str | None) -> None:
        self._process = None
        if python:
            script = pathlib.Path(__file__).parent / "peers" / "peer_torch_attention.py"
            self._process = subprocess.Popen(
                [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            print("beside", self._line())

    def seconds(self, row: Row) -> float | None:
        if self._process is None or row.sdpa is None:
            return None
        print(json.dumps(row.sdpa), file=self._process.stdin, flush=True)
        return json.loads(self._line())["seconds"]

    def _line(self) -> str:
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"torch's interpreter ended with code {self._process.wait()}")
        return line.strip()


def measured(row: Row, repeats: int, bandwidth: float, peak: float, torch: Torch) -> str:
    mine = seconds(row.ours, row.operands, repeats) / row.calls
    xla = None if row.theirs is None else seconds(row.theirs, row.their_operands, repeats) / row.calls
    other = torch.seconds(row)
    ratio = "" if xla is None else f"{xla / mine:.2f}"
    shares = f"{row.moved / mine / bandwidth:.0%} | {row.flops / mine / peak:.0%}"
    return f"| {row.name} | {microseconds(mine)} | {shares} | {microseconds(xla)} | {ratio} | {microseconds(other)} |"


def microseconds(value: float | None) -> str:
    return "" if value is None else f"{value * 1e6:.1f}"


def decode_steps(batches: list[int], repeats: int, bandwidth: float) -> Iterator[str]:
    """Whole decode steps of Qwen3-0.6B's shape after 128 tokens. A step has to read the weights and the contexts."""
    llm = bench.open_model("qwen3-0.6b-shape", dtype="bfloat16", compile_patience=0)
    weights, config = size_of(llm.params), llm.config
    for batch in batches:
        queue(llm, *bench.Decode(batch).requests(0, config.vocab_size, repeats + 16))
        while reads_prompts(llm):
            llm.engine.step()
        llm.engine.step()  # the first step that only decodes may compile
        start = time.perf_counter()
        for _ in range(repeats):
            llm.engine.step()
        spent = (time.perf_counter() - start) / repeats
        contexts = batch * 128 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
        share = (weights + contexts) / spent / bandwidth
        yield f"| decode step B={batch}, {llm.engine_config.kernels} | {spent * 1e6:.1f} | {share:.0%} | | | | |"
        drain(llm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--torch-python", help="an interpreter with torch")
    parser.add_argument("--only", nargs="+", default=[], help="rows whose name begins with one of these")
    parser.add_argument("--batch", type=int, nargs="*", default=[8, 64], help="of whole decode steps")
    arguments = parser.parse_args()
    device = jax.devices()[0]
    if device.platform == "cpu":
        parser.exit(1, "no accelerator here: nothing is measured\n")
    implementation = choose("pallas_tpu" if device.platform == "tpu" else "pallas_gpu")
    torch = Torch(arguments.torch_python)
    bandwidth, peak = copy_bandwidth(arguments.repeats), dot_peak(arguments.repeats)
    header = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"
    print(
        f"{device.device_kind}, jax {jax.__version__}, {implementation}; "
        f"copy {bandwidth / 1e9:.0f} GB/s, peak {peak / 1e12:.0f} Tflop/s\n\n{header}",
        flush=True,
    )
    for rows in ROWS:
        kind = rows.__name__.removesuffix("_rows")
        if arguments.only and kind not in arguments.only:
            continue
        for row in rows(implementation):
            print(measured(row, arguments.repeats, bandwidth, peak, torch), flush=True)
    for line in decode_steps(arguments.batch, arguments.repeats, bandwidth):
        print(line, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room too
    main()
