"""jaxengine: a bitwise-deterministic LLM inference engine for JAX reinforcement learning.

Importing it touches no device.
"""

import importlib
import importlib.util

_HOMES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "SamplingParams": "sampling_params",
    "StructuredOutputsParams": "base.structured_outputs",
    "RequestOutput": "outputs",
    "CompletionOutput": "outputs",
    "Logprob": "outputs",
    "generate": "functional",
    "score": "functional",
    "sampling_mask": "functional",
    "grammar_mask": "functional",
    "Rollout": "rl.rollout",
    "ModelConfig": "config",
    "EngineConfig": "config",
}
_MODULES = ("distributed",)
__all__ = [*_HOMES, *_MODULES]
__version__ = "0.1.0"


def _check_neighbours() -> None:
    """`sharding` and `checkpoints` are words that users give their own files: say so where one of theirs hides ours."""
    for module in ("checkpoints.key_table", "pallas_kernels.tiles", "sharding.leaves"):
        name = module.partition(".")[0]
        if _find(module) is None:
            found = importlib.import_module(name)
            where = getattr(found, "__file__", None) or ", ".join(getattr(found, "__path__", []))
            raise ImportError(
                f"`import {name}` found {where}, which hides the package of the same name that jaxengine brings: "
                "rename that file or folder, or run from another directory"
            )


def _find(module: str) -> object:
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the parent is a plain file and has no submodules
        return None


_check_neighbours()


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f"jaxengine.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxengine' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"jaxengine.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
