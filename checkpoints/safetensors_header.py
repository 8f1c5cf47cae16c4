"""The header of one safetensors file, checked against the file before any tensor of it is read.

Format: https://huggingface.co/docs/safetensors - 8 bytes of header length (little endian), a JSON header, then the
tensors' bytes, which cover the rest of the file without overlap and without gaps.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from checkpoints.json_files import parse_object

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
MAX_DIMENSIONS = 8
GIT_LFS_POINTER = b"version "  # the first 8 bytes of the text that git leaves in place of a large file


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies in its file, in bytes from the file's start, and what the bytes mean."""

    start: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """One checked file: `slots` by tensor name in the order of the bytes, `num_bytes` the size of the whole file."""

    path: Path
    num_bytes: int
    slots: dict[str, Slot]


def read_header(path: Path) -> Header:
    """Reads and checks the header of the file at `path`; no tensor is read.

    Raises ValueError with the file's name for a truncated or corrupt file, a dtype other than BF16, F16 and F32, a byte
    count that is not the shape's, tensors that overlap or leave bytes unused. The library's safe_open refuses less
    (names given twice and unknown fields pass) and names neither the sizes nor both tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    num_bytes = path.stat().st_size
    entries, start = _entries(path, num_bytes)
    _check_metadata(path, entries.pop("__metadata__", {}))
    slots = {name: _slot(f"{path}: tensor {name!r}", entry, start) for name, entry in entries.items()}
    in_order = dict(sorted(slots.items(), key=lambda item: item[1].start))
    _check_coverage(path, in_order, start, num_bytes)
    return Header(path, num_bytes, in_order)


def _entries(path: Path, num_bytes: int) -> tuple[dict[str, Any], int]:
    """The header's JSON and the byte at which the tensors begin."""
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{path} is truncated: expected at least 8 bytes, got {num_bytes}")
        if prefix == GIT_LFS_POINTER:
            raise ValueError(
                f"{path} is a git-lfs pointer and not the tensors themselves: fetch them with `git lfs pull`"
            )
        length = int.from_bytes(prefix, "little")
        if not 2 <= length <= MAX_HEADER_BYTES:  # before anything of that size is allocated
            raise ValueError(f"{path} is corrupt: header length {length}, allowed are 2 to {MAX_HEADER_BYTES} bytes")
        if 8 + length > num_bytes:
            raise ValueError(
                f"{path} is truncated: expected at least {8 + length} bytes (the header alone), got {num_bytes}"
            )
        text = file.read(length)
    if not text.startswith(b"{"):
        raise ValueError(f"{path} is corrupt: the header must begin with '{{', got {text[:1]!r}")
    return parse_object(text, f"the header of {path}"), 8 + length


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path} is corrupt: __metadata__ must map strings to strings, got {metadata!r:.80}")


def _slot(where: str, entry: Any, data_start: int) -> Slot:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} must have dtype, shape and data_offsets, got {entry!r:.80}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"{where} has dtype {entry['dtype']!r:.80}: supported are {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _integers(shape, low=1) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{where} has shape {shape!r:.80}: expected at most {MAX_DIMENSIONS} positive integers")
    if not _integers(offsets, low=0) or len(offsets) != 2:
        raise ValueError(f"{where} has data_offsets {offsets!r:.80}: expected two integers, begin and end")
    slot = Slot(data_start + offsets[0], DTYPES[entry["dtype"]], tuple(shape))
    if slot.end - slot.start != offsets[1] - offsets[0]:
        raise ValueError(
            f"{where} has data_offsets {offsets}, {offsets[1] - offsets[0]} bytes: "
            f"{entry['dtype']} of shape {slot.shape} has {slot.end - slot.start}"
        )
    return slot


def _integers(value: Any, low: int) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= low for item in value)  # True is no size


def _check_coverage(path: Path, slots: dict[str, Slot], start: int, num_bytes: int) -> None:
    """The slots, in order, take up each byte from `start` to the end of the file once."""
    position, before = start, ""
    for name, slot in slots.items():
        if slot.start < position:
            raise ValueError(
                f"{path} is corrupt: tensors {before!r} and {name!r} overlap by {position - slot.start} bytes"
            )
        if slot.start > position:
            raise ValueError(
                f"{path} is corrupt: {slot.start - position} bytes before tensor {name!r} belong to no tensor"
            )
        position, before = slot.end, name
    if position > num_bytes:
        raise ValueError(f"{path} is truncated: expected {position} bytes, got {num_bytes}")
    if position < num_bytes:
        raise ValueError(f"{path} is corrupt: expected {position} bytes, got {num_bytes}")
