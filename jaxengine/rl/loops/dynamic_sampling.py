"""Dynamic sampling: groups whose rewards are all equal teach nothing, and are replaced by groups of further problems.

DAPO, Yu et al. 2025, arXiv:2503.14476, section 3.2.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxengine.outputs import RequestOutput
from jaxengine.rl.given_rewards import Given, of_samples
from jaxengine.rl.metrics import has_spread
from jaxengine.rl.rewards import Rewards
from jaxengine.rl.train_state import TrainerConfig


class Draws(NamedTuple):
    """Groups, an output each, and what the judge says of their samples."""

    outputs: list[RequestOutput]
    rewards: Given
    parts: dict[str, Float[np.ndarray, " B"]]  # of each reward that the judge names

    @property
    def rows(self) -> list[np.ndarray]:
        """The numbers of each group's samples."""
        sizes = [len(output.outputs) for output in self.outputs]
        return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])

    @property
    def have_spread(self) -> list[bool]:
        """Whether the rewards of each group differ."""
        rewards = of_samples(self.rewards)
        return [has_spread(rewards[rows]) for rows in self.rows]

    def of_groups(self, groups: Iterable[int]) -> "Draws":
        groups, rows = list(groups), self.rows
        taken = np.concatenate([rows[group] for group in groups])
        parts = {name: values[taken] for name, values in self.parts.items()}
        return Draws([self.outputs[group] for group in groups], self.rewards[taken], parts)

    def and_then(self, later: "Draws") -> "Draws":
        parts = {name: np.concatenate([values, later.parts[name]]) for name, values in self.parts.items()}
        return Draws(self.outputs + later.outputs, np.concatenate([self.rewards, later.rewards]), parts)


def draws(outputs: Sequence[RequestOutput], found: Rewards | Given) -> Draws:
    """Outputs with what a judge found. Raises ValueError where that is not one reward for each sample."""
    rewards = np.asarray(found.values if isinstance(found, Rewards) else found, np.float32)
    samples = sum(len(output.outputs) for output in outputs)
    if rewards.shape[:1] != (samples,):
        raise ValueError(
            f"the judge gave rewards of the shape {list(rewards.shape)} for {samples} samples: one for each"
        )
    return Draws(list(outputs), rewards, dict(found.parts) if isinstance(found, Rewards) else {})


def check_refill(refill: int, has_further: bool, config: TrainerConfig) -> None:
    """Raises ValueError where a Loop's rounds of further problems cannot be."""
    if refill < 0:
        raise ValueError(f"refill must be at least 0 rounds of further problems, got {refill}")
    if not has_further:
        raise ValueError(f"refill={refill} draws further problems: give further, a function of iteration and round")
    if config.objective.advantage == "generalized":
        raise ValueError(f"refill must be 0 with a critic, to which groups of equal rewards teach too, got {refill}")
    if config.sampling.n < 2:
        raise ValueError(
            f"refill={refill} compares the samples of a prompt: SamplingParams(n=…) of 2 at least, got n=1"
        )


class Filled(NamedTuple):
    draws: Draws  # all of them
    groups: list[int]  # those of the batch, in its order
    rounds: int  # after the first


def filled(first: Draws, further: Callable[[int, int], Draws], most: int) -> Filled:
    """As many groups as `first` has. Those without spread are replaced, in their order, by those with spread of
    `further(number, count)`, which gives at most `count` groups for the rounds from 1 to `most`. Where these are too
    few, groups of `first` stay.
    """
    drawn, groups, spread = first, list(range(len(first.outputs))), first.have_spread
    for number in range(1, most + 1):
        places = [place for place, group in enumerate(groups) if not spread[group]]
        if not places:
            return Filled(drawn, groups, number - 1)
        fresh = further(number, len(places))
        useful = [len(spread) + i for i, differ in enumerate(fresh.have_spread) if differ]
        for place, group in zip(places, useful, strict=False):
            groups[place] = group
        drawn, spread = drawn.and_then(fresh), spread + fresh.have_spread
    return Filled(drawn, groups, most)
