"""Compiled code that all processes of a test run share and that stays in the user's cache folder between runs.

Compiling is most of what the tests cost. A program's key in JAX's cache is what XLA is given, so changed code is
compiled again. The folder's name adds what that key leaves out: the processor, and the number of cores.
"""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import time
from pathlib import Path

import jax

BYTES = 3_000_000_000  # of one folder. With a limit JAX locks it, and drops what was not used for longest
KEPT_SECONDS = 30 * 86_400  # a folder of another processor or jaxlib that was not used for so long is removed
PROCESSOR = ("model name", "flags", "CPU part", "Features")  # lines of /proc/cpuinfo, x86's and ARM's


def share_compiled_code() -> None:
    """Sets JAX's compilation cache for this process and those that it starts. A folder that the caller chose stays."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        folder = claimed(user_cache() / "jaxengine-tests" / key())
    except OSError:  # nowhere to write: everything is compiled
        return
    for name, value in dict(
        jax_compilation_cache_dir=str(folder),
        jax_compilation_cache_max_size=BYTES,
        jax_persistent_cache_min_compile_time_secs=0.2,
    ).items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


def user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def key() -> str:
    """A folder's name: equal where compiled code can be shared."""
    jaxlib = importlib.metadata.version("jaxlib")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    told = repr((processor(), cores, os.environ.get("XLA_FLAGS", "")))
    return f"jaxlib-{jaxlib}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def processor() -> list[str]:
    """What Linux says of the first processor's model and instructions; elsewhere the architecture."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return [platform.machine(), platform.processor()]
    return [line for line in info.read_text().split("\n\n")[0].splitlines() if line.startswith(PROCESSOR)]


def claimed(folder: Path) -> Path:
    """The folder, made and marked as in use; its siblings that nothing has used for long are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    for sibling in folder.parent.iterdir():
        if sibling.is_dir() and sibling.stat().st_mtime < time.time() - KEPT_SECONDS:
            shutil.rmtree(sibling, ignore_errors=True)
    return folder
