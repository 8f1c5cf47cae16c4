"""JSON objects of a model folder: bounded in size, and every error names the file."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 100_000_000  # the index of a model of 100,000 tensors has about 10 MB


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file at `path`. Raises FileNotFoundError and ValueError, both naming the file."""
    if not path.is_file():  # reading a named pipe would wait for ever
        raise FileNotFoundError(f"{path} is missing or not a regular file")
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size} bytes: at most {MAX_JSON_BYTES} are read")
    return parse_object(path.read_bytes(), str(path))


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """`text` as a JSON object. Raises ValueError that begins with `where`, for a key given twice too."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"{where} is not valid JSON: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are kinds of it
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a JSON object, got {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # The last of two equal keys would win silently, and another reader may take the first.
    value = dict(pairs)
    if len(value) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {key!r} is given twice")
    return value
