"""One process of a stage: `python -m accelerator_stages.worker TASK`, where TASK is a Task in JSON."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

from accelerator_stages.events import OUTCOMES, read, tell
from accelerator_stages.measurement import Settings, measure


class Task(NamedTuple):
    """What the supervisor asks of the process."""

    module: str  # has `measurements(settings, **options)`
    options: dict[str, Any]
    settings: Settings
    events: str  # the file; measurements that have an outcome in it are not done again
    until: float  # no measurement begins after it: seconds, as time.time() tells them


def main(text: str) -> None:
    task = Task(*json.loads(text))
    file = Path(task.events)
    module = importlib.import_module(task.module)
    measurements = module.measurements(Settings(*task.settings), **task.options)
    tell(file, "plan", names=[measurement.name for measurement in measurements])
    settled = {event["name"] for event in read(file) if event["event"] in OUTCOMES}
    measure([each for each in measurements if each.name not in settled], file, task.until)


if __name__ == "__main__":
    main(sys.argv[1])
