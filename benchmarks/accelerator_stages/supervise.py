"""Runs stages one after the other, each in processes of its own, within a budget of time.

Only one process holds the device at a time, and it is never this one: no jax is imported here. A process that dies or
hangs is followed by another, which goes on after the measurement that did it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerator_stages.events import open_names, planned, read, tell, under_way
from accelerator_stages.measurement import Settings
from accelerator_stages.worker import Task

BENCHMARKS = Path(__file__).parents[1]
SETTLED_AT = 0.8  # of a stage's time: no measurement begins later
LEAST = 3.0  # seconds that are worth another process
GLANCE = 1.0  # seconds between two looks at a process


class Stage(NamedTuple):
    """A group of measurements, and how much of the time it may take."""

    name: str
    title: str
    module: str
    share: float  # of the time that is left, among the shares of this stage and those to come
    patience: float = 1.0  # how much of the stage's time one row of a measurement may take
    options: dict[str, Any] = {}
    environment: dict[str, str] = {}


def run_all(
    stages: Sequence[Stage], settings: Settings, seconds: float, looked: Callable[[dict[str, float]], None]
) -> dict[str, float]:
    """Run the stages; returns the seconds of each. `looked` is called with those so far, whenever there may be news."""
    end, spent = time.time() + seconds, {}
    for place, stage in enumerate(stages):
        start = time.time()
        share = stage.share / sum(later.share for later in stages[place:])
        StageRun(stage, settings, max(end - start, 0.0) * share, lambda: looked(spent)).run()
        spent[stage.name] = time.time() - start
        print(f"{stage.title}: {spent[stage.name]:.0f} s", flush=True)
    return spent


def events_file(stage: Stage, settings: Settings) -> Path:
    return Path(settings.folder) / "stages" / f"{stage.name}.jsonl"


class StageRun:
    """A stage's processes, one after the other."""

    def __init__(self, stage: Stage, settings: Settings, seconds: float, looked: Callable[[], None]) -> None:
        self.stage, self.settings, self.looked = stage, settings, looked
        self.file = events_file(stage, settings)
        self.begin_until, self.end = time.time() + SETTLED_AT * seconds, time.time() + seconds
        self.patience = stage.patience * seconds

    def run(self) -> None:
        """Start processes until every measurement has an outcome, the time is over, or one has begun none of them."""
        going_on = True
        while going_on and time.time() + LEAST < self.end:
            before = len(open_names(read(self.file)))
            self._run_process()
            left = open_names(read(self.file))
            going_on = bool(left) and len(left) != before
        self._settle("for time" if going_on else "its process did not begin it")
        self.looked()

    def _settle(self, why: str) -> None:
        """Every measurement without an outcome gets one, and so does a stage of which nothing is known."""
        events = read(self.file)
        for name in open_names(events) if events else [self.stage.name]:
            tell(self.file, "skipped", name, text=why)

    def _run_process(self) -> None:
        process = self._start()
        try:
            died = self._watch(process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        events = read(self.file)
        name = under_way(events) or ("" if planned(events) else self.stage.name)
        if died and name:
            outcome, text = died
            tell(self.file, outcome, name, text=f"{text}; see {self.stage.name}.log")

    def _start(self) -> subprocess.Popen:
        """A process that leads a group of its own, so that what it starts ends with it."""
        stage = self.stage
        task = Task(stage.module, stage.options, self.settings, str(self.file), self.begin_until)
        paths = [str(BENCHMARKS.parent), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | stage.environment
        command = [sys.executable, "-m", "accelerator_stages.worker", json.dumps(task)]
        with self.file.with_suffix(".log").open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def _watch(self, process: subprocess.Popen) -> tuple[str, str] | None:
        """Wait for the process; (outcome, text) of the measurement that it died in or was too long at, if any."""
        while True:
            try:
                code = process.wait(timeout=min(GLANCE, max(self.end - time.time(), 0.01)))
                return ("ended", ending(code)) if code else None
            except subprocess.TimeoutExpired:
                self.looked()
            if time.time() > self.end:
                return "cut", "the stage's time was over"
            if self._is_stuck():
                return "cut", f"nothing came for {self.patience:.0f} s"

    def _is_stuck(self) -> bool:
        events = read(self.file)
        return under_way(events) is not None and time.time() > events[-1]["time"] + self.patience


def ending(code: int) -> str:
    """An exit code in words."""
    return f"the process ended with code {code}" if code > 0 else f"the process ended by {signal.Signals(-code).name}"
