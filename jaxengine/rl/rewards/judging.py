"""`compute_rewards`, and the rewards that come with it."""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxengine.outputs import UNDRAWN, CompletionOutput, RequestOutput
from jaxengine.rl.rewards.bounded import DEFAULT_TIMEOUT, Reward
from jaxengine.rl.rewards.isolation import Isolated
from jaxengine.rl.rewards.program_check import ProgramCheck, ProgramLimits
from jaxengine.rl.rewards.reward_functions import matches
from jaxengine.rl.rewards.reward_worker import describe
from jaxengine.rl.rewards.weighted import Rewarding, WeightedReward, weighted


@dataclasses.dataclass(frozen=True, eq=False)
class Rewards:
    """The rewards of B samples, in the order of `Rollout.from_outputs`, and the samples whose reward failed."""

    values: Float[np.ndarray, " B"]  # float32; of several rewards their weighted sum
    failures: dict[int, str]  # row -> reason
    parts: dict[str, Float[np.ndarray, " B"]]  # name of a reward -> its values before they are weighed; NaN: it failed

    def __repr__(self) -> str:
        mean = f", mean {self.values.mean():.3f}" if len(self.values) else ""
        first = next(iter(self.failures.items()), None)
        failed = f", {len(self.failures)} failed, the first in row {first[0]}: {first[1]}" if first else ""
        return f"Rewards({len(self.values)} samples{mean}{failed})"


def compute_rewards(
    outputs: Sequence[RequestOutput],
    answers: Sequence[Any],
    reward: Rewarding,
    *,
    reward_weights: Sequence[float] | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    failed: float = 0.0,
    workers: int | None = None,
) -> Rewards:
    """`reward(prompt, completion, answer)` of every sample, `workers` at a time (None: one for each core).

    `answers` has one for each prompt. `prompt` is the prompt's text, None where it was given as token ids. A reward
    with parameters finish_reason, token_ids or num_tokens gets those of the sample too (bounded.FACTS). Several
    rewards, a list or a mapping of names, add up, each multiplied by its one of `reward_weights` (1 without them).

    The value is `failed`, and the reason is in `failures`, where any of a sample's rewards raises, takes longer than
    `timeout` seconds, ends its process or is no finite number, and where the engine ended the sample with an error. A
    plain function runs in threads; one that may keep the interpreter busy belongs into `Isolated`. Raises ValueError
    where answers are not one for each prompt, `timeout` is not positive, or names or weights are wrong (`weighted`).
    """
    if len(answers) != len(outputs):
        raise ValueError(f"{len(answers)} answers for {len(outputs)} prompts: give one each")
    if timeout <= 0:
        raise ValueError(f"timeout must be more than 0 seconds, got {timeout}")
    rewards = weighted(reward, reward_weights)
    samples = [
        (output.prompt, sample, answer)
        for output, answer in zip(outputs, answers, strict=True)
        for sample in output.outputs
    ]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        futures = [[pool.submit(_judge, each, timeout, *sample) for sample in samples] for each in rewards]
        verdicts = [[future.result() for future in column] for column in futures]
    failures, parts, total = {}, {}, np.zeros(len(samples))
    for each, column in zip(rewards, verdicts, strict=True):  # in their order, so that a sum has its bits
        values = np.array([verdict.value for verdict in column], np.float64)
        parts[each.name] = values.astype(np.float32)
        total += each.weight * values
        failures = {row: verdict.failure for row, verdict in enumerate(column) if verdict.failure} | failures
    total[list(failures)] = failed
    return Rewards(total.astype(np.float32), dict(sorted(failures.items())), parts)


class Verdict(NamedTuple):
    """A reward of a sample, or why there is none."""

    value: float = math.nan
    failure: str = ""


def _judge(reward: WeightedReward, timeout: float, prompt: Any, sample: CompletionOutput, answer: Any) -> Verdict:
    if sample.finish_reason == "error":
        return Verdict(failure=f"the engine ended the sample with an error: {sample.stop_reason}")
    try:
        facts = {name: _fact(sample, name) for name in reward.function.asks_for}
        return Verdict(reward.function.within(timeout, prompt, sample.text, answer, **facts))
    except BaseException as error:  # whatever a reward raises, the other samples still get theirs
        return Verdict(failure=f"{reward.name}: {describe(error)}")


def _fact(sample: CompletionOutput, name: str) -> Any:
    """One of bounded.FACTS."""
    if name != "num_tokens":
        return getattr(sample, name)
    return len(sample.token_ids) - sum(
        span.stop - span.start for span in sample.weight_versions if span.version == UNDRAWN
    )


def exact_match(prompt: Any, completion: str, answer: Any) -> float:
    """1.0 where the completion is the answer, without the white space around both; else 0.0."""
    return float(completion.strip() == str(answer).strip())


def regular_expression(pattern: str) -> Isolated:
    """1.0 where the completion has a match of `pattern` and, if the pattern has a group, the first group of the last
    match is the answer.

    Raises ValueError where `pattern` is no regular expression.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r:.80} is no regular expression: {error}") from error
    return Isolated(matches, pattern=pattern)


def math_equivalence() -> Isolated:
    """1.0 where the completion's last mathematical expression equals the answer, as the library math-verify sees it.

    Raises ImportError where the library is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("math_equivalence needs the library math-verify: pip install 'jaxengine[rl]'")
    from jaxengine.rl.rewards.math_reward import math_equivalent  # here, because it imports the library

    return Isolated(math_equivalent)


def overlong_penalty(*, max_tokens: int, cache: int) -> Reward:
    """0 for a completion of at most max_tokens - cache tokens, from there falling evenly to -1 at max_tokens.

    DAPO's soft overlong punishment, Yu et al. 2025, arXiv:2503.14476, eq. 13, with L_max = max_tokens, that of the
    sampling parameters, and L_cache = cache. It is named "overlong". Raises ValueError where cache is not within
    1 … max_tokens.
    """
    if not 1 <= cache <= max_tokens:
        raise ValueError(f"cache must be within 1 … max_tokens={max_tokens} tokens, got {cache}")

    def overlong(prompt: Any, completion: str, answer: Any, *, num_tokens: int) -> float:
        return max(min(max_tokens - cache - num_tokens, 0) / cache, -1.0)

    return overlong


def python_program(limits: ProgramLimits | None = None) -> ProgramCheck:
    """1.0 where the Python program in the completion passes the answer's tests: see ProgramCheck."""
    return ProgramCheck(limits or ProgramLimits())
