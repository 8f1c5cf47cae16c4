"""Tool use: the model writes a call, the tool's answer enters the context, and the model goes on.

A conversation is one sequence. What the model writes keeps its keys, one a position, and its logprobs; what a tool writes has logprob 0 and
weights version -1, is never under a rollout's mask, and so carries no loss. `score` sees each turn as a completion of all before it,
which is how it was generated: the same bits.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from jaxengine.config import EngineConfig
from jaxengine.host.admission import own_key, prompts_of, sampling_of
from jaxengine.outputs import UNDRAWN, CompletionOutput, RequestOutputs, VersionSpan
from jaxengine.rl.loops.calculator import calculate
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Tool:
    """`answer(call)` for what the model wrote between `begin` and `end`; the answer enters the context with `after` behind it.

    A turn that reaches `end` with no `begin` in it is a call of all it wrote where `begin` is empty, else an error. The text of an
    answer's error (ValueError) enters the context in its place.
    """

    answer: Callable[[str], str]
    begin: str = "<calc>"
    end: str = "</calc>"
    after: str = "\n"

    def __post_init__(self) -> None:
        if not self.end:
            raise ValueError("end must be the text that ends a call, got ''")

    def reply(self, turn: str) -> str:
        """What enters the context behind a turn that ended with `end`; never empty text."""
        _, begun, call = (
            turn.removesuffix(self.end).rpartition(self.begin) if self.begin else ("", "", turn.removesuffix(self.end))
        )
        try:
            if self.begin and not begun:
                raise ValueError(f"a call begins with {self.begin}")
            answer = self.answer(call)
        except ValueError as error:
            answer = f"error: {error}"
        return answer + self.after or " "


def calculator(begin: str = "<calc>", end: str = "</calc>", after: str = "\n") -> Tool:
    """A tool that does arithmetic (calculator.py): after "<calc>12+30</calc>" the context goes on with "42" and a new line."""
    return Tool(calculate, begin, end, after)


@dataclasses.dataclass(frozen=True)
class Conversation(CompletionOutput):
    """A sample with tools in it: `token_ids` are its turns and what tools said between them. Each turn's own `coordinate` replays it."""

    turns: tuple[CompletionOutput, ...] = ()


class Generator(Protocol):
    """What the loop needs: an LLM."""

    tokenizer: Tokenizer | None

    @property
    def engine_config(self) -> EngineConfig: ...

    def generate(self, prompts: Any, sampling_params: Any, *, key: Any, use_tqdm: bool | None) -> RequestOutputs: ...


def generate_with_tools(
    llm: Generator,
    prompts: Any,
    tool: Tool,
    sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    key: Any,
    max_calls: int = 8,
    use_tqdm: bool | None = None,
) -> RequestOutputs:
    """Like `llm.generate`, with at most `max_calls` calls of the tool in each sample; the samples are `Conversation`s.

    Prompts and samples draw with the keys that `generate` gives them: without a call the outputs are generate's, bit for bit.
    `max_tokens` bounds what the model writes in all its turns together, and `min_tokens` holds for each turn. A conversation whose
    tokens or context are used up ends with finish reason "length", one that calls once more than it may with "stop", at its call.
    All conversations go on together: a round generates one turn of each that still runs.
    """
    if llm.tokenizer is None:
        raise ValueError("tools read and write text, and the model has no tokenizer: give LLM one")
    batch = prompts_of(prompts)
    each = sampling_of(sampling_params, len(batch))
    first = llm.generate(batch, [_calling(params, tool) for params in each], key=key, use_tqdm=use_tqdm)
    asked = [
        [
            _Running(params, own_key(key, params, i, j), output.prompt_token_ids, output.cache_salt, [turn])
            for j, turn in enumerate(output.outputs)
        ]
        for i, (params, output) in enumerate(zip(each, first, strict=True))
    ]
    running = [one for samples in asked for one in samples]
    while running := [one for one in running if one.goes_on(tool, llm.tokenizer, max_calls, _room(llm.engine_config))]:
        prompts = [{"prompt_token_ids": one.context, "cache_salt": one.cache_salt} for one in running]
        turns = llm.generate(prompts, [one.next_params(tool) for one in running], key=key, use_tqdm=use_tqdm)
        for one, output in zip(running, turns, strict=True):
            one.turns.append(output.outputs[0])
    return RequestOutputs(
        dataclasses.replace(output, outputs=[one.conversation(j, llm.tokenizer) for j, one in enumerate(samples)])
        for output, samples in zip(first, asked, strict=True)
    )


