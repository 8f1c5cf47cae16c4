"""Mathematical equivalence by the library math-verify; runs in worker processes for judging.math_equivalence."""

import importlib
import logging
from typing import Any

# Imported with this module, because the time limit of a worker's start is longer than that of the first sample.
math_verify: Any = importlib.import_module("math_verify")


def math_equivalent(prompt: Any, completion: str, answer: Any) -> float:
    """1.0 where math-verify finds the completion's last mathematical expression equal to the answer's."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of each call without a time limit
    # Its time limits are off, because they use the alarm signal, which the worker needs; the worker is killed instead.
    gold, given = (
        math_verify.parse(text, parsing_timeout=None, raise_on_error=True) for text in (_as_math(answer), completion)
    )
    if not gold:
        raise ValueError(f"math-verify finds no mathematical expression in the answer {answer!r:.80}")
    return float(math_verify.verify(gold, given, timeout_seconds=None, raise_on_error=True))


def _as_math(answer: Any) -> str:
    """An answer as text that is parsed as one formula: between dollars, unless it has marks of a formula."""
    text = str(answer)
    return text if any(mark in text for mark in ("$", "\\boxed", "\\(", "\\[")) else f"${text}$"
