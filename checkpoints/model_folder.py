"""Finds the folder of a model and reads its configuration.

Names become paths only inside this package; no code of a folder is ever run.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from checkpoints.json_files import read_object

# What is fetched from the hub: no pickle, no code, and not the second copy of the weights that some repositories carry.
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
NOT_HUB_FILES = ("*/*.safetensors", "consolidated*.safetensors")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
GENERATION_FILE = "generation_config.json"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w][\w.-]*", re.ASCII)


def find_folder(model: str | os.PathLike[str], what: str = "model", revision: str | None = None) -> Path:
    """The folder of `model`: a local folder, else a model that ships, by name, else a hub id "org/name", downloaded.

    `what` is the argument's name in errors. `revision` is a branch, tag or commit of a hub id; without one it is the
    hub's own, "main". Raises FileNotFoundError that says what was tried, ValueError for what is neither text nor a
    path, and for a revision of what is not on the hub.
    """
    if revision is not None and (not isinstance(revision, str) or not revision):
        raise ValueError(f"revision must be a branch, tag or commit of a hub id, got {revision!r:.80}")
    if not isinstance(model, (str, os.PathLike)) or not os.fspath(model):  # "" would be the working directory
        raise ValueError(f"{what} must be a folder, a name or a hub id, got {model!r:.80}")
    folder = os.path.expanduser(os.fspath(model))
    shipped_folder = shipped(model) if isinstance(model, str) and _PLAIN_NAME.fullmatch(model) else None
    # A folder that only happens to be called like a shipped model is not one.
    if os.path.isdir(folder) and (shipped_folder is None or os.path.isfile(os.path.join(folder, "config.json"))):
        _refuse_revision(model, "a local folder", revision)
        return Path(folder).absolute()  # because tensors are read later, and a notebook may change its directory
    if not isinstance(model, str):
        raise FileNotFoundError(f"{folder} is not a folder")
    if shipped_folder is not None:
        _refuse_revision(model, "a model that ships", revision)
        return shipped_folder
    return _download(model, what, revision)


def shipped(name: str) -> Path | None:
    """The folder of the model that ships under `name`, None where there is none.

    Raises ValueError for a name that could be a path.
    """
    if not _PLAIN_NAME.fullmatch(name):
        raise ValueError(f"{name!r:.80} is not the name of a shipped model: letters, digits, '_', '.' and '-' only")
    folder = _package() / name
    is_model = os.path.isfile(folder / "config.json")  # unlike Path.is_file, False for a name too long for the system
    return folder if is_model else None


def shipped_names() -> list[str]:
    """The names that `shipped` finds."""
    return sorted(entry.parent.name for entry in _package().glob("*/config.json"))


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The parsed config.json of a model folder.

    Raises FileNotFoundError or ValueError naming the file; ValueError too where config.json or tokenizer_config.json
    names code to run.
    """
    if (Path(folder) / "adapter_config.json").exists() and not (Path(folder) / "config.json").exists():
        raise FileNotFoundError(
            f"{folder} holds an adapter and no model: merge it into its base first (peft's merge_and_unload, then "
            "save_pretrained)"
        )
    config = read_object(Path(folder) / "config.json")
    _refuse_remote_code(Path(folder) / "config.json", config)
    tokenizer_config = Path(folder) / "tokenizer_config.json"
    if tokenizer_config.exists():
        _refuse_remote_code(tokenizer_config, read_object(tokenizer_config))
    return config


def read_generation_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The parsed generation_config.json of a folder, {} where there is none. Raises ValueError naming a bad file."""
    path = Path(folder) / GENERATION_FILE
    return read_object(path) if path.exists() else {}


def copy_files(source: Path, target: str | os.PathLike[str], patterns: Sequence[str]) -> None:
    """Copy the files of `source` that match glob patterns (TOKENIZER_FILES); none need be there."""
    for pattern in patterns:
        for file in source.glob(pattern):
            copy = Path(target) / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())  # not a link, as they are in the hub's cache


def _package() -> Path:
    # With an editable install importlib.resources would take a folder "checkpoints" of the user's for this package.
    return Path(__file__).parent


def _refuse_revision(model: Any, what_it_is: str, revision: str | None) -> None:
    if revision is not None:
        raise ValueError(
            f"revision={revision!r:.80} names a commit of a hub id, and {os.fspath(model)!r:.200} is {what_it_is}: "
            "leave it out"
        )


def _download(model: str, what: str, revision: str | None) -> Path:
    if not _HUB_ID.fullmatch(model):
        raise FileNotFoundError(_tried(what, model, 'not asked, since its ids read "organisation/name"'))
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=list(NOT_HUB_FILES)
            )
        )
    except (RepositoryNotFoundError, HFValidationError) as error:
        reason = "no such repository, or a private one: log in with `hf auth login`"
        raise FileNotFoundError(_tried(what, model, f"{reason} ({_first_line(error)})")) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(_tried(what, model, f"has no revision {revision!r}: {_first_line(error)}")) from error
    except (LocalEntryNotFoundError, HfHubHTTPError) as error:
        wanted = "" if revision is None else f" at revision {revision!r}"
        raise FileNotFoundError(
            _tried(what, model, f"not reached, and not complete in its cache{wanted} ({_first_line(error)})")
        ) from error


def _tried(what: str, model: str, hub: str) -> str:
    ships = ", ".join(shipped_names()) or "none"
    return (
        f"{what} {model!r:.200} was not found. Tried: a local folder (there is none) · the models that ship ({ships}) "
        f"· the hub ({hub})"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _refuse_remote_code(path: Path, config: dict[str, Any]) -> None:
    pending: list[Any] = [config]
    while pending:  # parts of a model have configurations of their own inside
        value = pending.pop()
        if isinstance(value, dict) and "auto_map" in value:
            raise ValueError(
                f"{path} has an auto_map, which names code in the model's folder: remote code is never run, there is "
                "no trust_remote_code here. If the architecture is a supported one, remove the auto_map from a copy of "
                "the folder"
            )
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list):
            pending += value
