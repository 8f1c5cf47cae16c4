"""What worker processes run for rewards.py. Nothing here imports jax: a worker starts in a moment."""

import re
from typing import Any


def matches(prompt: Any, completion: str, answer: Any, *, pattern: str) -> float:
    """1.0 where the pattern is found in the completion and, if it has a group, the last match's first group is the answer."""
    found = list(re.finditer(pattern, completion))
    if not found:
        return 0.0
    return float(found[-1].re.groups == 0 or (found[-1][1] or "").strip() == str(answer).strip())
