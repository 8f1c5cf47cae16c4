"""Compiled code that all processes of a test run share and that stays in the user's cache folder between runs.

Compiling is most of what the tests cost.
"""

import os

import jax

from jaxengine.base import compiled_code

NAMES = ("jax_compilation_cache_dir", "jax_compilation_cache_max_size", "jax_persistent_cache_min_compile_time_secs")


def share_compiled_code() -> None:
    """Sets JAX's compilation cache for this process and those that it starts. A folder that the caller chose stays."""
    if compiled_code.keep("jaxengine-tests") is None:
        return
    for name in NAMES:
        os.environ[name.upper()] = str(getattr(jax.config, name))
