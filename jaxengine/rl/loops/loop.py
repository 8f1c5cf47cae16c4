"""The loop: generate, judge, learn, repeat.

An iteration is a function of the state alone, so a run that stopped continues to the same bits.
"""

import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxengine.base.keys import folded, key_of
from jaxengine.functional import generate
from jaxengine.llm import LLM
from jaxengine.models.params import Decoder
from jaxengine.outputs import RequestOutput
from jaxengine.rl.given_rewards import Given, of_samples
from jaxengine.rl.loops.dynamic_sampling import Draws, check_refill, draws, filled
from jaxengine.rl.metrics import mean_over, mean_reward, of_rewards
from jaxengine.rl.rewards import Rewarding, Rewards, compute_rewards
from jaxengine.rl.rewards.bounded import DEFAULT_TIMEOUT
from jaxengine.rl.rewards.weighted import weighted
from jaxengine.rl.rollout import Rollout
from jaxengine.rl.train_state import DRAWS, REFILLS, TrainState
from jaxengine.rl.trainer import Trainer
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.tokenizer import Tokenizer

Play = Callable[[LLM, Sequence[Any], SamplingParams, Any], Sequence[RequestOutput]]
Judge = Callable[[Sequence[RequestOutput], Sequence[Any]], Rewards | Given]  # (outputs, answers) -> rewards


