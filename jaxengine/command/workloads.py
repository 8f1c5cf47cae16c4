"""What is measured: the decode and group workloads, the same for every system (benchmarks/README.md)."""

import dataclasses
import math
import random
from typing import Protocol

PEERS = {"transformers": "peer_transformers.py", "vllm": "peer_vllm.py"}  # other systems: scripts in benchmarks/peers/
Prompts = list[list[int]]
RATE = "tok/s"  # the figure of which more is better; all others are seconds


class System(Protocol):
    """What can be measured: `seconds` completes prompts with exactly so many tokens each, at temperature 1, and tells
    the wall time.

    `workloads` are the kinds that it is able to do, `peak_memory` is in bytes of its process.
    """

    name: str
    vocab_size: int
    workloads: tuple[str, ...]

    def warm_up(self) -> None: ...
    def seconds(self, prompts: Prompts, lengths: list[int], logprobs: bool) -> float: ...
    def peak_memory(self) -> int | None: ...


@dataclasses.dataclass(frozen=True)
class Decode:
    """`batch` prompts of random tokens, exactly `new_tokens` each (by default 32, and 16 from a batch of 64).

    Tokens per second are batch × (new_tokens − 1) over the time beyond that of a call with one new token.
    """

    batch: int
    prompt_tokens: int = 128
    new_tokens: int = 0
    kind = "decode"

    def __post_init__(self) -> None:
        object.__setattr__(self, "new_tokens", self.new_tokens or (16 if self.batch >= 64 else 32))
        if self.batch < 1 or self.new_tokens < 2:
            raise ValueError(
                f"batch must be at least 1 and new_tokens at least 2, got {self.batch} and {self.new_tokens}"
            )

    def __str__(self) -> str:
        return f"decode B={self.batch}"

    def warm_up(self, system: System) -> None:
        """The same shapes, without counting: prompts of this size, and the first decode steps after them."""
        drawn = random_prompts(random.Random(f"{self} warm-up"), self.batch, self.prompt_tokens, system.vocab_size)
        system.seconds(drawn, [2] * self.batch, logprobs=False)

    def requests(self, repeat: int, vocab_size: int, new_tokens: int = 0) -> tuple[Prompts, list[int]]:
        """(prompts, new tokens of each) of a run."""
        count = new_tokens or self.new_tokens
        rng = random.Random(f"{self} {count} {repeat}")
        return random_prompts(rng, self.batch, self.prompt_tokens, vocab_size), [count] * self.batch

    def figures(self, system: System, repeat: int) -> dict[str, float]:
        """Tokens per second of a run whose prompts no other run has."""
        first, all_tokens = (
            system.seconds(*self.requests(repeat, system.vocab_size, count), logprobs=False)
            for count in (1, self.new_tokens)
        )
        spent = all_tokens - first
        if spent <= 0:  # the machine is too noisy for so little work
            return {RATE: math.nan}
        return {RATE: self.batch * (self.new_tokens - 1) / spent}


@dataclasses.dataclass(frozen=True)
class Group:
    """Prompts with several samples each, exactly uniform(shortest, longest) new tokens a sample, with the logprobs of
    the sampled tokens.

    Tokens per second are all generated tokens over the whole time.
    """

    prompts: int = 8
    samples: int = 8
    prompt_tokens: int = 256
    shortest: int = 16
    longest: int = 96
    kind = "group"

    def __str__(self) -> str:
        return f"group {self.prompts}x{self.samples}"

    def warm_up(self, system: System) -> None:
        """One run without counting."""
        self.figures(system, -1)

    def requests(self, repeat: int, vocab_size: int) -> tuple[Prompts, list[int]]:
        """(prompts, new tokens of each) of a run."""
        rng = random.Random(f"{self} {repeat}")
        drawn = random_prompts(rng, self.prompts, self.prompt_tokens, vocab_size)
        prompts = [prompt for prompt in drawn for _ in range(self.samples)]
        return prompts, [rng.randint(self.shortest, self.longest) for _ in prompts]

    def figures(self, system: System, repeat: int) -> dict[str, float]:
        """Tokens per second of a run whose prompts no other run has."""
        prompts, lengths = self.requests(repeat, system.vocab_size)
        return {RATE: sum(lengths) / system.seconds(prompts, lengths, logprobs=True)}


Workload = Decode | Group


def random_prompts(rng: random.Random, count: int, length: int, vocab_size: int) -> Prompts:
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)]
