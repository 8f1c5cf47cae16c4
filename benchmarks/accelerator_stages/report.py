"""The results as JSON and as Markdown tables. No jax is imported here."""

import dataclasses
import datetime
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerator_stages import events
from accelerator_stages.measurement import Settings
from accelerator_stages.supervise import BENCHMARKS, Stage, events_file

Cells = dict[str, Any]
BROKEN = ("failed:", "ended:", "cut:")  # beginnings of a note that is no mere lack of time


@dataclasses.dataclass(frozen=True)
class Report:
    """What is known of a run so far."""

    heading: Cells  # commit, date, settings
    stages: list[Cells]  # of each: name, title, seconds, rows

    @property
    def rows(self) -> list[Cells]:
        return [row for stage in self.stages for row in stage["rows"]]

    @property
    def failed(self) -> list[str]:
        """Names of the measurements whose check failed."""
        return list(dict.fromkeys(row["what"] for row in self.rows if row.get("holds") is False))

    @property
    def broken(self) -> list[str]:
        """Names of the measurements that ended in an error."""
        return [row["what"] for row in self.rows if row.get("note", "").startswith(BROKEN)]

    def write(self, folder: Path) -> None:
        _replace(folder / "results.json", json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n")
        _replace(folder / "results.md", self.to_markdown())

    def to_markdown(self) -> str:
        heading = "\n".join(f"- {name}: {value}" for name, value in self.heading.items())
        parts = [f"# What an accelerator gave\n\n{heading}\n- {self.verdict}\n"]
        return "\n".join(parts + [_section(stage) for stage in self.stages])

    @property
    def verdict(self) -> str:
        checks = sum("holds" in row for row in self.rows)
        text = f"checks: {checks}, failed: {', '.join(self.failed) or 'none'}"
        return f"{text}; ended in an error: {', '.join(self.broken) or 'none'}"


def gather(stages: Sequence[Stage], settings: Settings, heading: Cells, seconds: dict[str, float]) -> Report:
    """The report from the stages' files."""
    found = []
    for stage in stages:
        told = events.read(events_file(stage, settings))
        rows = list(events.rows(told)) or [{"what": stage.name, "note": "not begun"}]
        found.append(dict(name=stage.name, title=stage.title, seconds=seconds.get(stage.name), rows=rows))
    return Report(heading, found)


def new_heading(settings: Settings, minutes: float) -> Cells:
    return {
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "settings": f"{minutes:g} minutes, {'tiny shapes' if settings.tiny else 'full shapes, tiny on a CPU'}",
    }


def _commit() -> str:
    command = ["git", "-C", str(BENCHMARKS), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown: this is no checkout of git's"
    return found.stdout.strip()


def _replace(file: Path, text: str) -> None:
    """Write a file so that a run that is cut leaves the old one or the new one."""
    new = file.with_name(file.name + ".new")
    new.write_text(text)
    new.replace(file)


def _section(stage: Cells) -> str:
    columns = list(dict.fromkeys(column for row in stage["rows"] for column in row))
    columns.sort(key="note".__eq__)
    spent = "" if stage["seconds"] is None else f" ({stage['seconds']:.0f} s)"
    lines = [columns, ["---"] * len(columns), *([_text(c, row.get(c)) for c in columns] for row in stage["rows"])]
    return f"## {stage['title']}{spent}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _text(column: str, value: Any) -> str:
    if column == "holds" and value is not None:
        return "holds" if value else "**FAILS**"
    if value is None or isinstance(value, str):
        return (value or "").replace("|", "\\|")
    if column.startswith("share"):
        return f"{value:.1%}"
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