@dataclasses.dataclass(frozen=True)
class Iteration:
    """What happened in one iteration. `updates` are the metrics of each (Trainer.train); the first is on-policy.

    Shares are of all samples; rewards are those of samples that have one (metrics.of_rewards). All that is said of
    rewards and samples, but no_spread, is of everything that was drawn, groups that were thrown away among it.
    """

    version: int  # of the weights that generated
    reward: float  # mean over samples
    rewards: dict[str, float]  # of each reward that the judge names, the mean over the samples that have one
    deviation: float  # of the rewards
    no_spread: float  # share of the batch's groups whose rewards are all equal: they teach nothing without a critic
    rounds: int  # of further problems that were drawn for the batch (Loop.refill)
    thrown_away: int  # groups that were drawn, and are not in the batch
    left_out: float  # share without a reward, or with one that is not finite
    truncated: float  # share that max_tokens or the context cut off
    tokens: int  # generated
    batch_tokens: int  # those of them that are in the batch
    length: float  # mean tokens of a completion
    entropy: float | None  # nats, mean over tokens; None where the sampling parameters do not ask for it
    generating: float  # seconds, the judge's among them
    learning: float  # seconds
    updates: list[dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Loop:
    """One run: what an iteration generates from, is judged by and learns with.

    `problems(i)` are the (prompt, answer) pairs of iteration i, the same number in each. `judge(outputs, answers)`
    gives a reward for each sample in the order of Rollout.from_outputs; NaN leaves the sample out. Rewards may be one a
    token, `[B, T]`, laid out as in Rollout.from_outputs(outputs, length=length). `length` is the width T of every
    rollout, `engine` the engine's keywords. `reference` are the weights that a KL penalty stays near; without a penalty
    only the distance to them is measured, which costs a pass of scoring. `play(llm, prompts, sampling_params, key)`
    takes the place of `llm.generate`: conversations with tools or an environment (loops/tools.py), whose replies carry
    no loss.

    Groups whose rewards are all equal are replaced by groups of further problems, in at most `refill` rounds: DAPO's
    dynamic sampling. `further(i, r)` are the problems of round r = 1, 2, … of iteration i, of which the first are
    taken, one for each group that is replaced. Groups that are still missing after the last round stay as they were, so
    that a batch has one shape (Iteration.no_spread is their share). Raises ValueError where `refill` is given without
    `further`, with a critic, or with one sample a prompt.
    """

    trainer: Trainer
    problems: Callable[[int], Sequence[tuple[Any, Any]]]
    judge: Judge
    length: int
    tokenizer: Tokenizer | None = None
    reference: Decoder | None = None
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)
    play: Play | None = None
    refill: int = 0
    further: Callable[[int, int], Sequence[tuple[Any, Any]]] | None = None

    def __post_init__(self) -> None:
        if self.refill:
            check_refill(self.refill, self.further is not None, self.trainer.config)

    def iterate(self, state: TrainState) -> tuple[TrainState, Iteration]:
        """The state with the next version of the weights; `state` is donated."""
        version, start = int(state.version), time.monotonic()
        first = self._draw(state, self.problems(version))
        drawn, groups, rounds = filled(first, functools.partial(self._further, state), self.refill)
        everything = Rollout.from_outputs(drawn.outputs, length=self.length)
        batch = drawn.of_groups(groups) if rounds else drawn
        rollout = Rollout.from_outputs(batch.outputs, length=self.length) if rounds else everything
        drew = np.where(rollout.mask, version + rollout.weight_versions, rollout.weight_versions)
        rollout = dataclasses.replace(rollout, weight_versions=drew)  # the engine counts from the state's weights on
        judged, generated = of_rewards(of_samples(drawn.rewards), everything.group), time.monotonic()
        no_spread = of_rewards(of_samples(batch.rewards), rollout.group).no_spread
        if self.tokenizer is not None and self.trainer.config.sampling.structure is not None:
            rollout = rollout.with_grammar_mask(self.trainer.model_config, self.tokenizer)
        state, updates = self.trainer.train(state, rollout, batch.rewards, reference=self.reference)
        return state, Iteration(
            version=version,
            reward=judged.mean,
            rewards={name: mean_reward(values) for name, values in drawn.parts.items()},
            deviation=judged.deviation,
            no_spread=no_spread,
            rounds=rounds,
            thrown_away=len(drawn.outputs) - len(groups),
            left_out=judged.left_out,
            truncated=float(everything.ended_by("length").mean()),
            tokens=int(everything.mask.sum()),
            batch_tokens=int(rollout.mask.sum()),
            length=float(everything.mask.sum(-1).mean()),
            entropy=None if everything.entropies is None else float(mean_over(everything.entropies, everything.mask)),
            generating=generated - start,
            learning=time.monotonic() - generated,
            updates=updates,
        )

    def _draw(self, state: TrainState, pairs: Sequence[tuple[Any, Any]], number: int = 0) -> Draws:
        prompts, answers = zip(*pairs, strict=True)
        outputs = self.generate(state, prompts, number)
        return draws(outputs, self.judge(outputs, answers))

    def _further(self, state: TrainState, number: int, count: int) -> Draws:
        """Of a round of further problems, at most `count` groups."""
        assert self.further is not None
        version = int(state.version)
        pairs = self.further(version, number)[:count]
        if not pairs:
            raise ValueError(
                f"further({version}, {number}) gives no problems: refill={self.refill} rounds need some each"
            )
        return self._draw(state, pairs, number)

    def generate(self, state: TrainState, prompts: Sequence[Any], number: int = 0) -> Sequence[RequestOutput]:
        """Completions under the state's weights, drawn with a key of their version; of further problems, with a key of
        their version and the round's `number`.
        """
        folds = (REFILLS, int(state.version), number) if number else (DRAWS, int(state.version))
        key, policy = folded(key_of(state.key), *folds), self.policy(state)
        config, sampling = self.trainer.model_config, self.trainer.config.sampling
        engine = {"tokenizer": self.tokenizer, "kernels": self.trainer.kernels.name} | self.engine
        if self.play is None:
            return generate(policy, prompts, sampling, key=key, config=config, **engine)
        with LLM.from_params(config, policy, **engine) as llm:
            return self.play(llm, prompts, sampling, key)

    def policy(self, state: TrainState) -> Decoder:
        """The weights that draw; a loop whose sampler lags behind gives others."""
        return self.trainer.policy(state)


def judged_by(
    reward: Rewarding,
    *,
    reward_weights: Sequence[float] | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    failed: float = math.nan,
    workers: int | None = None,
) -> Callable[[Sequence[RequestOutput], Sequence[Any]], Rewards]:
    """A judge that calls `reward(prompt, completion, answer)` for each sample, as compute_rewards does.

    Several rewards, a list or a mapping of names, add up with their `reward_weights`, as in TRL; Iteration.rewards has
    the mean of each. A sample of which a reward fails, or that the engine ended with an error, has the reward `failed`,
    with a warning; NaN leaves it out. Raises ValueError as compute_rewards does, for names and weights at once.
    """
    weighted(reward, reward_weights)

    def judge(outputs: Sequence[RequestOutput], answers: Sequence[Any]) -> Rewards:
        found = compute_rewards(
            outputs, answers, reward, reward_weights=reward_weights, timeout=timeout, failed=failed, workers=workers
        )
        if found.failures:
            row, reason = next(iter(found.failures.items()))
            warnings.warn(
                f"{len(found.failures)} of {len(found.values)} samples have no reward; the first, row {row}: {reason}",
                stacklevel=2,
            )
        return found

    return judge
