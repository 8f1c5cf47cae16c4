"""The folder that a run is kept in: its settings, its history, and snapshots of its state."""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from checkpoints import snapshots
from checkpoints.json_files import read_object
from jaxengine.base.arguments import integer
from jaxengine.base.files import held, write_whole
from jaxengine.rl.loops.data import Positioned
from jaxengine.rl.loops.history import History
from jaxengine.rl.train_state import TrainState

OnSnapshot = Callable[[TrainState, Path], Any]


class RunFolder:
    """A folder for one run; a process that goes on from it comes to the bits of one that was not stopped.

    `settings`, a JSON object, are all that the run's bits depend on: run.json keeps them. A snapshot is due every
    `every` iterations (0: only where the run ends), the newest `keep` stay, and `on_snapshot(state, path)` is called
    after each. history.jsonl has a line an iteration and an evaluation. `added` are settings that runs of earlier
    versions of a program kept no name for, with the values that those runs had. Raises ValueError where the folder has
    another run's settings.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any],
        *,
        every: int = 20,
        keep: int = 2,
        on_snapshot: OnSnapshot | None = None,
        added: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.on_snapshot = Path(path), on_snapshot
        self.every, self.keep = integer("every", every, 0), integer("keep", keep, 1)
        _claim(self.path, settings, added or {})

    @property
    def step(self) -> int:
        """Iterations done at the newest snapshot; 0 where there is none."""
        return max(snapshots.steps(self.path), default=0)

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Inside, no other run writes here. Raises BlockingIOError naming the process where one does."""
        return held(self.path / "run.lock")

    def is_due(self, step: int) -> bool:
        return step > 0 and self.every > 0 and step % self.every == 0

    def restore(self, state: TrainState, problems: Any) -> tuple[TrainState, History]:
        """(the newest snapshot's state, or `state` where there is none; the history up to it).

        `problems` that have a position are set to the snapshot's.
        """
        step = self.step
        if snapshots.steps(self.path):
            state = snapshots.restore(self.path, state, step)
            self._set_position(problems, self._position(step))
        return state, History.kept(self.path / "history.jsonl", int(state.version))

    def save(self, state: TrainState, problems: Any) -> None:
        """A snapshot of the state, and the position of `problems` that have one. Does nothing where there is one."""
        step = int(state.version)
        if step in snapshots.steps(self.path):
            return
        if isinstance(problems, Positioned):  # first, so that no snapshot is without its position
            write_whole(self._position(step), json.dumps(problems.get_state()))
        path = snapshots.save(self.path, step, state, keep=self.keep)
        kept = [self._position(step) for step in snapshots.steps(self.path)]
        for old in set(self.path.glob("position_*.json")).difference(kept):
            old.unlink()
        if self.on_snapshot is not None:
            self.on_snapshot(state, path)

    def _position(self, step: int) -> Path:
        return self.path / f"position_{step:08d}.json"

    def _set_position(self, problems: Any, path: Path) -> None:
        if isinstance(problems, Positioned) != path.exists():
            has, problem = ("a", "have none") if path.exists() else ("no", "have one")
            raise ValueError(
                f"{path.parent} has {has} position of its problems ({path.name}), and the problems given {problem}: "
                "give the same kind of problems to go on, or another folder"
            )
        if isinstance(problems, Positioned):
            problems.set_state(read_object(path))


def _claim(folder: Path, given: Mapping[str, Any], added: Mapping[str, Any]) -> None:
    """Write a run's settings into its folder. Raises ValueError where it has another run's."""
    path, settings = folder / "run.json", json.loads(json.dumps(dict(given)))  # as the file gives them back
    if path.exists():
        earlier = {**added, **read_object(path)}
        names = [name for name in {**settings, **earlier} if earlier.get(name) != settings.get(name)]
        if names:
            differences = "; ".join(f"{name}={earlier.get(name)} there, {settings.get(name)} given" for name in names)
            raise ValueError(
                f"{folder} belongs to another run: {differences}. Give the same settings to go on, or another folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(settings, indent=2) + "\n")
