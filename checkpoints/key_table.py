"""A table between Hugging Face's tensor names and our leaves, strict both ways.

Each key is used once, each leaf is filled, shapes are checked.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from checkpoints.safetensors_files import TensorFolder

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
        hint = _prefix_hint(folder.names, entries)
        raise ValueError(_listed(f"{folder.path} does not fit the model", differences) + hint)
    return ((entry.target, entry.pack([folder.read(source) for source in entry.sources])) for entry in entries)


def packed(
    tensors: Iterable[tuple[str, np.ndarray]], entries: Sequence[Entry], ignore: Sequence[str] = ()
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (target, packed array) as soon as an entry's sources have come; they may come in any order.

    What is held here are the sources of leaves that are not whole yet. What does not fit is known at the end alone:
    the last step raises one ValueError that lists the first ten tensors that are missing, misshapen, unexpected or
    given twice, and leaves that were taken before it are to be dropped.
    """
    _check_table(entries)
    entry_of = {source: entry for entry in entries for source in entry.sources}
    waiting: dict[str, dict[str, np.ndarray]] = {entry.target: {} for entry in entries}
    seen: set[str] = set()
    wrong: list[str] = []
    for name, tensor in tensors:
        entry = entry_of.get(name)
        difference = f"{name!r} is given twice" if name in seen else _difference(name, tensor.shape, entry, ignore)
        seen.add(name)
        if difference:
            wrong.append(difference)
        if entry is None or wrong:
            continue
        parts = waiting[entry.target]
        parts[name] = tensor
        if len(parts) == len(entry.sources):
            del waiting[entry.target]
            yield entry.target, entry.pack([parts[source] for source in entry.sources])
    wrong = _missing(entry_of, seen) + wrong
    if wrong:
        raise ValueError(_listed("the tensors do not fit the model", wrong) + _prefix_hint(seen, entries))


def unpacked(entries: Sequence[Entry], leaves: Callable[[str], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) pairs of `leaves(target)` under the Hugging Face names, one leaf after the other.

    Raises ValueError where an unpacked source has not the shape of the table.
    """
    _check_table(entries)
    return (pair for entry in entries for pair in _unpacked(entry, leaves(entry.target)))


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
    entry_of = {source: entry for entry in entries for source in entry.sources}
    present = set(folder.names)
    missing = _missing(entry_of, present)
    names = [name for name in entry_of if name in present] + [name for name in folder.names if name not in entry_of]
    found = (_difference(name, folder.shape(name), entry_of.get(name), ignore) for name in names)
    return missing + [difference for difference in found if difference]


def _missing(entry_of: dict[str, Entry], present: set[str]) -> list[str]:
    return [f"missing {name!r} {_shape_of(entry, name)}" for name, entry in entry_of.items() if name not in present]


def _difference(name: str, shape: tuple[int, ...], entry: Entry | None, ignore: Sequence[str]) -> str | None:
    """What is wrong with one tensor that is there, in words."""
    if entry is None:
        excused = any(fnmatchcase(name, pattern) for pattern in ignore)
        return None if excused else f"unexpected {name!r} {tuple(shape)}"
    needed = _shape_of(entry, name)
    if tuple(shape) == needed:
        return None
    return f"shape of {name!r}: given {tuple(shape)}, the model needs {needed}"


def _shape_of(entry: Entry, source: str) -> tuple[int, ...]:
    return tuple(entry.shapes[entry.sources.index(source)])


def _listed(what: str, differences: Sequence[str]) -> str:
    shown = "".join(f"\n  {difference}" for difference in differences[:MAX_DIFFERENCES])
    more = len(differences) - MAX_DIFFERENCES
    return f"{what}, {len(differences)} differences:{shown}" + (f"\n  and {more} more" if more > 0 else "")


def _prefix_hint(names: Iterable[str], entries: Sequence[Entry]) -> str:
    """Names that wrappers of modules made ("_orig_mod.", "module.") are the right ones after a prefix."""
    first = entries[0].sources[0]
    prefixes = [name.removesuffix(first) for name in names if name.endswith(first) and name != first]
    return f"\nThe names begin with {prefixes[0]!r}: take that away" if prefixes else ""


def _unpacked(entry: Entry, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    arrays = tuple(entry.unpack(leaf))
    shapes = tuple(tuple(np.shape(array)) for array in arrays)
    if shapes != tuple(tuple(shape) for shape in entry.shapes):
        raise ValueError(
            f"{entry.target} {np.shape(leaf)} unpacks to shapes {shapes}: {entry.sources} have {entry.shapes}"
        )
    return zip(entry.sources, arrays, strict=True)
