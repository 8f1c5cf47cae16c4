"""Runs a Loop from its first iteration to its last: evaluations, snapshots, sinks, an early end, and going on."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxengine.base.arguments import integer
from jaxengine.base.signals import noted
from jaxengine.rl.loops.history import History
from jaxengine.rl.loops.loop import Loop
from jaxengine.rl.loops.run_folder import RunFolder
from jaxengine.rl.loops.sinks import Sink
from jaxengine.rl.loops.stopping import StopWhen
from jaxengine.rl.train_state import TrainState

Evaluate = Callable[[TrainState], Mapping[str, float]]
AT_ONCE = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}  # for a second signal


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: after all its "iterations", by "stop_when", at "stop", or by "SIGINT" or "SIGTERM"."""

    state: TrainState
    history: History
    ended_by: str

    @property
    def is_over(self) -> bool:
        """Whether the run has come to its end, and is not only interrupted."""
        return self.ended_by in ("iterations", "stop_when")


def learn(
    loop: Loop,
    state: TrainState,
    iterations: int,
    *,
    folder: RunFolder | None = None,
    sinks: Sequence[Sink] = (),
    evaluate: Evaluate | None = None,
    evaluate_every: int = 0,
    stop_when: StopWhen | None = None,
    stop: int | None = None,
) -> Outcome:
    """Iterate until `iterations` are done, or `stop_when(history.entries)` says so, asked before each iteration.

    `evaluate(state)` is called before the first iteration, every `evaluate_every` (0: never) and at the run's end; its
    numbers are the metrics "evaluation/NAME". Each sink gets the metrics of each iteration and evaluation.

    With a `folder` the run goes on from its newest snapshot, and `state` is then where a run begins. It is interrupted
    after `stop` iterations of the whole run, and, in the main thread, by Ctrl-C or SIGTERM, after the iteration that is
    under way; a second signal ends at once. A snapshot is kept there too. `state` is donated. Raises BlockingIOError
    where another run is under way in the folder.
    """
    integer("iterations", iterations, 0)
    if integer("evaluate_every", evaluate_every, 0) and evaluate is None:
        raise ValueError(f"evaluate_every={evaluate_every} needs evaluate, a function of the state")
    history = History()

    def report(record: dict[str, Any]) -> None:
        entry = history.add(record)
        for sink in sinks:
            sink(entry.step, entry.metrics)

    def evaluate_once() -> None:
        step = int(state.version)
        if evaluate is not None and not history.has_evaluation(step):
            report({"version": step, "evaluation": {name: float(x) for name, x in evaluate(state).items()}})

    with contextlib.ExitStack() as stack:
        if folder is not None:
            stack.enter_context(folder.held())
            state, history = folder.restore(state, loop.problems)
        signal_name = stack.enter_context(_signals_noted())
        while True:
            step = int(state.version)
            if not signal_name() and (step == 0 or evaluate_every and step % evaluate_every == 0):
                evaluate_once()
            ended_by = signal_name() or _ended_by(step, iterations, stop_when, stop, history)
            outcome = Outcome(state, history, ended_by)
            if outcome.is_over:
                evaluate_once()
            if folder is not None and (ended_by or folder.is_due(step)):
                folder.save(state, loop.problems)
            if ended_by:
                return outcome
            state, iteration = loop.iterate(state)
            report(dataclasses.asdict(iteration))


def _ended_by(step: int, iterations: int, stop_when: StopWhen | None, stop: int | None, history: History) -> str:
    """What of Outcome.ended_by holds after `step` iterations; "" where the run goes on."""
    if step >= iterations:
        return "iterations"
    if stop_when is not None and stop_when(history.entries):
        return "stop_when"
    return "stop" if stop is not None and step >= stop else ""


@contextlib.contextmanager
def _signals_noted() -> Iterator[Callable[[], str]]:
    """Gives a function that names the signal that came, or ""; signals reach the main thread alone."""
    with contextlib.ExitStack() as stack:
        came: dict[str, Callable[[], bool]] = {}
        if threading.current_thread() is threading.main_thread():
            for number, at_once in AT_ONCE.items():
                message = f"\n{number.name}: this iteration ends first; once more ends at once"
                came[number.name] = stack.enter_context(noted(number, message, then=at_once))
        yield lambda: next((name for name, is_told in came.items() if is_told()), "")
