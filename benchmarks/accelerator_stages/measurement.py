"""What a stage consists of, and how its process runs it."""

import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from accelerator_stages.events import as_cells, tell

Row = dict[str, Any]  # column -> cell; a cell "holds" is a check, False where it fails


class Settings(NamedTuple):
    """What the command line says, for every stage."""

    tiny: bool  # everywhere; on a CPU stages are tiny in any case
    torch_python: str  # an interpreter that may have torch
    folder: str


class Measurement(NamedTuple):
    """Some rows of a stage's table. `run` yields each as soon as it is known."""

    name: str
    run: Callable[[], Iterable[Row]]


def measure(measurements: list[Measurement], events: Path, until: float) -> None:
    """Run those that have time to begin, each whether or not the others fail.

    Ends the process with code 1 where an error has left it without a device, so that another one does the rest.
    """
    for name, run in measurements:
        if time.time() > until:
            tell(events, "skipped", name, text="for time")
            continue
        tell(events, "begin", name)
        try:
            for row in run():
                tell(events, "row", name, cells=as_cells(row))
        except Exception as error:
            traceback.print_exc()
            tell(events, "failed", name, text=_brief(error))
            if not _device_answers():
                sys.exit(1)
        else:
            tell(events, "end", name, text="")
        gc.collect()


def _brief(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def _device_answers() -> bool:
    """Whether the device still computes, if this stage has one."""
    jax = sys.modules.get("jax")
    try:
        return jax is None or float(jax.numpy.ones(8).sum()) == 8.0
    except Exception:
        traceback.print_exc()
        return False
