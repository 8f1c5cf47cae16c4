"""A run that teaches calc: its settings, and the problems that follow from them."""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator

from jaxengine.rl.calc import arithmetic
from jaxengine.rl.calc.arithmetic import Problem
from jaxengine.rl.train_state import check_parts


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything but the machine that a run's bits depend on.

    The learning rate rises to `rate` in `warm_up` iterations, or a quarter of all where those are fewer, and falls to 0
    at the last. Problems are of the `kinds` named, with numbers of at most `digits` digits. `kl` is the coefficient of
    the penalty to the initial weights.
    """

    algorithm: str = "grpo"
    iterations: int = 200
    prompts: int = 64
    samples: int = 8
    epochs: int = 1
    mini_batches: int = 1
    micro_batches: int = 1
    rate: float = 3e-4
    warm_up: int = 5
    kl: float = 0.0
    kinds: str = " ".join(arithmetic.KINDS)
    digits: int = 3
    seed: int = 0


LEAST = dict(iterations=1, prompts=1, samples=1, epochs=1, mini_batches=1, micro_batches=1, warm_up=0, kl=0.0, rate=0.0)


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


def problems(run: Run, iteration: int) -> list[tuple[str, Problem]]:
    """(prompt, problem) pairs of an iteration: other ones in each, none of them held out."""
    drawn = itertools.islice(_chosen(run, arithmetic.stream(run.seed * 1_000_003 + iteration)), run.prompts)
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
