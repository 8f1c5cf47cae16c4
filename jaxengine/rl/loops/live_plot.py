"""A plot of a run in a notebook, drawn again in its place as the run goes: a sink for `learn`."""

import io
from collections.abc import Sequence
from typing import Any

from jaxengine.base.arguments import integer
from jaxengine.base.extras import imported

NAMES = ("reward", "entropy", "kl", "length")
PANEL = 3.2, 2.6  # inches


class LivePlot:
    """A panel for each metric of `names`, over the steps; drawn at every `every`th step.

    Outside a notebook nothing is shown: `figure`, matplotlib's, can be saved. Raises ImportError without matplotlib.
    """

    def __init__(self, names: Sequence[str] = NAMES, *, every: int = 1) -> None:
        self.every = integer("every", every, 1)
        # No pyplot: it would choose a window system, and keep the figure for ever.
        self.figure = imported("matplotlib.figure", "notebooks").Figure(
            figsize=(PANEL[0] * len(names), PANEL[1]), layout="constrained"
        )
        panels = self.figure.subplots(1, len(names), squeeze=False)[0]
        self._lines = {name: _line(panel, name) for name, panel in zip(names, panels, strict=True)}
        self._display: Any = None  # IPython's handle of what is shown

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        for name, line in self._lines.items():
            if name in metrics:
                steps, values = line.get_data()
                line.set_data([*steps, step], [*values, metrics[name]])
                line.axes.relim()
                line.axes.autoscale_view()
        if step % self.every == 0 and _is_notebook():
            self._show()

    def _show(self) -> None:
        buffer, display = io.BytesIO(), imported("IPython.display", "notebooks")
        self.figure.savefig(buffer, format="png")
        picture = display.Image(data=buffer.getvalue())
        if self._display is None:
            self._display = display.display(picture, display_id=True)
        else:
            self._display.update(picture)


def _line(panel: Any, name: str) -> Any:
    panel.set_title(name)
    panel.set_xlabel("iteration")
    return panel.plot([], [], marker=".", markersize=3, linewidth=1)[0]


def _is_notebook() -> bool:
    try:
        shell = imported("IPython", "notebooks").get_ipython()
    except ImportError:
        return False
    return hasattr(shell, "kernel")  # a terminal's shell has none
