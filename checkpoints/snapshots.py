"""Snapshots of a run's state, any pytree of arrays, through orbax: written whole or not at all, read by bits."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

NAME = re.compile(r"step_(\d{8})")


def save(folder: str | os.PathLike[str], step: int, state: Any, *, keep: int = 2) -> Path:
    """Write `state` as the snapshot of `step`, then delete all but the newest `keep`; returns when it is on the disk.

    orbax writes under another name and renames, so a process that dies leaves the older snapshots. Raises ValueError
    where the step has one already.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    if step in steps(folder):
        raise ValueError(
            f"{folder} has a snapshot of step {step} already: give another folder, or continue from that one"
        )
    path = _path(folder, step)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(_path(folder, old))
    return path


def restore(folder: str | os.PathLike[str], like: Any, step: int | None = None) -> Any:
    """The state of `step`, or of the newest snapshot.

    `like` gives the tree, the shapes, the dtypes and the places; its values are not read.
    Raises FileNotFoundError where there is none, ValueError where the tree, a shape or a dtype is another.
    """
    present = steps(folder)
    if not present or (step is not None and step not in present):
        raise FileNotFoundError(
            f"{folder} has no snapshot{'' if step is None else f' of step {step}'}; it has steps {present}"
        )
    path = _path(folder, present[-1] if step is None else step)
    with ocp.StandardCheckpointer() as checkpointer:
        _check_fits(path, checkpointer.metadata(path).item_metadata.tree, like)
        restored = checkpointer.restore(path, jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
    return jax.tree.map(_committed_like, restored, like)


def _committed_like(restored: Any, like: Any) -> Any:
    """orbax ties every array to a device; jit would compile again for one that was not tied before."""
    return restored if getattr(like, "committed", True) else jnp.asarray(np.asarray(restored))


def steps(folder: str | os.PathLike[str]) -> list[int]:
    """Steps that have a snapshot, in order; none where there is no folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(match[1]) for name in names if (match := NAME.fullmatch(name)))


def _check_fits(path: Path, stored: Any, like: Any) -> None:
    """Raises ValueError, because orbax would convert another dtype silently."""
    have, want = _kinds(stored), _kinds(like)
    wrong = [
        f"{name}: {have.get(name, 'nothing')} in the snapshot, {want.get(name, 'nothing')} asked for"
        for name in sorted(have.keys() | want.keys())
        if have.get(name) != want.get(name)
    ]
    if wrong:
        raise ValueError(f"{path} does not fit, {len(wrong)} arrays differ:\n  " + "\n  ".join(wrong[:10]))


def _kinds(tree: Any) -> dict[str, str]:
    """The dtype and shape of each array, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _path(folder: str | os.PathLike[str], step: int) -> Path:
    return Path(folder).absolute() / f"step_{step:08d}"
