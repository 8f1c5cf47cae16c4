"""The declaration of one array of parameters; blocks of the decoder declare theirs beside the code that reads them.

Every matrix carries the leaf axis first (sharding/leaves.py) and its outputs before its inputs: `[leaf, N, K]`.
"""

import dataclasses
from typing import Any, Literal

from jaxengine.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Parameter:
    """Shape, dtype, logical axes (for sharding) and initialiser of one array."""

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    init: Literal["normal", "ones", "zeros"] = "normal"


def split_by_outputs(model_config: ModelConfig, size: int) -> Any:
    """`[leaf, size / leaf, D]`: a product of the residual stream, each leaf with its own outputs."""
    leaves, width = model_config.reduction_leaves, model_config.hidden_size
    return Parameter((leaves, size // leaves, width), model_config.dtype, ("leaf", "out", None))


def split_by_inputs(model_config: ModelConfig, size: int) -> Any:
    """`[leaf, D, size / leaf]`: a product that is added to the residual stream, each leaf with its own inputs."""
    leaves, width = model_config.reduction_leaves, model_config.hidden_size
    return Parameter((leaves, width, size // leaves), model_config.dtype, ("leaf", None, "in"))


def norm_scale(model_config: ModelConfig, width: int) -> Any:
    """`[width]`, on every device."""
    return Parameter((width,), model_config.dtype, (None,), "ones")
