"""Mathematical equivalence by the library math-verify: what worker processes run for rewards.py, which says how to install it."""

import importlib
import logging
from typing import Any

# With this module and not at first use: a worker's start has time for it, and the first sample has not.
math_verify: Any = importlib.import_module("math_verify")


def math_equivalent(prompt: Any, completion: str, answer: Any) -> float:
    """1.0 where math-verify finds the completion's last mathematical expression equal to the answer's."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of each call that has no time limit of its own
    # Its own time limits use the alarm signal, which is the worker's: they are off, and the worker is killed instead.
    gold, given = (
        math_verify.parse(text, parsing_timeout=None, raise_on_error=True) for text in (_as_math(answer), completion)
    )
    if not gold:
        raise ValueError(f"math-verify finds no mathematical expression in the answer {answer!r:.80}")
    return float(math_verify.verify(gold, given, timeout_seconds=None, raise_on_error=True))


def _as_math(answer: Any) -> str:
    """An answer as text that is parsed whole: a formula that is not marked as one is put between dollars."""
    text = str(answer)
    return text if any(mark in text for mark in ("$", "\\boxed", "\\(", "\\[")) else f"${text}$"
