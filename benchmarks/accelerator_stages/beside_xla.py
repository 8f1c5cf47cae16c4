"""Each kernel beside XLA's own operation, and attention beside torch's scaled_dot_product_attention too."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import kernel_rows

from accelerator_stages import here
from accelerator_stages.measurement import Measurement, Row, Settings
from accelerator_stages.torch_beside import TorchAttention, missing
from pallas_kernels.cases import attention as attention_cases
from pallas_kernels.cases import draw as draw_cases
from pallas_kernels.cases import grouped_matmul as grouped_cases
from pallas_kernels.cases import matmul as matmul_cases
from pallas_kernels.cases.attention import AttentionCase
from pallas_kernels.cases.matmul import MatmulCase

WRITTEN = [*filter(kernel_rows.is_written_alone, attention_cases.DECODER)]
CHAIN = {
    "chain product": (kernel_rows.chain_product_rows, matmul_cases.DECODER),
    "chain attention": (kernel_rows.chain_attention_rows, [*filter(kernel_rows.is_plain, attention_cases.DECODER)]),
}  # what the engine runs, with the draw
KINDS = {
    "attention": (kernel_rows.attention_rows, attention_cases.DECODER),
    "matmul": (kernel_rows.matmul_rows, matmul_cases.DECODER),
    "draw": (kernel_rows.draw_rows, draw_cases.DECODER),
    "grouped": (kernel_rows.grouped_rows, grouped_cases.DECODER),
    "kv_write": (kernel_rows.kv_write_rows, WRITTEN),
}
TINY_PRODUCTS = [MatmulCase(19, 130, 48, residual=True)]
TINY = {
    "chain product": (kernel_rows.chain_product_rows, TINY_PRODUCTS),
    "chain attention": (kernel_rows.chain_attention_rows, [AttentionCase((40, 40))]),
    "matmul": (kernel_rows.matmul_rows, TINY_PRODUCTS),
}
REPEATS, TINY_REPEATS = 20, 2


def measurements(settings: Settings) -> list[Measurement]:
    tiny = here.is_tiny(settings)
    torch = functools.cache(functools.partial(attention_of_torch, settings.torch_python))
    kinds = [
        [Measurement(f"{name} {case}", functools.partial(measured, rows, case, torch, tiny)) for case in cases]
        for name, (rows, cases) in kinds_of(tiny).items()
    ]
    in_turns = itertools.chain(*itertools.zip_longest(*kinds))
    return [Measurement("torch", functools.partial(of_torch, torch)), *filter(None, in_turns)]


def kinds_of(tiny: bool) -> dict[str, tuple[Callable, Sequence]]:
    return TINY if tiny else CHAIN | KINDS


def attention_of_torch(python: str) -> TorchAttention | str:
    """torch's attention, or why there is none."""
    return missing(python, "torch") or TorchAttention(python)


def of_torch(torch: Callable[[], TorchAttention | str]) -> Iterator[Row]:
    found = torch()
    yield {"note": f"not there: {found}" if isinstance(found, str) else f"{found.hello}"}


def measured(rows: Callable, case: object, torch: Callable[[], TorchAttention | str], tiny: bool) -> Iterator[Row]:
    row: kernel_rows.Row = next(rows(here.own_kernels(), [case]))
    repeats, other = TINY_REPEATS if tiny else REPEATS, torch()
    ours = here.seconds(row.ours, row.operands, repeats) / row.calls
    cells = {
        "µs": ours * 1e6,
        "share of copy": row.moved / ours / here.copy_bandwidth(tiny),
        "share of peak": row.flops / ours / here.matmul_peak(tiny),
    }
    if row.theirs is not None:
        theirs = here.seconds(row.theirs, row.their_operands, repeats) / row.calls
        cells |= {"XLA's own, µs": theirs * 1e6, "times as fast as XLA": theirs / ours}
    if row.sdpa is not None and not isinstance(other, str):
        theirs = other.seconds(row.sdpa)
        cells |= {"torch, µs": theirs * 1e6, "times as fast as torch": theirs / ours}
    yield cells
