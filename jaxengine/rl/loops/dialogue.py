"""A conversation of a model with a tool or an environment: turns that the model wrote, and replies between them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxengine.outputs import UNDRAWN, CompletionOutput, VersionSpan
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Conversation(CompletionOutput):
    """A sample with tool calls: `token_ids` are turns and replies. Each turn's `coordinate` replays it."""

    turns: tuple[CompletionOutput, ...] = ()


@dataclasses.dataclass
class Dialogue:
    """A conversation that is being generated."""

    number: int  # of its prompt
    sampling: SamplingParams  # of the first turn; a turn stops where a call ends
    key: Any
    prompt_token_ids: list[int]
    cache_salt: str
    parts: list[CompletionOutput]  # a turn, the reply to it, a turn, …
    max_tokens: int = 0  # of the next turn
    is_cut_off: bool = False  # whether no reply to the last call, or no turn after it, fits

    @property
    def turns(self) -> list[CompletionOutput]:
        return self.parts[::2]

    @property
    def context(self) -> list[int]:
        return self.prompt_token_ids + _token_ids(self.parts)

    @property
    def num_replies(self) -> int:
        return len(self.parts) // 2

    @property
    def next_sampling(self) -> SamplingParams:
        """Sampling parameters of the next turn."""
        return self.sampling.replace(
            n=1,
            key=self.key,
            seed=None,
            max_tokens=self.max_tokens,
            min_tokens=min(self.sampling.min_tokens, self.max_tokens),
            prompt_logprobs=None,
            truncate_prompt_tokens=None,
        )

    def add_reply(self, text: str | Sequence[int], tokenizer: Tokenizer, max_length: int) -> bool:
        """Append a reply, text or token ids, to the last turn. False where a limit leaves no token for a turn after."""
        reply = _reply(text, tokenizer)
        self.max_tokens = self._room_after(reply, max_length)
        self.is_cut_off = self.max_tokens < 1
        if not self.is_cut_off:
            self.parts.append(reply)
        return not self.is_cut_off

    def _room_after(self, reply: CompletionOutput, max_length: int) -> int:
        """Tokens that a turn after `reply` may have."""
        room = max_length - len(self.context) - len(reply.token_ids)
        if self.sampling.max_tokens is None:
            return room
        return min(room, self.sampling.max_tokens - len(_token_ids(self.turns)))

    def conversation(self, index: int, tokenizer: Tokenizer) -> Conversation:
        """The whole sample, as one completion."""
        last, parts = self.parts[-1], self.parts
        before = tokenizer.decode(_token_ids(parts[:-1]), self.sampling.skip_special_tokens)
        return Conversation(
            index=index,
            text=before + last.text,
            token_ids=_token_ids(parts),
            token_logprobs=np.concatenate([part.token_logprobs for part in parts]),
            finish_reason="length" if self.is_cut_off else last.finish_reason,
            stop_reason=None if self.is_cut_off else last.stop_reason,
            weight_versions=_version_spans(parts),
            logprobs=_joined(parts, "logprobs"),
            raw_logprobs=_concatenated(parts, "raw_logprobs"),
            entropies=_concatenated(parts, "entropies"),
            token_texts=_joined(parts, "token_texts"),
            turns=tuple(self.turns),
        )


def _reply(given: str | Sequence[int], tokenizer: Tokenizer) -> CompletionOutput:
    """A reply in the form of a turn. No weights drew it, so its logprobs and entropies are 0."""
    ids = tokenizer.encode(given, add_special_tokens=False) if isinstance(given, str) else list(given)
    if not ids:
        raise ValueError("a reply has at least one token: score takes two turns with nothing between them for one")
    text = given if isinstance(given, str) else tokenizer.decode(ids, False)
    nothing = np.zeros(len(ids), np.float32)
    return CompletionOutput(
        index=0,
        text=text,
        token_ids=ids,
        token_logprobs=nothing,
        finish_reason=None,
        stop_reason=None,
        weight_versions=[VersionSpan(UNDRAWN, 0, len(ids))],
        logprobs=[{} for _ in ids],
        raw_logprobs=nothing,
        entropies=nothing,
        token_texts=[tokenizer.token_text(token) for token in ids],
    )


def _token_ids(parts: list[CompletionOutput]) -> list[int]:
    return [token for part in parts for token in part.token_ids]


def _joined(parts: list[CompletionOutput], field: str) -> list[Any] | None:
    """A field that has an entry for each token, of all parts; None where the turns have none."""
    if getattr(parts[-1], field) is None:
        return None
    return [entry for part in parts for entry in getattr(part, field)]


def _concatenated(parts: list[CompletionOutput], field: str) -> np.ndarray | None:
    """`_joined` for a field that is an array."""
    entries = _joined(parts, field)
    return None if entries is None else np.array(entries, np.float32)


def _version_spans(parts: list[CompletionOutput]) -> list[VersionSpan]:
    spans, start = [], 0
    for part in parts:
        for span in part.weight_versions:
            spans.append(VersionSpan(span.version, start + span.start, start + span.stop))
        start += len(part.token_ids)
    return spans
