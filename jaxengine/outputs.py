"""What a caller gets: RequestOutput and its CompletionOutputs, named as in vLLM, with an HTML form for notebooks."""

import dataclasses
import html
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxengine.coordinate import Coordinate


@dataclasses.dataclass(frozen=True)
class Logprob:
    """One entry of `logprobs`: the log-probability, the token's rank (1 is the likeliest) and its text.

    Of a token that is told by `logprob_token_ids` alone the rank is None: finding it would cost a pass over the
    vocabulary for each.
    """

    logprob: float
    rank: int | None
    decoded_token: str | None = None


UNDRAWN = -1  # the weights version of tokens that no weights drew: a tool's answer inside a completion


@dataclasses.dataclass(frozen=True)
class VersionSpan:
    """Tokens [start, stop) of a completion were produced by `version` of the weights; UNDRAWN: by none."""

    version: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """One sample.

    `token_logprobs[i]` is the float32 log-probability of `token_ids[i]` under the distribution it was drawn from.
    """

    index: int
    text: str
    token_ids: list[int]
    token_logprobs: np.ndarray
    finish_reason: str | None  # "stop", "length", "abort", "error"
    stop_reason: int | str | None  # the stop token id or stop string; after "error" what went wrong
    weight_versions: list[VersionSpan]
    logprobs: list[dict[int, Logprob]] | None = None
    raw_logprobs: np.ndarray | None = None  # of the model's own distribution at temperature 1
    entropies: np.ndarray | None = None  # of the processed distribution, in nats
    token_texts: list[str] | None = dataclasses.field(default=None, repr=False)
    coordinate: Coordinate | None = dataclasses.field(default=None, repr=False)  # what LLM.replay takes

    @property
    def cumulative_logprob(self) -> float:
        return float(np.sum(self.token_logprobs, dtype=np.float64))

    def _repr_html_(self) -> str:
        pieces = self.token_texts or [self.text]
        marks = self.token_logprobs if self.token_texts else [0.0]
        tokens = "".join(_colored(piece, logprob) for piece, logprob in zip(pieces, marks, strict=False))
        reason = html.escape(str(self.finish_reason))
        return f"<div><code style='white-space:pre-wrap'>{tokens}</code> <small>{reason}</small></div>"


@dataclasses.dataclass(frozen=True)
class CompletionDelta:
    """What a sample gained: its tokens from the `start`-th on, and what belongs to them as in CompletionOutput.

    `finish_reason` and `stop_reason` come once, with the end.
    """

    index: int
    start: int
    text: str
    token_ids: list[int]
    token_logprobs: np.ndarray
    weight_versions: list[VersionSpan]  # positions are those of the whole completion
    logprobs: list[dict[int, Logprob]] | None = None
    raw_logprobs: np.ndarray | None = None
    entropies: np.ndarray | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def followed_by(self, later: "CompletionDelta") -> "CompletionDelta":
        """One delta in the place of two: `later` is of the same sample and begins where this one ends."""
        return CompletionDelta(
            index=self.index,
            start=self.start,
            text=self.text + later.text,
            token_ids=self.token_ids + later.token_ids,
            token_logprobs=np.concatenate([self.token_logprobs, later.token_logprobs]),
            weight_versions=_joined_spans(self.weight_versions, later.weight_versions),
            logprobs=None if self.logprobs is None else self.logprobs + (later.logprobs or []),
            raw_logprobs=_joined_rows(self.raw_logprobs, later.raw_logprobs),
            entropies=_joined_rows(self.entropies, later.entropies),
            finish_reason=later.finish_reason,
            stop_reason=later.stop_reason,
        )


def joined(pieces: Iterable[Any]) -> list[Any]:
    """What has an `index` and can be `followed_by` more of it: those of each index as one, in order of their first."""
    found: dict[int, Any] = {}
    for piece in pieces:
        found[piece.index] = found[piece.index].followed_by(piece) if piece.index in found else piece
    return list(found.values())


def _joined_rows(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    return None if first is None or second is None else np.concatenate([first, second])


def _joined_spans(first: list[VersionSpan], second: list[VersionSpan]) -> list[VersionSpan]:
    """Spans of tokens that follow each other; where one version drew on, they are one."""
    if first and second and first[-1].version == second[0].version:
        whole = VersionSpan(first[-1].version, first[-1].start, second[0].stop)
        return [*first[:-1], whole, *second[1:]]
    return first + second


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """A prompt and its samples.

    `digest` names the contract (versions, device, dtype, model) under which the bits hold.
    """

    request_id: str
    prompt: str | None  # of a chat the text that its template made; None where token ids were given
    prompt_token_ids: list[int]  # those that were used: the last ones of a prompt that was cut, none of one refused
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # raw: of the model's own distribution
    num_cached_tokens: int = 0
    digest: str = ""
    cache_salt: str = ""

    def _repr_html_(self) -> str:
        prompt = self.prompt if self.prompt is not None else f"{len(self.prompt_token_ids)} tokens"
        name = f"<small>request {html.escape(self.request_id)}</small>"
        head = f"<div style='font-family:monospace'><b>{html.escape(prompt)}</b> {name}</div>"
        legend = "<small>color: probability of each token when drawn, red is unlikely</small>"
        return head + "".join(sample._repr_html_() for sample in self.outputs) + legend


@dataclasses.dataclass(frozen=True)
class RequestDelta:
    """What a request gained with a step: of each sample that has something new, what that is.

    The last delta is finished and has the whole output. Texts and token ids of one sample's deltas, joined, are its
    whole text and tokens.
    """

    request_id: str
    outputs: list[CompletionDelta]
    finished: bool
    output: RequestOutput | None = None


class RequestOutputs(list[RequestOutput]):
    """A plain list of RequestOutput that a notebook shows as HTML."""

    def _repr_html_(self) -> str:
        shown = "<hr>".join(output._repr_html_() for output in self[:20])
        return shown + (f"<p>… and {len(self) - 20} more</p>" if len(self) > 20 else "")


def _colored(text: str, logprob: Any) -> str:
    probability = math.exp(min(float(logprob), 0.0)) if math.isfinite(float(logprob)) else 0.0
    hue = 120 * probability  # red to green
    title = f"logprob {float(logprob):.3f}, probability {probability:.3f}"
    return f"<span style='background:hsl({hue:.0f},80%,85%)' title='{title}'>{html.escape(text)}</span>"
