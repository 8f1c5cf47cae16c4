"""Whole numbers rounded up, Python's and traced ones. No jax is imported, because sizes.py may not."""

from typing import Any


def cdiv(a: Any, b: int) -> Any:
    """a / b, rounded up."""
    return -(-a // b)


def ceil_to(a: Any, b: int) -> Any:
    """The smallest multiple of b that is no less than a."""
    return cdiv(a, b) * b


def power_of_two(n: int) -> int:
    """The smallest power of two that is no less than n ≥ 1."""
    return 1 << (n - 1).bit_length()
