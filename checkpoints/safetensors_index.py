"""Which files hold the tensors of a folder: one file, or the shards that an index names. Checked both ways."""

import re
from collections.abc import Iterable
from pathlib import Path

from checkpoints.json_files import read_object
from checkpoints.safetensors_header import Header, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# One plain file name: no separator, no drive, no control character, so it cannot lead out of the folder.
_SHARD_NAME = re.compile(r"[\w][\w .+=-]*\.safetensors", re.ASCII)
_ONE_OF_MANY = re.compile(r".*-of-0*([2-9]|[1-9]\d+)\.safetensors")


def headers_of(folder: Path) -> list[Header]:
    """The checked headers of a folder's one file of tensors, or of its index's shards. Raises as `open_folder` does."""
    index = folder / INDEX_FILE
    if not index.exists():
        return [read_header(_only_file(folder))]
    weight_map = _weight_map(index)
    if (folder / SINGLE_FILE).exists() and SINGLE_FILE not in weight_map.values():
        raise ValueError(
            f"{folder} has both {SINGLE_FILE} and {INDEX_FILE}, which does not name it: remove the one that is not "
            "meant"
        )
    headers = [_shard_header(index, shard) for shard in sorted(set(weight_map.values()))]
    _check_index(index, weight_map, headers)
    return headers


def _only_file(folder: Path) -> Path:
    """The one safetensors file of a folder without an index."""
    if (folder / SINGLE_FILE).exists():
        return folder / SINGLE_FILE
    files = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))
    shards = [file.name for file in files if _ONE_OF_MANY.fullmatch(file.name)]
    if shards:
        raise FileNotFoundError(f"{folder / INDEX_FILE} is missing: {shards[0]} is one of several shards")
    if len(files) > 1:
        raise ValueError(
            f"{folder} has {len(files)} safetensors files, {files[0].name} and others, and no {INDEX_FILE} to tell "
            "them apart"
        )
    if not files:
        _refuse_pickles(folder)
        raise FileNotFoundError(
            f"{folder} has no tensors: expected {SINGLE_FILE}, or {INDEX_FILE} with shards; only safetensors are read"
        )
    return files[0]


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(
            f"{folder / pickles[0]} is a pickle, which can run code when it is opened; only safetensors are read. To "
            "convert it, where you trust it: transformers.AutoModelForCausalLM.from_pretrained(folder)."
            "save_pretrained(new_folder)"
        )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} must have a weight_map from tensor names to shards, got {weight_map!r:.80}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise ValueError(
                f"{index} puts {name!r} into {shard!r:.80}: expected the plain name of a safetensors file in the folder"
            )
    return weight_map


def _shard_header(index: Path, shard: str) -> Header:
    # A shard may be a symbolic link: the hub's cache keeps the bytes elsewhere and links to them.
    path = index.parent / shard
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing, and {index.name} names it")
    return read_header(path)


def _check_index(index: Path, weight_map: dict[str, str], headers: Iterable[Header]) -> None:
    """Each tensor of the index lies in the shard that it names, and each tensor of a shard is in the index."""
    present = {(name, header.path.name) for header in headers for name in header.slots}
    absent, unnamed = sorted(set(weight_map.items()) - present), sorted(present - set(weight_map.items()))
    if absent:
        raise ValueError(f"{index} is wrong: {absent[0][1]} has no tensor {absent[0][0]!r} ({len(absent)} such)")
    if unnamed:
        raise ValueError(
            f"{index} is wrong: it does not put {unnamed[0][0]!r} into {unnamed[0][1]}, which has it "
            f"({len(unnamed)} such)"
        )
