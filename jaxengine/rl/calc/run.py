"""A run that teaches calc: its settings, and the problems that follow from them."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any

from jaxengine.rl.calc import arithmetic
from jaxengine.rl.calc.arithmetic import Problem
from jaxengine.rl.train_state import check_parts


def _setting(default: Any, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": meaning})


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything but the machine that a run's bits depend on."""

    algorithm: str = _setting("grpo", "whose objective it is; jaxengine/rl/README.md says what each name means")
    iterations: int = _setting(200, "of generating, judging and learning")
    prompts: int = _setting(64, "problems of an iteration")
    samples: int = _setting(8, "completions of a problem, which are compared with each other")
    epochs: int = _setting(1, "passes over an iteration's samples")
    mini_batches: int = _setting(1, "updates of an epoch")
    micro_batches: int = _setting(1, "parts of an update: more take less memory")
    rate: float = _setting(5e-5, "the learning rate after the warm-up; it falls to 0 at the last iteration")
    warm_up: int = _setting(5, "iterations in which the rate rises, at most a quarter of all")
    kl: float = _setting(0.0, "coefficient of the penalty that holds the policy near the initial weights")
    refill: int = _setting(0, "rounds of further problems in the place of those whose completions are all judged alike")
    mask_truncated: bool = _setting(False, "completions that are cut off have no loss")
    kinds: str = _setting(" ".join(arithmetic.KINDS), "kinds of problems, with spaces between them")
    digits: int = _setting(3, "of the longest number in a problem")
    seed: int = _setting(0, "of problems, completions and the order of mini-batches")


COUNTED = "iterations", "prompts", "samples", "epochs", "mini_batches", "micro_batches"
LEAST = dict.fromkeys(COUNTED, 1) | dict(warm_up=0, refill=0, kl=0.0, rate=0.0)
ADDED = dict(refill=0, mask_truncated=False)  # what runs did whose folder is older than these settings


def check(run: Run) -> None:
    """Raises ValueError for numbers that make no run, for unknown kinds of problems, and where none is held out."""
    for name, lowest in LEAST.items():
        if not getattr(run, name) >= lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {getattr(run, name)}")
    made_of = f"prompts · samples = {run.prompts} · {run.samples} = "
    check_parts(run.prompts * run.samples, run.mini_batches, run.micro_batches, made_of)
    kinds = run.kinds.split()
    if not kinds or not set(kinds) <= set(arithmetic.KINDS):
        raise ValueError(
            f"kinds must be some of {', '.join(arithmetic.KINDS)}, with spaces between them, got {run.kinds!r}"
        )
    if run.digits < 2 and "mixed" not in run.kinds:
        raise ValueError(
            "of numbers with one digit only mixed problems are held out: give digits ≥ 2, or mixed among "
            f"kinds={run.kinds!r}"
        )


def problems(run: Run, iteration: int, number: int = 0) -> list[tuple[str, Problem]]:
    """(prompt, problem) pairs of an iteration, or of its round `number` of further problems: other ones in each.

    None of them is held out.
    """
    seed = (number * 1_000_003 + run.seed) * 1_000_003 + iteration
    drawn = itertools.islice(_chosen(run, arithmetic.stream(seed)), run.prompts)
    return [(problem.prompt, problem) for problem in drawn]


def held_out_problems(run: Run, count: int) -> list[Problem]:
    """`count` problems that no run is trained on."""
    return list(itertools.islice(_chosen(run, arithmetic.stream(run.seed, "held-out")), count))


def _chosen(run: Run, stream: Iterable[Problem]) -> Iterator[Problem]:
    """The problems of a stream that have the run's kinds and digits."""
    kinds = run.kinds.split()
    for problem in stream:
        digits = max(map(len, re.findall(r"\d+", problem.prompt)))
        if problem.kind in kinds and digits <= run.digits:
            yield problem
