"""A run's history, from its first iteration on: in memory, and as a file of a JSON object a line."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxengine.base.files import write_whole
from jaxengine.rl.loops.step_metrics import step_metrics

Record = dict[str, Any]  # the fields of an Iteration, or {"version": of the weights, "evaluation": {name: number}}


class Entry(NamedTuple):
    """What a sink gets at once."""

    step: int  # iterations that were done when it was measured
    metrics: dict[str, float]


class History:
    """`records` are the lines of the file at `path`, and `entries` the same as sinks get them."""

    def __init__(self, path: Path | None = None, records: Iterable[Record] = ()) -> None:
        self.path, self.records = path, list(records)
        self.entries = [_entry(record) for record in self.records]

    @classmethod
    def kept(cls, path: Path, step: int) -> "History":
        """What was measured in the first `step` iterations. What is after it is taken out of the file, because it is
        computed again.

        Without a file there is nothing. Half a line, of a process that died, is one that is computed again.
        """
        lines = path.read_text().splitlines() if path.exists() else []
        found = [record for line in lines if (record := _record(line)) is not None and _step(record) <= step]
        if len(found) < len(lines):
            write_whole(path, "".join(json.dumps(record) + "\n" for record in found))
        return cls(path, found)

    def add(self, record: Record) -> Entry:
        """One record more; it is in the file when this returns."""
        entry = _entry(record)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        self.records.append(record)
        self.entries.append(entry)
        return entry

    @property
    def iterations(self) -> list[Record]:
        """The fields of each Iteration, without the evaluations between them."""
        return [record for record in self.records if not _is_evaluation(record)]

    def has_evaluation(self, step: int) -> bool:
        return any(_is_evaluation(record) and _step(record) == step for record in self.records)


def _is_evaluation(record: Mapping[str, Any]) -> bool:
    return "evaluation" in record


def _step(record: Mapping[str, Any]) -> int:
    """Iterations done when it was measured: an iteration's own is among them."""
    return record["version"] + (not _is_evaluation(record))


def _entry(record: Record) -> Entry:
    if _is_evaluation(record):
        return Entry(_step(record), {f"evaluation/{name}": x for name, x in record["evaluation"].items()})
    return Entry(_step(record), step_metrics(record))


def _record(line: str) -> Record | None:
    try:
        return json.loads(line)
    except ValueError:
        return None
