"""A request in flight and its samples, as the scheduler sees them. Plain Python."""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

from jaxengine.outputs import Logprob
from jaxengine.sampling_params import SamplingParams


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass(frozen=True)
class Earlier:
    """What an earlier call drew for one sample, in the fields of Sequence. Without a finish reason it goes on."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    token_logprobs: list[float] = dataclasses.field(default_factory=list)
    token_versions: list[int] = dataclasses.field(default_factory=list)
    raw_logprobs: list[float] = dataclasses.field(default_factory=list)
    entropies: list[float] = dataclasses.field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt, how to sample it, and the key data and indices that its draws depend on."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    key: tuple[int, int]
    prompt_index: int  # -1 where the request carries its own key
    stop_token_ids: frozenset[int]
    limit: int  # prompt and completion end here
    prompt: str | None = None
    cache_salt: str = ""
    earlier: list[Earlier] = dataclasses.field(default_factory=list)  # of each sample, where an earlier call began them
    samples: list["Sample"] = dataclasses.field(default_factory=list)
    prefilling: "Sample | None" = None  # the sample that computes the prompt; the others wait to share its pages
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int | None = None

    def key_folds(self, sample_index: int) -> tuple[int, int]:
        """What is folded into the key for one sample; -1 means nothing."""
        own, alone = self.prompt_index < 0, self.sampling.n == 1
        return self.prompt_index, -1 if own and alone else sample_index


@dataclasses.dataclass(eq=False)
class Sample:
    """One sample: its tokens, its pages and how far it has come."""

    request: Request
    index: int
    token_ids: list[int]
    arrival: int
    status: Status = Status.WAITING
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    num_computed: int = 0  # tokens whose keys and values are written, or will be by a step that is under way
    num_pending: int = 0  # tokens drawn by steps whose results are not here yet
    num_registered: int = 0  # pages offered to the prefix cache
    has_old_pages: bool = False  # whether weights before `version` wrote some of its pages
    version: int = 0  # of the weights that run it
    known_pages: tuple[int, list] | None = (
        None  # version, and what BlockManager.match has found out: it may wait for many steps
    )
    token_logprobs: list[float] = dataclasses.field(default_factory=list)
    raw_logprobs: list[float] = dataclasses.field(default_factory=list)
    entropies: list[float] = dataclasses.field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)
    token_versions: list[int] = dataclasses.field(default_factory=list)
    num_settled: int = 0  # generated tokens that are written down with all that belongs to them, and did not end it
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    detokenizer: Any = None

    @classmethod
    def of(cls, request: Request, index: int, arrival: int) -> "Sample":
        """A sample that waits, behind what an earlier call drew for it."""
        earlier = request.earlier[index] if request.earlier else Earlier()
        return cls(
            request,
            index,
            request.prompt_token_ids + earlier.token_ids,
            arrival,
            Status.WAITING if earlier.finish_reason is None else Status.FINISHED,
            token_logprobs=list(earlier.token_logprobs),
            token_versions=list(earlier.token_versions),
            raw_logprobs=list(earlier.raw_logprobs),
            entropies=list(earlier.entropies),
            logprobs=list(earlier.logprobs),
            num_settled=len(earlier.token_ids),
            finish_reason=earlier.finish_reason,
            stop_reason=earlier.stop_reason,
        )

    def restart(self) -> None:
        """Back to the queue with nothing computed. A token that an interrupt left half written down goes too: nobody saw it, and it is
        drawn again."""
        self.status, self.slot, self.pages, self.request.prefilling = Status.WAITING, -1, [], None
        self.num_computed = self.num_pending = self.num_registered = 0
        self.has_old_pages, self.known_pages = False, None
        del self.token_ids[self.prompt_length + self.num_settled :]
        for values in (self.token_logprobs, self.raw_logprobs, self.entropies, self.logprobs, self.token_versions):
            del values[self.num_settled :]

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def length(self) -> int:
        """Tokens of the sequence, those under way included."""
        return len(self.token_ids) + self.num_pending

    @property
    def generated(self) -> Sequence[int]:
        return self.token_ids[self.prompt_length :]

    @property
    def scores_prompt(self) -> bool:
        """Whether its prefill owes the prompt's logprobs: the first sample's does, once."""
        return self.request.sampling.prompt_logprobs is not None and self.index == 0 and not self.generated

    @property
    def is_decoding(self) -> bool:
        return self.num_computed >= self.length - 1 and self.num_computed >= self.prompt_length
