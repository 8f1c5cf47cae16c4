"""Whole numbers rounded up."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up to a whole number; b is positive."""
    return -(-a // b)


def ceil_to(value: int, unit: int) -> int:
    """The smallest multiple of `unit` that is at least `value`."""
    return cdiv(value, unit) * unit
