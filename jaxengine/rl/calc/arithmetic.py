"""Arithmetic as text: problems with one right answer each, to train a small model on and to reward it by."""

import dataclasses
import hashlib
import random
import re
from collections.abc import Callable, Iterator
from typing import Literal

from jaxengine.rl.loops.calculator import calculate

Split = Literal["train", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "held-out")
HELD_OUT_PERCENT = 10
_KIND_OF_OPERATOR = {"+": "sum", "-": "difference", "*": "product"}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt that ends in "=", and the answer as text: "12+30=" and "42", "3-10=" and "-7"."""

    prompt: str
    answer: str

    @property
    def kind(self) -> str:
        """One of KINDS, by the operators in the prompt."""
        operators = re.findall(r"[-+*]", self.prompt)
        return _KIND_OF_OPERATOR[operators[0]] if len(operators) == 1 else "mixed"


def problems(seed: int, count: int, split: Split = "train") -> list[Problem]:
    """`count` problems drawn from a split, with repetition. The splits are disjoint, whatever the seeds.

    Raises ValueError where `split` is not one of SPLITS.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    drawn = stream(seed, split)
    return [next(drawn) for _ in range(count)]


def stream(seed: int, split: Split = "train") -> Iterator[Problem]:
    """The problems that `problems` draws, without end."""
    rng = random.Random(f"{seed} {split}")  # a text seed is hashed with SHA-512, so every process draws the same
    while True:
        problem = KINDS[rng.choice(_SHARES)](rng)
        if is_held_out(problem.prompt) == (split == "held-out"):
            yield problem


def is_held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the split "held-out": HELD_OUT_PERCENT of prompts do, by their SHA-256.

    Prompts with two numbers of one digit ("7*8=") never do, because they are what has to be learned by heart.
    """
    digest = hashlib.sha256(prompt.encode()).digest()
    return len(prompt) > len("7*8=") and int.from_bytes(digest[:4]) % 100 < HELD_OUT_PERCENT


def is_right(problem: Problem, completion_text: str) -> bool:
    """Whether the completion's first line, without the spaces around it, is the answer."""
    return completion_text.partition("\n")[0].strip() == problem.answer


def _number(rng: random.Random, digits: list[int]) -> int:
    """A number whose count of digits is drawn from `digits`; 0 has one digit."""
    size = rng.choice(digits)
    return rng.randrange(10 ** (size - 1) if size > 1 else 0, 10**size)


def _sum(rng: random.Random) -> Problem:
    a, b = _number(rng, [1, 1, 2, 2, 2, 3]), _number(rng, [1, 1, 2, 2, 2, 3])
    return Problem(f"{a}+{b}=", str(a + b))


def _difference(rng: random.Random) -> Problem:
    a, b = _number(rng, [1, 1, 2, 2, 2, 3]), _number(rng, [1, 1, 2, 2, 2, 3])
    return Problem(f"{a}-{b}=", str(a - b))


def _product(rng: random.Random) -> Problem:
    a, b = _number(rng, [1, 2]), _number(rng, [1, 1, 1, 2])
    return Problem(f"{a}*{b}=", str(a * b))


_MIXED = ["{}+{}*{}", "{}-{}*{}", "({}+{})*{}", "({}-{})*{}", "{}*({}+{})", "{}+{}-{}", "{}-{}+{}", "{}-({}+{})"]


def _mixed(rng: random.Random) -> Problem:
    expression = rng.choice(_MIXED).format(*(rng.randrange(10) for _ in range(3)))
    return Problem(f"{expression}=", calculate(expression))


KINDS: dict[str, Callable[[random.Random], Problem]] = {
    "sum": _sum,
    "difference": _difference,
    "product": _product,
    "mixed": _mixed,
}
_SHARES = ["sum", "sum", "sum", "difference", "difference", "difference", "product", "product", "mixed", "mixed"]
