"""The loop: generate, judge, learn, repeat.

An iteration is a function of the state alone, so a run that stopped continues to the same bits.
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxengine.base.keys import key_of
from jaxengine.functional import generate
from jaxengine.models.params import Decoder
from jaxengine.outputs import RequestOutput
from jaxengine.rl.metrics import mean_over, of_rewards
from jaxengine.rl.rewards import Reward, compute_rewards
from jaxengine.rl.rewards.bounded import DEFAULT_TIMEOUT
from jaxengine.rl.rollout import Rollout
from jaxengine.rl.train_state import DRAWS, TrainState
from jaxengine.rl.trainer import Trainer
from jaxengine.text.tokenizer import Tokenizer

Judge = Callable[[Sequence[RequestOutput], Sequence[Any]], Float[np.ndarray, " B"]]  # (outputs, answers) -> rewards


@dataclasses.dataclass(frozen=True)
class Iteration:
    """What happened in one iteration. `updates` are the metrics of each (Trainer.train); the first is on-policy.

    Shares are of all samples; rewards are those of samples that have one (metrics.of_rewards).
    """

    version: int  # of the weights that generated
    reward: float  # mean over samples
    deviation: float  # of the rewards
    no_spread: float  # share of groups whose rewards are all equal: they teach nothing without a critic
    left_out: float  # share without a reward, or with one that is not finite
    truncated: float  # share that max_tokens or the context cut off
    tokens: int  # generated
    length: float  # mean tokens of a completion
    entropy: float | None  # nats, mean over tokens; None where the sampling parameters do not ask for it
    generating: float  # seconds, the judge's among them
    learning: float  # seconds
    updates: list[dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Loop:
    """One run: what an iteration generates from, is judged by and learns with.

    `problems(i)` are the (prompt, answer) pairs of iteration i, the same number in each. `judge(outputs, answers)`
    gives a reward for each sample in the order of Rollout.from_outputs; NaN leaves the sample out. `length` is the
    width T of every rollout, `engine` the engine's keywords. `reference` are the weights that a KL penalty stays near.
    """

    trainer: Trainer
    problems: Callable[[int], Sequence[tuple[Any, Any]]]
    judge: Judge
    length: int
    tokenizer: Tokenizer | None = None
    reference: Decoder | None = None
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)

    def iterate(self, state: TrainState) -> tuple[TrainState, Iteration]:
        """The state with the next version of the weights; `state` is donated."""
        version, start = int(state.version), time.monotonic()
        prompts, answers = zip(*self.problems(version), strict=True)
        outputs = self.generate(state, prompts)
        rewards = np.asarray(self.judge(outputs, answers), np.float32)
        rollout = Rollout.from_outputs(outputs, length=self.length)
        if self.tokenizer is not None and self.trainer.config.sampling.structure is not None:
            rollout = rollout.with_grammar_mask(self.trainer.model_config, self.tokenizer)
        judged, generated = of_rewards(rewards, rollout.group), time.monotonic()
        state, updates = self.trainer.train(state, rollout, rewards, reference=self.reference)
        return state, Iteration(
            version=version,
            reward=judged.mean,
            deviation=judged.deviation,
            no_spread=judged.no_spread,
            left_out=judged.left_out,
            truncated=float(rollout.ended_by("length").mean()),
            tokens=int(rollout.mask.sum()),
            length=float(rollout.mask.sum(-1).mean()),
            entropy=None if rollout.entropies is None else float(mean_over(rollout.entropies, rollout.mask)),
            generating=generated - start,
            learning=time.monotonic() - generated,
            updates=updates,
        )

    def generate(self, state: TrainState, prompts: Sequence[Any]) -> Sequence[RequestOutput]:
        """Completions under the state's weights, drawn with a key of their version."""
        key = jax.random.fold_in(jax.random.fold_in(key_of(state.key), DRAWS), state.version)
        return generate(
            self.trainer.policy(state),
            prompts,
            self.trainer.config.sampling,
            key=key,
            config=self.trainer.model_config,
            tokenizer=self.tokenizer,
            **{"kernels": self.trainer.kernels.name} | self.engine,
        )


def judged_by(
    reward: Reward, *, timeout: float = DEFAULT_TIMEOUT, failed: float = math.nan, workers: int | None = None
) -> Judge:
    """A judge that calls `reward(prompt, completion, answer)` for each sample, as compute_rewards does.

    A sample whose reward fails, or that the engine ended with an error, has the reward `failed`, with a warning; NaN
    leaves it out.
    """

    def judge(outputs: Sequence[RequestOutput], answers: Sequence[Any]) -> Float[np.ndarray, " B"]:
        found = compute_rewards(outputs, answers, reward, timeout=timeout, failed=failed, workers=workers)
        if found.failures:
            row, reason = next(iter(found.failures.items()))
            warnings.warn(
                f"{len(found.failures)} of {len(found.values)} samples have no reward; the first, row {row}: {reason}",
                stacklevel=2,
            )
        return found.values

    return judge
