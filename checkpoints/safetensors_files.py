"""The tensors of a model folder: opened strictly, read lazily, written shard by shard. A pickle is never opened."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from checkpoints.safetensors_header import DTYPES, MAX_DIMENSIONS, Header
from checkpoints.safetensors_index import INDEX_FILE, SINGLE_FILE, headers_of

MAX_SHARD_BYTES = 5 * 10**9


class TensorFolder:
    """The tensors of one model folder by name. Made by `open_folder`: all headers are checked, no tensor is read yet.

    A file is mapped into memory, read-only, when the first of its tensors is read, so a tensor takes memory as its
    pages are touched and the system can take it back. `close` lets go of the files; arrays that were read stay valid.
    """

    def __init__(self, path: Path, headers: Iterable[Header]) -> None:
        self.path = path
        self._header_of = {name: header for header in headers for name in header.slots}
        self._maps: dict[Path, np.memmap] | None = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the order of the files and of their bytes."""
        return tuple(self._header_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._header(name).slots[name].shape

    def dtype(self, name: str) -> np.dtype:
        """bfloat16 (of ml_dtypes), float16 or float32."""
        return self._header(name).slots[name].dtype

    def read(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the mapped file.

        Raises KeyError for a name that is not here, ValueError where the folder is closed or the file has changed since
        it was opened.
        """
        header = self._header(name)
        slot = header.slots[name]
        return np.ndarray(slot.shape, slot.dtype, buffer=self._map(header), offset=slot.start)

    def close(self) -> None:
        self._maps = None

    def __enter__(self) -> "TensorFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _header(self, name: str) -> Header:
        if name not in self._header_of:
            raise KeyError(f"{self.path} has no tensor {name!r}")
        return self._header_of[name]

    def _map(self, header: Header) -> np.memmap:
        if self._maps is None:
            raise ValueError(f"{self.path} is closed: read its tensors inside the with block")
        if header.path not in self._maps:
            mapped = np.memmap(header.path, np.uint8, mode="r")
            if mapped.size != header.num_bytes:  # reading past the end of a mapped file kills the process
                raise ValueError(
                    f"{header.path} changed since it was opened: it had {header.num_bytes} bytes, now {mapped.size}"
                )
            self._maps[header.path] = mapped
        return self._maps[header.path]


def open_folder(path: str | os.PathLike[str]) -> TensorFolder:
    """Opens the tensors of the folder at `path`: the shards of its index, or its one safetensors file.

    Every header is checked first. Raises ValueError naming the file that is truncated, corrupt, of an unsupported
    dtype or a pickle, or the index that is wrong; FileNotFoundError naming the shard, index or folder that is missing.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    return TensorFolder(folder, headers_of(folder))


def has_tensors(path: str | os.PathLike[str]) -> bool:
    """Whether the folder holds a safetensors file or an index, right or wrong."""
    return bool(_tensor_files(Path(path)))


def _tensor_files(folder: Path) -> list[str]:
    names = [entry.name for entry in folder.iterdir()]
    return sorted(name for name in names if name.endswith(".safetensors") or name == INDEX_FILE)


def save_folder(
    path: str | os.PathLike[str], tensors: Iterable[tuple[str, np.ndarray]], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes (name, array) pairs of bfloat16, float16 or float32 as safetensors, which transformers reads too.

    Shards have at most `max_shard_bytes` (a larger tensor has one of its own); several have an index. Memory: the
    arrays of one shard and the next array, kept and not copied until their shard is written (safetensors before 0.8
    copies the shard while it writes). Everything is written under other names and renamed at the end, the index last,
    so that a folder that a crash left does not open. Raises FileExistsError where tensors are already, ValueError for
    what cannot be written.
    """
    folder = Path(path)
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    folder.mkdir(parents=True, exist_ok=True)
    if has_tensors(folder):  # replacing several files cannot be done at once, and half of each model would open
        raise FileExistsError(
            f"{folder} already holds {_tensor_files(folder)[0]}: save into a new folder or remove the old tensors"
        )
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=folder) as scratch:
        shards = [
            _write_shard(Path(scratch) / str(number), shard)
            for number, shard in enumerate(_shards(tensors, max_shard_bytes))
        ]
        _publish(folder, Path(scratch), shards)


def _shards(tensors: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    """The tensors in groups of at most `max_shard_bytes`, in the order given."""
    seen: set[str] = set()
    shard: dict[str, np.ndarray] = {}
    num_bytes = 0
    for name, tensor in tensors:
        if name in seen:
            raise ValueError(f"tensor {name!r} is given twice")
        array = _writable(name, tensor)
        if shard and num_bytes + array.nbytes > max_shard_bytes:
            yield shard
            shard.clear()  # it is written: the caller's reference to the dict must not keep its arrays
            num_bytes = 0
        seen.add(name)
        shard[name] = array
        num_bytes += array.nbytes
    if not seen:
        raise ValueError("no tensors were given to save")
    yield shard


def _writable(name: str, tensor: np.ndarray) -> np.ndarray:
    array = np.asarray(tensor, order="C")  # the file holds rows one after the other
    if not isinstance(name, str) or name == "__metadata__":
        raise ValueError(f"{name!r} cannot be the name of a tensor")
    if array.dtype not in DTYPES.values():
        raise ValueError(
            f"tensor {name!r} has dtype {array.dtype}: supported are {', '.join(map(str, DTYPES.values()))}"
        )
    if array.size == 0 or array.ndim > MAX_DIMENSIONS:
        raise ValueError(
            f"tensor {name!r} has shape {array.shape}: expected at most {MAX_DIMENSIONS} positive integers"
        )
    return array


def _write_shard(path: Path, shard: dict[str, np.ndarray]) -> tuple[Path, dict[str, int]]:
    """Writes one file through to the disk; its path and the bytes of each tensor."""
    path.touch()
    mode = path.stat().st_mode
    save_file(shard, path, metadata={"format": "pt"})  # transformers opens no file without it
    path.chmod(mode)  # save_file makes a file that its owner alone can read, whatever the umask
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return path, {name: array.nbytes for name, array in shard.items()}


def _publish(folder: Path, scratch: Path, shards: list[tuple[Path, dict[str, int]]]) -> None:
    """Gives the finished files their real names, the index last: shards without one are refused by `open_folder`."""
    if len(shards) == 1:
        os.replace(shards[0][0], folder / SINGLE_FILE)
        return
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, (path, _) in zip(names, shards, strict=True):
        os.replace(path, folder / name)
    index: dict[str, Any] = {
        "metadata": {"total_size": sum(sum(sizes.values()) for _, sizes in shards)},
        "weight_map": {tensor: name for name, (_, sizes) in zip(names, shards, strict=True) for tensor in sizes},
    }
    (scratch / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    os.replace(scratch / INDEX_FILE, folder / INDEX_FILE)
