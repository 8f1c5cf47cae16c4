"""What is measured: the decode, group and first-token workloads, the same for every system (benchmarks/README.md)."""

import dataclasses
import itertools
import math
import random
from typing import Protocol

PEERS = {  # other systems: scripts in benchmarks/peers/
    "llama_cpp": "peer_llama_cpp.py",
    "transformers": "peer_transformers.py",
    "vllm": "peer_vllm.py",
}
Prompts = list[list[int]]
KINDS = ["decode", "group", "first-token"]
RATE = "tok/s"  # the figure of which more is better; all others are seconds


class System(Protocol):
    """What can be measured: `seconds` completes prompts with exactly so many tokens each, at temperature 1, and tells
    the wall time. `token_times` does that too, and once each prompt has `before` tokens it sends one more, `late`, for
    one token; it tells when each token came, in seconds from then on, of each prompt and last of `late`.

    `workloads` are the kinds that it is able to do, `peak_memory` is in bytes of its process.
    """

    name: str
    vocab_size: int
    workloads: tuple[str, ...]

    def warm_up(self) -> None: ...
    def seconds(self, prompts: Prompts, lengths: list[int], logprobs: bool) -> float: ...
    def token_times(self, prompts: Prompts, lengths: list[int], late: list[int], before: int) -> list[list[float]]: ...
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
        return f"decode B={self.batch}" + (f" at {self.prompt_tokens}" if self.prompt_tokens != 128 else "")

    @property
    def context(self) -> int:
        """Tokens that the longest request has in the end."""
        return self.prompt_tokens + self.new_tokens

    @property
    def tokens(self) -> int:
        """Tokens of all requests in the end."""
        return self.batch * self.context

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

    @property
    def context(self) -> int:
        return self.prompt_tokens + self.longest

    @property
    def tokens(self) -> int:
        return self.prompts * (self.prompt_tokens + self.samples * self.longest)

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


@dataclasses.dataclass(frozen=True)
class FirstToken:
    """A long prompt that arrives while others are decoded, each of which has `before` tokens by then.

    Told are the seconds to its first token, and the longest that one of the others waited for a token meanwhile.
    """

    decoding: int = 32
    prompt_tokens: int = 128
    late_tokens: int = 4096
    new_tokens: int = 64
    before: int = 8
    kind = "first-token"

    def __post_init__(self) -> None:
        if self.decoding < 1 or not 1 <= self.before < self.new_tokens:
            raise ValueError(
                f"decoding must be at least 1 and before between 1 and new_tokens - 1, got {self.decoding}, "
                f"{self.before} and {self.new_tokens}"
            )

    def __str__(self) -> str:
        return self.kind

    @property
    def context(self) -> int:
        return max(self.late_tokens + 1, self.prompt_tokens + self.new_tokens)

    @property
    def tokens(self) -> int:
        return self.late_tokens + 1 + self.decoding * (self.prompt_tokens + self.new_tokens)

    def warm_up(self, system: System) -> None:
        """One run without counting."""
        self.figures(system, -1)

    def figures(self, system: System, repeat: int) -> dict[str, float]:
        """Seconds of a run whose prompts no other run has. Raises ValueError if a decoding request ended too early."""
        rng = random.Random(f"{self} {repeat}")
        prompts = random_prompts(rng, self.decoding, self.prompt_tokens, system.vocab_size)
        (late,) = random_prompts(rng, 1, self.late_tokens, system.vocab_size)
        *others, (first,) = system.token_times(prompts, [self.new_tokens] * self.decoding, late, self.before)
        if min(times[-1] for times in others) < first:
            raise ValueError(
                f"a request ended before the late one had its first token: {self.new_tokens} new tokens are too few"
            )
        gaps = [_longest_gap(times, first) for times in others]
        return {"s to the first token": first, "s between tokens": max(gaps)}


def _longest_gap(times: list[float], end: float) -> float:
    """The longest time between two tokens that overlaps [0, end]."""
    return max(later - sooner for sooner, later in itertools.pairwise(times) if later > 0 and sooner < end)


Workload = Decode | Group | FirstToken


def random_prompts(rng: random.Random, count: int, length: int, vocab_size: int) -> Prompts:
    return [[rng.randrange(vocab_size) for _ in range(length)] for _ in range(count)]
