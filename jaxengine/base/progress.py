"""Progress on long work, on standard error or as a notebook's widget."""

import sys
import warnings
from collections.abc import Callable

with warnings.catch_warnings():
    # Where ipywidgets is missing tqdm warns, with a path of the machine in it, and takes text bars: they will do.
    warnings.simplefilter("ignore")
    from tqdm.auto import tqdm


class Progress:
    """One switch for every bar and line; silent when off."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def line(self, text: str) -> None:
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def bar(self, total: int, description: str, unit: str, initial: int = 0) -> "tqdm":
        silent = not self.enabled
        return tqdm(total=total, initial=initial, desc=description, unit=unit, disable=silent, dynamic_ncols=True)

    def counter(self, description: str, unit: str) -> Callable[[int, int], None]:
        """A callback(done, total) that draws a bar and closes it at the end."""
        bars: list[tqdm] = []

        def update(done: int, total: int) -> None:
            if not bars:
                bars.append(self.bar(total, description, unit))
            bars[0].update(done - bars[0].n)
            if done == total:
                bars[0].close()

        return update


Report = Callable[[str], None]


def say_nothing(text: str) -> None:
    """A Report that shows nothing."""
