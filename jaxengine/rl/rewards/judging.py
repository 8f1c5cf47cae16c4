"""Rewards: functions (prompt, completion, answer) -> float over generated outputs, none of which can end the run.

`exact_match` is a plain function. `regular_expression` and `math_equivalence` run in worker processes, since patterns and formulas that a
model writes can explode; `python_program` runs what the model wrote in a process with limits.
"""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxengine.outputs import CompletionOutput, RequestOutput
from jaxengine.rl.rewards import reward_functions
from jaxengine.rl.rewards.bounded import DEFAULT_TIMEOUT, Bounded, InThread, Reward
from jaxengine.rl.rewards.isolation import Isolated
from jaxengine.rl.rewards.program_check import ProgramCheck, ProgramLimits
from jaxengine.rl.rewards.reward_worker import describe

__all__ = [
    "Isolated",
    "ProgramLimits",
    "Reward",
    "Rewards",
    "compute_rewards",
    "exact_match",
    "math_equivalence",
    "python_program",
    "regular_expression",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Rewards:
    """The rewards of B samples, in the rows of `Rollout.from_outputs`, and what went wrong with which of them."""

    values: Float[np.ndarray, " B"]  # float32
    failures: dict[int, str]  # row -> reason

    def __repr__(self) -> str:
        mean = f", mean {self.values.mean():.3f}" if len(self.values) else ""
        first = next(iter(self.failures.items()), None)
        failed = f", {len(self.failures)} failed, the first in row {first[0]}: {first[1]}" if first else ""
        return f"Rewards({len(self.values)} samples{mean}{failed})"


def compute_rewards(
    outputs: Sequence[RequestOutput],
    answers: Sequence[Any],
    reward: Reward,
    *,
    timeout: float = DEFAULT_TIMEOUT,
    failed: float = 0.0,
    workers: int | None = None,
) -> Rewards:
    """`reward(prompt, completion, answer)` of every sample, `workers` of them at a time (None: as many as there are cores).

    `answers` has one for each prompt. `prompt` is the prompt's text, None where it was given as token ids. A reward that raises,
    takes longer than `timeout` seconds, dies, or is no finite number has the value `failed` and its reason in `failures`; so has a
    sample that the engine ended with an error. A plain function runs in threads: see `Isolated` for one that may keep the interpreter busy.
    """
    if len(answers) != len(outputs):
        raise ValueError(f"{len(answers)} answers for {len(outputs)} prompts: give one each")
    if timeout <= 0:
        raise ValueError(f"timeout must be more than 0 seconds, got {timeout}")
    bounded = reward if isinstance(reward, Bounded) else InThread(reward)
    asked = [
        (output.prompt, sample, answer)
        for output, answer in zip(outputs, answers, strict=True)
        for sample in output.outputs
    ]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        found = list(pool.map(lambda one: _judged(bounded, timeout, *one), asked))
    values = np.array([failed if reason is not None else value for value, reason in found], np.float32)
    return Rewards(values, {row: reason for row, (_, reason) in enumerate(found) if reason is not None})


def _judged(
    reward: Bounded, timeout: float, prompt: Any, sample: CompletionOutput, answer: Any
) -> tuple[float, str | None]:
    """(reward, None), or (0.0, why there is none)."""
    if sample.finish_reason == "error":
        return 0.0, f"the engine ended the sample with an error: {sample.stop_reason}"
    try:
        return reward.within(timeout, prompt, sample.text, answer), None
    except BaseException as error:  # whatever a reward raises is this sample's alone
        return 0.0, describe(error)


def exact_match(prompt: Any, completion: str, answer: Any) -> float:
    """1.0 where the completion is the answer, white space around both aside."""
    return float(completion.strip() == str(answer).strip())


def regular_expression(pattern: str) -> Isolated:
    """1.0 where `pattern` is found in the completion; with a group in it, where the last match's first group is the answer as well.

    Raises ValueError where the pattern is none.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r:.80} is no regular expression: {error}") from error
    return Isolated(reward_functions.matches, pattern=pattern)


def math_equivalence() -> Isolated:
    """1.0 where the completion's last mathematical expression equals the answer, as the library math-verify sees it.

    Raises ImportError where the library is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("math_equivalence needs the library math-verify: pip install 'jaxengine[rl]'")
    from jaxengine.rl.rewards import math_reward  # here, since it imports the library

    return Isolated(math_reward.math_equivalent)


def python_program(limits: ProgramLimits | None = None) -> ProgramCheck:
    """1.0 where the Python program in the completion passes the answer's tests: see ProgramCheck."""
    return ProgramCheck(limits or ProgramLimits())
