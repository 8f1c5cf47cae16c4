"""What a stage's process tells its supervisor: lines of JSON in a file, so that a process that dies leaves what it had.

plan     the names of all measurements to come
begin    a measurement has begun; `process` counts the processes of the stage
row      cells of the results' table
end, failed, ended, cut, skipped    how a measurement went; `text` says why
"""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OUTCOMES = ("end", "failed", "ended", "cut", "skipped")
Event = dict[str, Any]


def tell(file: Path, event: str, name: str = "", **more: Any) -> None:
    """Append an event."""
    line = json.dumps({"event": event, "name": name, "time": time.time(), **more}, allow_nan=False)
    with file.open("a") as lines:
        lines.write(line + "\n")


def read(file: Path) -> list[Event]:
    """All events; a last line that was cut off is none."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def planned(events: list[Event]) -> list[str]:
    return next((event["names"] for event in events if event["event"] == "plan"), [])


def open_names(events: list[Event]) -> list[str]:
    """Planned measurements without an outcome, in order; one that has begun is the first."""
    settled = {event["name"] for event in events if event["event"] in OUTCOMES}
    begun = [event["name"] for event in events if event["event"] == "begin"]
    rest = [name for name in planned(events) if name not in settled]
    return sorted(rest, key=lambda name: name not in begun)


def under_way(events: list[Event]) -> str | None:
    """The measurement that has begun and has no outcome yet."""
    names = open_names(events)
    return names[0] if names and any(e["event"] == "begin" and e["name"] == names[0] for e in events) else None


def as_cells(row: dict[str, Any]) -> dict[str, Any]:
    """Cells as JSON takes them: numbers of numpy and JAX as Python's, and those that are not finite by name."""
    return {column: _as_cell(value) for column, value in row.items()}


def _as_cell(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def rows(events: list[Event]) -> Iterator[dict[str, Any]]:
    """The table's rows in the plan's order: each measurement's cells, and a note where it did not end well."""
    names = planned(events)
    names += dict.fromkeys(event["name"] for event in events if event["name"] and event["name"] not in names)
    for name in names:
        for event in events:
            if event["name"] == name and event["event"] == "row":
                yield {"what": name, **event["cells"]}
            elif event["name"] == name and event["event"] in OUTCOMES[1:]:
                yield {"what": name, "note": f"{event['event']}: {event['text']}"}
