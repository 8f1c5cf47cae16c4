"""The outputs of `jaxengine generate --json`: a record for every sample."""

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import Any

from jaxengine.coordinate import Coordinate


def records(outputs: Any) -> Iterable[dict[str, Any]]:
    """A dict ready for JSON for every sample: the fields of its request, then its own.

    A float32 reads back as the same bits.
    """
    for output in outputs:
        request = _fields(output)
        del request["outputs"], request["finished"]
        for sample in output.outputs:
            yield plain(request | _fields(sample))


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def plain(value: Any) -> Any:
    """Arrays as lists, dataclasses as dicts, floats that JSON has no form for as None."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Coordinate):
        return json.loads(value.to_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
