"""An iteration's numbers as metrics: one flat dictionary, under names that stay. rl/README.md has them in a table."""

from collections.abc import Mapping
from typing import Any

RENAMED = {"deviation": "reward_deviation"}  # a dashboard shows a name alone
OF_AN_UPDATE = {"entropy": "loss_entropy"}  # `entropy` is that of the draws
FOLDED = ("version", "generating", "learning", "updates")  # a step, and what other metrics are made of


def step_metrics(iteration: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of an Iteration, given as a dictionary of its fields.

    Its numbers have their own names, and those of a field that is a dictionary are "field/name". Metrics of an update
    are those of the last one, in which the policy is furthest from the one that sampled; `kl_first` is the first's. A
    number that is None is left out.
    """
    last: dict[str, float] = iteration["updates"][-1]
    metrics = {OF_AN_UPDATE.get(name, name): x for name, x in last.items()}
    for name, value in iteration.items():
        if isinstance(value, Mapping):
            metrics |= {f"{name}/{part}": float(number) for part, number in value.items()}
        elif name not in FOLDED and value is not None:
            metrics[RENAMED.get(name, name)] = float(value)
    return metrics | {
        "kl_first": float(iteration["updates"][0]["kl"]),
        "generated_tokens_per_second": iteration["tokens"] / iteration["generating"],
        "learned_tokens_per_second": iteration["batch_tokens"] / iteration["learning"],
    }
