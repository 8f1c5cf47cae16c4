"""One safetensors file of arrays of any dtype, and text: what a run records, as opposed to a model's weights."""

import os
import tempfile
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


def write_tensors(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write the file, whole or not at all. Raises FileExistsError where there is one: a record is never overwritten."""
    if path.exists():
        raise FileExistsError(f"{path} exists: save under another name, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path.parent) as scratch:
        unfinished = Path(scratch) / path.name
        unfinished.touch()
        mode = unfinished.stat().st_mode
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, unfinished, metadata=metadata)
        unfinished.chmod(mode)  # save_file makes a file that its owner alone can read, whatever the umask
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.link(unfinished, path)  # unlike a rename, it fails where a file has been made there since


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata. Raises FileNotFoundError, or ValueError naming a truncated or corrupt file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt, or no safetensors file: {error}") from error
