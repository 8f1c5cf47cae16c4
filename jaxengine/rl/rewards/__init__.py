"""Rewards: functions (prompt, completion, answer) -> float of generated outputs, none of which can end the run.

A function that also has a parameter finish_reason, token_ids or num_tokens gets those of the sample.

`exact_match` is a plain function. `regular_expression` and `math_equivalence` run in worker processes, because
matching or simplifying what a model wrote can take for ever. `python_program` runs what the model wrote in a process
with limits. Several rewards add up with weights, and each is reported by its name (`weighted`).
"""

from jaxengine.rl.rewards.bounded import Reward
from jaxengine.rl.rewards.isolation import Isolated
from jaxengine.rl.rewards.judging import (
    Rewards,
    compute_rewards,
    exact_match,
    math_equivalence,
    overlong_penalty,
    python_program,
    regular_expression,
)
from jaxengine.rl.rewards.program_check import ProgramLimits
from jaxengine.rl.rewards.weighted import Rewarding

__all__ = [
    "Isolated",
    "ProgramLimits",
    "Reward",
    "Rewarding",
    "Rewards",
    "compute_rewards",
    "exact_match",
    "math_equivalence",
    "overlong_penalty",
    "python_program",
    "regular_expression",
]
