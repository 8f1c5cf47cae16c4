"""The functions that worker processes run for rewards.py. Nothing here imports jax: a worker starts in a moment."""
import importlib
import re
from typing import Any


def matches(prompt: Any, completion: str, answer: Any, *, pattern: str) -> float:
    """1.0 where the pattern is found in the completion and, if it has a group, the last match's first group is the answer."""
    found = list(re.finditer(pattern, completion))
    if not found:
        return 0.0
    return float(found[-1].re.groups == 0 or (found[-1][1] or "").strip() == str(answer).strip())


def math_equivalent(prompt: Any, completion: str, answer: Any) -> float:
    """1.0 where math-verify finds the completion's last mathematical expression equal to the answer's."""
    math_verify = importlib.import_module("math_verify")
    # Its own time limits use the alarm signal, which is the worker's: they are off, and the worker is killed instead.
    gold, given = (math_verify.parse(text, parsing_timeout=None, raise_on_error=True) for text in (_as_math(answer), completion))
    if not gold:
        raise ValueError(f"math-verify finds no mathematical expression in the answer {answer!r:.80}")
    return float(math_verify.verify(gold, given, timeout_seconds=None, raise_on_error=True))


def _as_math(answer: Any) -> str:
    """An answer as the text that is parsed: LaTeX without its dollars is wrapped in them."""
    text = str(answer)
    return f"${text}$" if "\\" in text and "$" not in text else text