def _calling(params: SamplingParams, tool: Tool, **changes: Any) -> SamplingParams:
    """Parameters of a turn: it ends where a call does."""
    return params.replace(stop=(*params.stop, tool.end), **changes)


def _room(config: EngineConfig) -> int:
    """Tokens that one sequence may have: those of the context, as far as the pool has pages for them."""
    return min(config.max_model_len, (config.num_pages - 1) * config.page_size)


@dataclasses.dataclass
class _Running:
    """A conversation as it grows: a turn, a reply, a turn, …"""

    params: SamplingParams
    key: Any
    prompt_token_ids: list[int]
    cache_salt: str
    turns: list[CompletionOutput]
    replies: list[list[int]] = dataclasses.field(default_factory=list)
    room: int = 0  # tokens that the next turn may have
    ended: str | None = None  # why, where it is not the last turn that says it

    @property
    def context(self) -> list[int]:
        return self.prompt_token_ids + [token for part in self._parts() for token in _ids(part)]

    def goes_on(self, tool: Tool, tokenizer: Tokenizer, max_calls: int, room: int) -> bool:
        """Answer the last turn's call, if it made one; whether another turn follows."""
        last = self.turns[-1]
        if (last.finish_reason, last.stop_reason) != ("stop", tool.end) or len(self.replies) == max_calls:
            return False
        reply = tokenizer.encode(tool.reply(last.text), add_special_tokens=False)
        assert reply, "two turns with nothing between them would be scored as one"
        written, limit = sum(len(turn.token_ids) for turn in self.turns), self.params.max_tokens
        self.room = min(room - len(self.context) - len(reply), room if limit is None else limit - written)
        if self.room < 1:
            self.ended = "length"
            return False
        self.replies.append(reply)
        return True

    def next_params(self, tool: Tool) -> SamplingParams:
        least = min(self.params.min_tokens, self.room)
        return _calling(
            self.params,
            tool,
            n=1,
            key=self.key,
            seed=None,
            max_tokens=self.room,
            min_tokens=least,
            prompt_logprobs=None,
        )

    def conversation(self, index: int, tokenizer: Tokenizer) -> Conversation:
        """The whole sample. What a tool wrote has logprob 0, entropy 0, and the weights version of nothing drawn."""
        parts, last = list(self._parts()), self.turns[-1]
        joined = lambda of_turn, of_token: [x for part in parts for x in _each(part, of_turn, of_token)]
        floats = lambda name: (
            None if getattr(last, name) is None else np.array(joined(name, lambda token: 0.0), np.float32)
        )
        before = tokenizer.decode(
            [token for part in parts[:-1] for token in _ids(part)], self.params.skip_special_tokens
        )
        logprobs = floats("token_logprobs")
        assert logprobs is not None
        return Conversation(
            index,
            before + last.text,
            joined("token_ids", lambda token: token),
            logprobs,
            self.ended or last.finish_reason,
            None if self.ended else last.stop_reason,
            _spans(parts),
            None if last.logprobs is None else joined("logprobs", lambda token: {}),
            floats("raw_logprobs"),
            floats("entropies"),
            joined("token_texts", tokenizer.token_text),
            turns=tuple(self.turns),
        )

    def _parts(self) -> Iterator["CompletionOutput | list[int]"]:
        for turn, reply in itertools.zip_longest(self.turns, self.replies):
            yield turn
            if reply is not None:
                yield reply


def _ids(part: CompletionOutput | list[int]) -> list[int]:
    return part if isinstance(part, list) else part.token_ids


def _each(part: CompletionOutput | list[int], of_turn: str, of_token: Callable[[int], Any]) -> list[Any]:
    """One thing for each token of a part: a field of a turn, or what stands for it in a reply."""
    return [of_token(token) for token in part] if isinstance(part, list) else list(getattr(part, of_turn))


def _spans(parts: list[CompletionOutput | list[int]]) -> list[VersionSpan]:
    spans, start = [], 0
    for part in parts:
        length = len(_ids(part))
        of_part = [VersionSpan(UNDRAWN, 0, length)] if isinstance(part, list) else part.weight_versions
        spans += [VersionSpan(span.version, start + span.start, start + span.stop) for span in of_part]
        start += length
    return spans
