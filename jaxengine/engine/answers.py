"""What was drawn for a request, as JSON and back, bit for bit: how another process's answer comes here."""

import dataclasses
from typing import Any

from jaxengine.host.sample import Drawn, Request, text_ids
from jaxengine.outputs import Logprob

LIKELIEST = "top_logprobs"


def answer_of(request: Request) -> dict[str, Any]:
    """Of a request that has ended. JSON writes a float64 so that reading gives it again, infinities too."""
    return {
        "samples": [_written(sample.drawn) for sample in request.samples],
        "prompt_logprobs": None if request.prompt_logprobs is None else list(map(_entries, request.prompt_logprobs)),
        "num_cached_tokens": request.num_cached_tokens,
    }


def take_answer(request: Request, answer: dict[str, Any]) -> None:
    """The request ends with what another process's engine drew for it."""
    scored = answer["prompt_logprobs"]
    request.prompt_logprobs = None if scored is None else list(map(_logprobs, scored))
    request.num_cached_tokens = answer["num_cached_tokens"]
    for sample, written in zip(request.samples, answer["samples"], strict=True):
        known = text_ids(sample)
        sample.drawn = Drawn(**written | {LIKELIEST: list(map(_logprobs, written[LIKELIEST]))})
        if sample.detokenizer is not None:
            sample.detokenizer.push(text_ids(sample)[len(known) :])
        sample.end(sample.drawn.finish_reason, sample.drawn.stop_reason)


def _written(drawn: Drawn) -> dict[str, Any]:
    fields = {field.name: getattr(drawn, field.name) for field in dataclasses.fields(drawn)}
    for name in ("raw_logprobs", "entropies"):
        fields[name] = list(map(float, fields[name]))
    return fields | {LIKELIEST: list(map(_entries, drawn.top_logprobs))}


def _entries(likeliest: dict[int, Logprob] | None) -> list[list[Any]] | None:
    return None if likeliest is None else [[token, each.logprob, each.rank] for token, each in likeliest.items()]


def _logprobs(entries: list[list[Any]] | None) -> dict[int, Logprob] | None:
    return None if entries is None else {token: Logprob(logprob, rank) for token, logprob, rank in entries}
