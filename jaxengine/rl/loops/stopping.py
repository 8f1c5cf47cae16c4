"""Conditions on which a run ends early: functions of its history, so that a resumed run ends where it would have."""

import math
from collections.abc import Callable, Sequence

from jaxengine.base.arguments import integer, nearest
from jaxengine.rl.loops.history import Entry

StopWhen = Callable[[Sequence[Entry]], bool]


def not_better(metric: str, times: int, *, lower_is_better: bool = False) -> StopWhen:
    """Stop when the last `times` values of a metric are none better than the best before them.

    "reward" has a value each iteration, "evaluation/NAME" one each evaluation. NaN is worse than any number. Raises
    ValueError, after an iteration, where no such metric has come.
    """
    integer("times", times, 1)

    def stop_when(history: Sequence[Entry]) -> bool:
        known = {name for entry in history for name in entry.metrics}
        if metric not in known and any(entry.step > 0 for entry in history):
            raise ValueError(
                f"no metric {metric!r} to stop by{nearest(metric, known) or '.'} There are: {', '.join(sorted(known))}"
            )
        values = [entry.metrics[metric] for entry in history if metric in entry.metrics]
        scores = [-math.inf if math.isnan(x) else -x if lower_is_better else x for x in values]
        return len(scores) > times and max(scores[-times:]) <= max(scores[:-times])

    return stop_when
