"""Rewards that run in worker processes for judging.py. Nothing here imports jax, so that a worker starts quickly."""

import re
from typing import Any


def matches(prompt: Any, completion: str, answer: Any, *, pattern: str) -> float:
    """See judging.regular_expression."""
    matched = list(re.finditer(pattern, completion))
    if not matched:
        return 0.0
    last = matched[-1]
    return float(last.re.groups == 0 or (last[1] or "").strip() == str(answer).strip())
