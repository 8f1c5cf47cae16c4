"""A request in flight and its samples, as the scheduler sees them. Plain Python."""

import dataclasses
import enum
from collections.abc import Callable, Sequence

from jaxengine.outputs import Logprob
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.detokenizer import Detokenizer
from jaxengine.text.grammar import Allowed, Grammar, Matcher


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclasses.dataclass
class Drawn:
    """What was drawn for one sample: lists with one item a token, and how it ended (None: it goes on).

    `raw_logprobs`, `entropies` and `top_logprobs` stay empty unless the sampling parameters ask for them.
    """

    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)  # of the weights that drew each token
    raw_logprobs: list[float] = dataclasses.field(default_factory=list)
    entropies: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[int, Logprob]] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def truncate(self, count: int) -> None:
        """Keep the first `count` tokens with all that belongs to them."""
        for values in (self.token_ids, self.logprobs, self.versions):
            del values[count:]
        for values in (self.raw_logprobs, self.entropies, self.top_logprobs):
            del values[count:]


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
    priority: int = 0  # a lower one is served first
    is_keyless: bool = False  # its call brought no key: `key` is known once the call is queued
    grammar: Grammar | None = None  # where structured outputs are asked for
    earlier: list[Drawn] = dataclasses.field(default_factory=list)  # of each sample, where an earlier call began them
    samples: list["Sample"] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int | None = None
    on_news: Callable[["Request"], None] | None = None  # called in a step: a sample has a new token, or has ended

    @property
    def is_finished(self) -> bool:
        return all(sample.status is Status.FINISHED for sample in self.samples)

    @property
    def only_scores(self) -> bool:
        """Whether nothing is drawn, but the prompt has logprobs to be found."""
        sampling = self.sampling
        return sampling.max_tokens == 0 and sampling.prompt_logprobs is not None and len(self.prompt_token_ids) > 1

    def key_folds(self, sample_index: int) -> tuple[int, int]:
        """What is folded into the key for one sample; -1 means nothing."""
        has_own_key, is_alone = self.prompt_index < 0, self.sampling.n == 1
        return self.prompt_index, -1 if has_own_key and is_alone else sample_index


@dataclasses.dataclass(eq=False)
class Sample:
    """One sample: its tokens, its pages and how far it has come."""

    request: Request
    index: int
    arrival: int
    drawn: Drawn = dataclasses.field(default_factory=Drawn)
    status: Status = Status.WAITING
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    num_computed: int = 0  # tokens whose keys and values are written, or will be by a step that is under way
    num_registered: int = 0  # pages offered to the prefix cache
    num_recorded: int = (
        0  # drawn tokens that are written down with all that belongs to them, and did not end the sample
    )
    has_old_pages: bool = False  # whether weights before `version` wrote some of its pages
    version: int = 0  # of the weights that run it
    detokenizer: Detokenizer | None = None  # where stop strings or a stream need the text
    matcher: Matcher | None = None  # from its first token on where its request has a grammar
    prompt_length: int = dataclasses.field(init=False)
    length: int = dataclasses.field(init=False)  # tokens of prompt and completion, those under way included
    # Until then nothing has to be looked at, so that a step's work for most samples is short; 0: every time.
    quiet_length: int = 0  # the longest `length` at which the scheduler gives it a whole decode and no page
    next_event: int = 0  # how many drawn tokens fill a page or reach the limit

    def __post_init__(self) -> None:
        self.prompt_length = len(self.request.prompt_token_ids)
        self.length = self.num_tokens

    @classmethod
    def of(cls, request: Request, index: int, arrival: int) -> "Sample":
        """A sample that waits, or has ended already; it goes on after what an earlier call drew for it."""
        drawn = request.earlier[index] if request.earlier else Drawn()
        status = Status.WAITING if drawn.finish_reason is None else Status.FINISHED
        return cls(request, index, arrival, drawn, status, num_recorded=len(drawn.token_ids))

    def end(self, reason: str | None, stop_reason: int | str | None = None) -> None:
        """No token follows; idempotent."""
        if self.status is Status.FINISHED:
            return
        if self.detokenizer is not None:
            self.detokenizer.finish()
        self.matcher = None
        self.drawn.finish_reason, self.drawn.stop_reason = reason, stop_reason
        self.status = Status.FINISHED
        if self.request.on_news is not None:
            self.request.on_news(self.request)

    def restart(self) -> None:
        """Back to the queue with nothing computed.

        A token that an interrupt left half written down goes too: nobody saw it, and it is drawn again.
        """
        self.status, self.slot, self.pages, self.has_old_pages = Status.WAITING, -1, [], False
        self.num_computed = self.num_registered = self.quiet_length = self.next_event = 0
        self.drawn.truncate(self.num_recorded)
        self.drawn.finish_reason = self.drawn.stop_reason = self.matcher = None
        self.length = self.num_tokens

    def allowed(self) -> Allowed:
        """What its grammar lets follow the tokens that are known."""
        if self.matcher is None:
            assert self.request.grammar is not None
            self.matcher = self.request.grammar.matcher()
        return self.matcher.after(self.drawn.token_ids)

    @property
    def priority(self) -> int:
        return self.request.priority

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and completion that are known."""
        return self.prompt_length + len(self.drawn.token_ids)

    @property
    def num_pending(self) -> int:
        """Tokens drawn by steps whose results are not here yet."""
        return self.length - self.num_tokens

    @property
    def token_ids(self) -> list[int]:
        """Prompt and completion, as a new list."""
        return self.request.prompt_token_ids + self.drawn.token_ids

    def tokens(self, start: int, stop: int) -> Sequence[int]:
        """Tokens [start, stop) of prompt and completion."""
        prompt, drawn, edge = self.request.prompt_token_ids, self.drawn.token_ids, self.prompt_length
        return prompt[start:stop] + drawn[max(start - edge, 0) : max(stop - edge, 0)]

    @property
    def scores_prompt(self) -> bool:
        """Whether its prefill owes the prompt's logprobs: the first sample's does, once."""
        return self.request.sampling.prompt_logprobs is not None and self.index == 0 and not self.drawn.token_ids

    @property
    def is_steered(self) -> bool:
        """Whether what may be drawn depends on the token before it, by a grammar that the host follows."""
        return self.request.grammar is not None

    @property
    def is_decoding(self) -> bool:
        return self.num_computed >= self.length - 1 and self.num_computed >= self.prompt_length

    @property
    def computes_prompt(self) -> bool:
        """Whether its first prefill is under way: siblings wait for it, to share the prompt's pages."""
        return self.status is Status.RUNNING and not self.drawn.token_ids and self.num_computed < self.prompt_length


def text_ids(sample: Sample) -> list[int]:
    """The tokens of the completion's text: all, but for a stop token that ended it, unless that is asked for."""
    request, token_ids = sample.request, sample.drawn.token_ids
    if sample.drawn.finish_reason != "stop" or request.sampling.include_stop_str_in_output:
        return list(token_ids)
    ends_with_stop_token = bool(token_ids) and token_ids[-1] in request.stop_token_ids
    return token_ids[:-1] if ends_with_stop_token else list(token_ids)
