"""Compiled code that stays in the user's cache folder, so that a step is compiled once and not in every process.

JAX keeps it: its cache writes an entry once, under a lock that processes share, and reads past a broken one with a
warning. A program's key in it is what XLA is given; the folder's name adds what that key leaves out.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import jax

from jaxengine.base import machine

BYTES = 3_000_000_000  # of one folder: what was not used for longest goes first
KEPT_SECONDS = 30 * 86_400  # a folder of another processor or jaxlib that was not used for so long is removed
LEAST_SECONDS = 0.1  # that compiling took: less is not worth a file
DEFAULT_SECONDS = 1.0  # JAX's own least
log = logging.getLogger("jaxengine")


def keep(name: str = "jaxengine") -> Path | None:
    """Tell JAX to keep compiled code in a folder of that name in the user's cache, for the whole process.

    Returns it; None where nothing can be written there, or JAX was told another folder before (by
    JAX_COMPILATION_CACHE_DIR or jax.config), which stays.
    """
    told: Any = jax.config  # its values are attributes that no type checker knows
    if told.jax_compilation_cache_dir:
        return None
    try:
        folder = _claimed(user_cache() / name / "compiled" / _key())
    except (OSError, RuntimeError) as error:  # RuntimeError where the user has no home
        log.warning("compiled code is not kept: %s", error)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", BYTES)
    if told.jax_persistent_cache_min_compile_time_secs == DEFAULT_SECONDS:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    return folder


def user_cache() -> Path:
    """The folder for what can be made again (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _key() -> str:
    """A folder's name: equal where compiled code can be shared."""
    jaxlib = importlib.metadata.version("jaxlib")
    told = [machine.device(), machine.compiler(), machine.compiler_flags()]
    return f"jaxlib-{jaxlib}-{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]}"


def _claimed(folder: Path) -> Path:
    """The folder, made and marked as in use; its siblings that nothing has used for long are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    for sibling in folder.parent.iterdir():
        if sibling.is_dir() and sibling.stat().st_mtime < time.time() - KEPT_SECONDS:
            shutil.rmtree(sibling, ignore_errors=True)
    return folder
