"""Where a run's metrics go: sinks for `learn`, functions of (step, metrics). Any function of these is one."""

import os
from collections.abc import Callable
from typing import Any

from jaxengine.base.extras import imported
from jaxengine.base.progress import Progress

Sink = Callable[[int, dict[str, float]], Any]  # a step is a number of iterations done
RECENT = 10  # iterations that the displayed reward is the mean of
SHOWN = {"entropy": ".3f", "kl": ".4f", "length": ".1f"}  # beside it, of the last iteration


def tensorboard(folder: str | os.PathLike[str]) -> Sink:
    """Writes TensorBoard's event files into the folder; each step is in them when the sink returns.

    A run that goes on may write into its folder again: TensorBoard then shows the steps that were computed again once.
    Raises ImportError without tensorboardX.
    """
    library, writers = imported("tensorboardX", "tensorboard"), []

    def sink(step: int, metrics: dict[str, float]) -> None:
        if not writers:
            # From here on what is in the folder holds no more. An evaluation goes with an iteration that is in there.
            again = step if "reward" in metrics else step + 1
            writers.append(library.SummaryWriter(os.fspath(folder), purge_step=again))
        for name, value in metrics.items():
            writers[0].add_scalar(name, value, step)
        writers[0].flush()

    return sink


def wandb(**settings: Any) -> Sink:
    """Logs to a run of Weights & Biases, which `settings` are given to wandb.init for: project, name, config, mode, …

    The process's end, or wandb.finish(), ends it. For a run that goes on: id=NAME and resume="allow"; of steps that it
    had logged already it keeps the first. Raises ImportError without wandb.
    """
    run = imported("wandb", "wandb").init(**settings)

    def sink(step: int, metrics: dict[str, float]) -> None:
        run.log(metrics, step=step)

    return sink


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
