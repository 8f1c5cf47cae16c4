"""Where a run's metrics go: sinks for `learn`, functions of (step, metrics). Any function of these is one."""

import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxengine.base.extras import imported
from jaxengine.base.progress import Progress

Sink = Callable[[int, dict[str, float]], Any]  # a step is a number of iterations done
RECENT = 10  # iterations that the displayed reward is the mean of
SHOWN = {"entropy": ".3f", "kl": ".4f", "length": ".1f"}  # beside it, of the last iteration


class TensorBoard:
    """Writes TensorBoard's event files into the folder; a step is on the disk when the call returns.

    A run that goes on may write into its folder again: TensorBoard then shows the steps that were computed again once.
    Raises ImportError without tensorboardX.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        # Not its SummaryWriter, whose thread may write after a flush has returned.
        self._open = imported("tensorboardX.event_file_writer", "tensorboard").EventsWriter
        self._event = imported("tensorboardX.proto.event_pb2", "tensorboard").Event
        self._folder, self._writer = Path(folder), None

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        if self._writer is None:
            # What is in the folder holds before this step alone. An evaluation goes with an iteration that is in there.
            self._writer = self._started(step if "reward" in metrics else step + 1)
        values = [{"tag": name, "simple_value": value} for name, value in metrics.items()]
        self._writer.write_event(self._event(step=step, summary={"value": values}, wall_time=time.time()))
        self._writer.flush()

    def _started(self, step: int) -> Any:
        """A new file, which takes back what others in the folder have from `step` on."""
        self._folder.mkdir(parents=True, exist_ok=True)
        writer = self._open(str(self._folder / "events"), f".{time.time_ns()}")  # a name of its own
        weakref.finalize(self, writer.close)
        writer.write_event(self._event(step=step, session_log={"status": "START"}, wall_time=time.time()))
        return writer


class WeightsAndBiases:
    """Logs to `run`, a run of Weights & Biases; `settings` are given to wandb.init: project, name, config, mode, …

    The process's end, or run.finish(), ends it. For a run that goes on: id=NAME and resume="allow"; of steps that it
    had logged already it keeps the first. Raises ImportError without wandb.
    """

    def __init__(self, **settings: Any) -> None:
        self.run = imported("wandb", "wandb").init(**settings)

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)


class ProgressBar:
    """A bar of a run's iterations, `done` of which an earlier process did; in a `with`, which closes it."""

    def __init__(self, iterations: int, *, done: int = 0, name: str = "") -> None:
        self._rewards: list[float] = []
        self._bar = Progress(True).bar(iterations, name, "iteration", initial=done)
        self._bar.set_postfix_str("the first iteration compiles")

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        if "reward" not in metrics:  # of an evaluation
            return
        self._rewards = [*self._rewards, metrics["reward"]][-RECENT:]
        shown = {"reward": f"{sum(self._rewards) / len(self._rewards):.3f}"}
        shown |= {name: format(metrics[name], form) for name, form in SHOWN.items() if name in metrics}
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(step - self._bar.n)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()
