"""What devices send one another in a compiled program, read from its text."""

import re
from typing import NamedTuple

from sharding.program_text import shapes_of

KINDS = "all-gather", "all-to-all", "all-reduce", "reduce-scatter", "collective-permute"
CALL = re.compile(rf"= (?P<result>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
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
    arrays = list(shapes_of(call["result"]))
    if call["start"] and len(arrays) > 1:  # an asynchronous one's result holds its operands first
        arrays = arrays[len(arrays) // 2 :]
    size = sum(array.num_bytes for array in arrays)
    loops = re.search(r'op_name="[^"]*/while/', line)
    return Collective(call["kind"], arrays[0].sizes, _received(call["kind"], size, _devices(line)), loops is not None)


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
