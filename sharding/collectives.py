"""What devices send one another in a compiled program, read from its text."""

import math
import re
from typing import NamedTuple

KINDS = "all-gather", "all-to-all", "all-reduce", "reduce-scatter", "collective-permute"
BITS = {"pred": 8, "bf16": 16, "f16": 16}  # of dtypes whose names do not end with theirs
CALL = re.compile(rf"= (?P<result>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\])")


class Collective(NamedTuple):
    """One collective as it stands in a program."""

    kind: str
    shape: tuple[int, ...]  # of its result
    received: int  # bytes that one device receives from others
    in_loop: bool

    def times(self, rows: int, tiles: int) -> int:
        """How often a step of `tiles` tiles of `rows` rows runs it: a loop over tiles runs once a tile.

        Other loops count once: the head's of a prefill step, where one tile of rows draws.
        """
        return tiles if self.in_loop and rows in self.shape else 1


def collectives_of(program: str) -> tuple[Collective, ...]:
    """Every collective of a compiled program, in the order of its text."""
    found = []
    for line in program.splitlines():
        call = CALL.search(line)
        if call:
            found.append(_collective(call, line))
    return tuple(found)


def _collective(call: re.Match[str], line: str) -> Collective:
    arrays = ARRAY.findall(call["result"])
    if call["start"] and len(arrays) > 1:  # an asynchronous one's result holds its operands first
        arrays = arrays[len(arrays) // 2 :]
    shapes = [tuple(map(int, sizes.split(","))) if sizes else () for _, sizes in arrays]
    size = sum(_bits(dtype) // 8 * math.prod(shape) for (dtype, _), shape in zip(arrays, shapes, strict=True))
    loops = re.search(r'op_name="[^"]*/while/', line)
    return Collective(call["kind"], shapes[0], _received(call["kind"], size, _devices(line)), loops is not None)


def _bits(dtype: str) -> int:
    return BITS.get(dtype) or int(re.sub(r"\D*", "", dtype, count=1))


def _devices(line: str) -> int:
    groups = GROUPS.search(line)
    if groups is None:
        return 2  # a permutation's two ends
    return int(groups[2]) if groups[2] else len(groups[1].split(","))


def _received(kind: str, size: int, devices: int) -> int:
    """Bytes that one device receives, of a result of `size` bytes: all but what it has itself."""
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        return size * (devices - 1)
    once = size * (devices - 1) // devices
    return 2 * once if kind == "all-reduce" else once  # a ring reduces, then gathers
