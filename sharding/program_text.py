"""Instructions of a compiled program, read from its text (optimised HLO).

A text has every loop's body and every reduction's computation once, so that all counts are of what stands there, not of
how often it runs.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

KERNEL_CALLS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "triton_kernel_call_ffi", "mosaic_gpu_v2", "mosaic_gpu")
LIBRARIES = "cublas", "cudnn"  # in the targets of calls that multiply
ROUNDING = frozenset(
    "add subtract multiply divide remainder power dot convolution exponential exponential-minus-one log log-plus-one "
    "logistic sqrt rsqrt cbrt tanh sine cosine tan erf atan2 fft cholesky triangular-solve".split()
)
# Instructions that name values, or steer those of other computations, and take no time of their own.
NAMING = frozenset("parameter constant tuple get-tuple-element bitcast while conditional call after-all".split())
BITS = {"pred": 8, "bf16": 16}  # of dtypes that do not begin with a letter and their bits
ARRAY = re.compile(r"\b(pred|bf16|[a-z]\d+\w*)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?[\w.-]+ = (?P<results>.*?) (?P<kind>[a-z][\w-]*)\(")


class Shape(NamedTuple):
    """An array's dtype as the text has it ("f32", "pred") and its sizes."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("f", "bf", "c"))

    @property
    def num_bytes(self) -> int:
        bits = BITS.get(self.dtype) or int(_first(r"[a-z](\d+)", self.dtype))
        return math.prod(self.sizes) * bits // 8


class Instruction(NamedTuple):
    """An instruction: its kind ("add", "custom-call"), what it gives, the computation it stands in, and its line."""

    kind: str
    results: tuple[Shape, ...]
    computation: str
    line: str

    @property
    def target(self) -> str:
        """What a custom call calls; "" for other instructions."""
        return _first(r'custom_call_target="([^"]*)"', self.line)

    @property
    def source(self) -> str:
        """The primitive of JAX's that it comes from, after the transformations around it; "" where XLA made it."""
        return _first(r'op_name="([^"]*)"', self.line)


class KernelCall(NamedTuple):
    """A call of a Pallas kernel: the `name` that pallas_call was given, and the arrays that it takes and gives."""

    name: str
    operands: tuple[Shape, ...] = ()
    results: tuple[Shape, ...] = ()

    def num_bytes(self, left_out: Iterable[int] = ()) -> int:
        """Bytes of operands and results, each whole and once, but of no array of as many bytes as one of
        `left_out`."""
        sizes = [shape.num_bytes for shape in self.operands + self.results]
        return sum(size for size in sizes if size not in set(left_out))


def instructions_of(program: str) -> Iterator[Instruction]:
    """Every instruction of all computations, in the order of the text."""
    computation = ""
    for line in program.splitlines():
        computation = _first(COMPUTATION, line) or computation
        found = INSTRUCTION.match(line)
        if found:
            yield Instruction(found["kind"], shapes_of(found["results"]), computation, line)


def shapes_of(text: str) -> tuple[Shape, ...]:
    return tuple(Shape(dtype, tuple(map(int, filter(None, sizes.split(","))))) for dtype, sizes in ARRAY.findall(text))


def kernel_calls_of(instructions: Iterable[Instruction]) -> tuple[KernelCall, ...]:
    """The Pallas kernels that a program calls, by name."""
    return tuple(sorted(_kernel_call(one) for one in instructions if one.target in KERNEL_CALLS))


def _kernel_call(call: Instruction) -> KernelCall:
    name = _first(r'([^/"()]+)\)*/pallas_call', call.source) or "unnamed"
    return KernelCall(name, shapes_of(_first(r"operand_layout_constraints=\{(.*?\})\}", call.line)), call.results)


def float_operations_of(instructions: Iterable[Instruction]) -> tuple[Instruction, ...]:
    """Float arithmetic that XLA does itself, outside kernels, in the program's order: what can round.

    Copies, converts, selects, gathers, comparisons, maxima and signs are none; a reduction counts as the arithmetic of
    its computation, a library's product as one operation.
    """
    return tuple(one for one in instructions if _is_float_arithmetic(one))


def _is_float_arithmetic(one: Instruction) -> bool:
    if one.kind == "custom-call":
        return any(library in one.target for library in LIBRARIES)
    return one.kind in ROUNDING and any(shape.is_float for shape in one.results)


def started_of(instructions: Sequence[Instruction]) -> tuple[Instruction, ...]:
    """What a device is given to do one after the other: kernels, fusions, copies, and what stands alone."""
    inside = {_first(r"(?:calls|to_apply)=%?([\w.-]+)", one.line) for one in instructions if one.kind != "call"}
    alone = (one for one in instructions if one.computation not in inside)
    return tuple(one for one in alone if one.kind not in NAMING and not one.kind.endswith("-done"))


def _first(pattern: str | re.Pattern[str], text: str) -> str:
    found = re.search(pattern, text)
    return found[1] if found else ""
