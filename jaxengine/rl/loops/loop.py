"""The loop: generate, judge, learn, again. An iteration is a function of the state alone, so a run that stops goes on to the same bits."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxengine.base.keys import key_of
from jaxengine.functional import generate
from jaxengine.models.params import Decoder
from jaxengine.outputs import RequestOutput
from jaxengine.rl.metrics import mean_over
from jaxengine.rl.rollout import Rollout
from jaxengine.rl.trainer import DRAWS, Trainer, TrainState
from jaxengine.text.tokenizer import Tokenizer

Judge = Callable[[Sequence[RequestOutput], Sequence[Any]], Float[np.ndarray, " B"]]


@dataclasses.dataclass(frozen=True)
class Iteration:
    """What happened in one iteration. `updates` holds the metrics of each update (Trainer.train), the first of which is on-policy."""

    version: int  # of the weights that generated
    reward: float  # mean over samples
    length: float  # mean tokens of a completion
    entropy: float | None  # mean over tokens, where the sampling parameters ask for it
    generating: float  # seconds
    learning: float
    updates: list[dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Loop:
    """One run. `problems(i)` are iteration i's (prompt, answer) pairs, always as many; `judge(outputs, answers)` gives a reward for each
    sample in the order of Rollout.from_outputs, NaN to leave one out. `length` is the width T of every rollout. `engine` are the engine's
    keywords. With a KL penalty `reference` is the policy to stay near.
    """

    trainer: Trainer
    problems: Callable[[int], Sequence[tuple[Any, Any]]]
    judge: Judge
    length: int
    tokenizer: Tokenizer | None = None
    reference: Decoder | None = None
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)

    def iterate(self, state: TrainState) -> tuple[TrainState, Iteration]:
        """The next version of the weights; `state` is donated."""
        version, start = int(state.version), time.monotonic()
        prompts, answers = zip(*self.problems(version), strict=True)
        outputs = self.generate(state, prompts)
        rewards = np.asarray(self.judge(outputs, answers), np.float32)
        rollout, generated = Rollout.from_outputs(outputs, length=self.length), time.monotonic()
        state, updates = self.trainer.train(state, rollout, rewards, reference=self.reference)
        entropy = None if rollout.entropies is None else float(mean_over(rollout.entropies, rollout.mask))
        return state, Iteration(
            version,
            float(np.nanmean(rewards)),
            float(rollout.mask.sum(-1).mean()),
            entropy,
            generated - start,
            time.monotonic() - generated,
            updates,
        )

    def generate(self, state: TrainState, prompts: Sequence[Any]) -> Sequence[RequestOutput]:
        """Completions under the state's weights, with the key of its version."""
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


def judged_by(reward: Callable[[Any, str, Any], float]) -> Judge:
    """A judge that calls `reward(prompt, completion, answer)` for each sample, and leaves out those that the engine ended with an error."""

    def judge(outputs: Sequence[RequestOutput], answers: Sequence[Any]) -> Float[np.ndarray, " B"]:
        return np.array(
            [
                np.nan if sample.finish_reason == "error" else reward(output.prompt, sample.text, answer)
                for output, answer in zip(outputs, answers, strict=True)
                for sample in output.outputs
            ],
            np.float32,
        )

    return judge
