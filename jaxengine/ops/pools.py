"""A layer's pages."""

from typing import Any, NamedTuple


class Pools(NamedTuple):
    """All pages of one layer, laid out as `Kernels.attention` has them: arrays, their shapes, or how they are split."""

    keys: Any
    values: Any
