"""A run's history as a file: a JSON object a line, one an iteration, written as the run goes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from jaxengine.rl.loops.loop import Iteration


def append(path: Path, iteration: Iteration) -> None:
    """One line more, on the disk when this returns."""
    with path.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(iteration)) + "\n")


def kept(path: Path, version: int) -> list[dict[str, Any]]:
    """The iterations before `version`, and no other in the file: those after it are computed again.

    Without a file there are none. Half a line, of a process that died, is one that is computed again.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    found = [record for line in lines if (record := _record(line)) is not None and record["version"] < version]
    if len(found) < len(lines):
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(record) + "\n" for record in found))
        unfinished.replace(path)  # a process that dies here has lost nothing
    return found


def _record(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None
