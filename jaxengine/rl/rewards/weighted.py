"""Several rewards that count together: each with its name and its weight."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxengine.rl.rewards.bounded import Bounded, InThread, Reward

Rewarding = Reward | Sequence[Reward] | Mapping[str, Reward]  # one, several, or several by name


class WeightedReward(NamedTuple):
    """A reward, what its values are reported as, and what they are multiplied by."""

    name: str
    function: Bounded
    weight: float


def weighted(reward: Rewarding, reward_weights: Sequence[float] | None = None) -> list[WeightedReward]:
    """The rewards in their order. Without a mapping's name, a reward is called as its function is.

    Raises ValueError where there is no reward, where two have one name, and where `reward_weights` are not one
    finite number for each; without them each weighs 1.
    """
    several = isinstance(reward, (Mapping, Sequence))
    named = list(reward.items()) if isinstance(reward, Mapping) else [(name_of(x), x) for x in _each(reward)]
    names = [name for name, _ in named]
    if not names:
        raise ValueError("no rewards were given: give one function at least")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"several rewards are called {twice[0]}: name each, in a mapping {{name: reward}}")
    weights = [1.0] * len(names) if reward_weights is None else list(reward_weights)
    if len(weights) != len(names):
        of = f"{len(names)} rewards ({', '.join(names)})" if several else "one reward"
        raise ValueError(f"{len(weights)} reward_weights for {of}: give one each")
    for name, weight in zip(names, weights, strict=True):
        if not math.isfinite(weight):
            raise ValueError(f"reward_weights must be finite numbers, got {weight} for {name}")
    functions = [function if isinstance(function, Bounded) else InThread(function) for _, function in named]
    return [WeightedReward(*each) for each in zip(names, functions, weights, strict=True)]


def _each(reward: Reward | Sequence[Reward]) -> Sequence[Reward]:
    return reward if isinstance(reward, Sequence) else [reward]


def name_of(reward: Reward) -> str:
    """The name of a function, or of what the object is."""
    return getattr(reward, "__name__", type(reward).__name__)
