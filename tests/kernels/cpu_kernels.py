"""For tests of the CPU's kernels: the bodies that this processor has, and bits.

Where they were not built, a test module that imports this is skipped with the reason.
"""

import numpy as np
import pytest
from conftest import CPU_BODIES as BODIES
from conftest import NO_CPU_KERNELS

if not BODIES:
    pytest.skip(NO_CPU_KERNELS, allow_module_level=True)

DTYPES = ("bfloat16", "float16", "float32")
SIZES = (1, 2, 3, 5, 6, 7, 11, 13, 16, 19, 23, 31, 33, 37, 48, 65, 90, 96, 97, 111, 130)  # 21 numbers of rows


def bits(x) -> np.ndarray:
    return np.asarray(x, np.float32).view(np.uint32)


def same(a, b) -> bool:
    return np.array_equal(bits(a), bits(b))


def f64(x) -> np.ndarray:
    return np.asarray(x, np.float64)
