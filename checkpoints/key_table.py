"""A table between Hugging Face's tensor names and our leaves, strict both ways.

Each key is used once, each leaf is filled, shapes are checked.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from checkpoints.safetensors_files import MAX_SHARD_BYTES, TensorFolder, save_folder

MAX_DIFFERENCES = 10  # listed in one error; a wrong architecture would differ in every line


def _only(arrays: Sequence[np.ndarray]) -> np.ndarray:
    (array,) = arrays
    return array


def _alone(leaf: np.ndarray) -> Sequence[np.ndarray]:
    return (leaf,)


@dataclass(frozen=True)
class Entry:
    """One leaf of ours, and the Hugging Face tensors that make it up.

    `pack` takes the sources, in order and of the given `shapes`, to our layout; `unpack` is its inverse, by bits. Both
    keep the dtype. Left out, the leaf is its one source as it stands.
    """

    target: str  # the path of our leaf, "layers.3.attention.qkv"
    sources: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    pack: Callable[[Sequence[np.ndarray]], np.ndarray] = _only
    unpack: Callable[[np.ndarray], Sequence[np.ndarray]] = _alone

    def __post_init__(self) -> None:
        if not self.sources or len(self.sources) != len(self.shapes):
            raise ValueError(
                f"{self.target} has {len(self.sources)} sources and {len(self.shapes)} shapes: give one shape for each"
            )


def read(
    folder: TensorFolder, entries: Sequence[Entry], ignore: Sequence[str] = ()
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (target, packed array) for each entry, in order; at most one leaf is in memory here.

    `ignore` holds fnmatch patterns of keys that may be present and unused ("*.rotary_emb.inv_freq"). Everything is
    checked at the call, before the first leaf: raises one ValueError that lists the first ten missing, misshapen and
    unexpected keys.
    """
    _check_table(entries)
    differences = _differences(folder, entries, ignore)
    if differences:
        raise ValueError(_listed(f"{folder.path} does not fit the model", differences))
    return ((entry.target, entry.pack([folder.read(source) for source in entry.sources])) for entry in entries)


def write(
    path: str | os.PathLike[str],
    entries: Sequence[Entry],
    leaves: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `leaves(target)` of each entry under the Hugging Face names, one leaf after the other.

    Raises ValueError where an unpacked source has not the shape of the table, and what `save_folder` raises; no half
    model is left under the real names.
    """
    _check_table(entries)
    pairs = (pair for entry in entries for pair in _unpacked(entry, leaves(entry.target)))
    save_folder(path, pairs, max_shard_bytes=max_shard_bytes)


def _check_table(entries: Sequence[Entry]) -> None:
    targets = Counter(entry.target for entry in entries)
    sources = Counter(source for entry in entries for source in entry.sources)
    twice = [
        f"{name!r} is named {count} times"
        for name, count in (targets + sources).items()
        if max(targets[name], sources[name]) > 1
    ]
    if twice:
        raise ValueError(_listed("the key table must name each target and each source once", twice))


def _differences(folder: TensorFolder, entries: Sequence[Entry], ignore: Sequence[str]) -> list[str]:
    expected = {
        source: tuple(shape) for entry in entries for source, shape in zip(entry.sources, entry.shapes, strict=True)
    }
    present = set(folder.names)
    missing = [f"missing {name!r} {shape}" for name, shape in expected.items() if name not in present]
    misshapen = [
        f"shape of {name!r}: the file has {folder.shape(name)}, the model needs {shape}"
        for name, shape in expected.items()
        if name in present and folder.shape(name) != shape
    ]
    unexpected = [
        f"unexpected {name!r} {folder.shape(name)}"
        for name in folder.names
        if name not in expected and not any(fnmatchcase(name, pattern) for pattern in ignore)
    ]
    return missing + misshapen + unexpected


def _listed(what: str, differences: Sequence[str]) -> str:
    shown = "".join(f"\n  {difference}" for difference in differences[:MAX_DIFFERENCES])
    more = len(differences) - MAX_DIFFERENCES
    return f"{what}, {len(differences)} differences:{shown}" + (f"\n  and {more} more" if more > 0 else "")


def _unpacked(entry: Entry, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    arrays = tuple(entry.unpack(leaf))
    shapes = tuple(tuple(np.shape(array)) for array in arrays)
    if shapes != tuple(tuple(shape) for shape in entry.shapes):
        raise ValueError(
            f"{entry.target} {np.shape(leaf)} unpacks to shapes {shapes}: {entry.sources} have {entry.shapes}"
        )
    return zip(entry.sources, arrays, strict=True)
