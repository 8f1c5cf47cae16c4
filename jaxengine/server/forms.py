"""From the engine's outputs to the forms in which clients read tokens and logprobs."""

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

from jaxengine.outputs import CompletionDelta, CompletionOutput, Logprob, RequestOutput
from jaxengine.text.tokenizer import Tokenizer

LEAST = -9999.0  # in the place of minus infinity, which JSON has not; vLLM's number
Drawn = CompletionDelta | CompletionOutput


def number(logprob: float) -> float:
    """A logprob that JSON can hold: a float32 that is finite keeps its bits."""
    value = float(logprob)
    return value if math.isfinite(value) else LEAST


def text_offsets(names: Sequence[str], start: int = 0) -> list[int]:
    """Characters before each token."""
    return list(itertools.accumulate(map(len, names), initial=start))[:-1]


class TokenNames:
    """Tokens by their text, or as "token_id:5" where a client asked for that or there is no tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None, as_ids: bool | None) -> None:
        self._tokenizer = None if as_ids else tokenizer

    def __call__(self, token: int) -> str:
        return f"token_id:{token}" if self._tokenizer is None else self._tokenizer.token_text(token)

    def completion(self, drawn: Drawn, offset: int = 0) -> dict[str, Any]:
        """`logprobs` of /v1/completions: four lists, an item a token; all that were asked for and the drawn.

        `offset` is the number of characters before the first token.
        """
        names = [self(token) for token in drawn.token_ids]
        offsets = text_offsets(names, offset)
        logprobs = [number(logprob) for logprob in drawn.token_logprobs]
        top = [
            {self(other): number(value.logprob) for other, value in entry.items()} | {name: logprob}
            for name, logprob, entry in zip(names, logprobs, _likeliest(drawn), strict=True)
        ]
        return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}

    def chat(self, drawn: Drawn, count: int, named: Sequence[int]) -> dict[str, Any]:
        """`logprobs` of /v1/chat/completions: of the `count` likeliest, the likeliest first, then of the `named`."""
        each = zip(drawn.token_ids, drawn.token_logprobs, _likeliest(drawn), strict=True)
        return {
            "content": [
                self._entry(token, logprob)
                | {"top_logprobs": [self._entry(other, value.logprob) for other, value in _told(entry, count, named)]}
                for token, logprob, entry in each
            ]
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        name = self(token)
        return {"token": name, "logprob": number(logprob), "bytes": list(name.encode("utf-8", "replace"))}


def token_content(drawn: Drawn, count: int, named: Sequence[int]) -> dict[str, Any]:
    """`logprobs` of /inference/v1/generate, in the older form (`token`) and the newer one (`token_id`) at once."""
    content = []
    for token, logprob, entry in zip(drawn.token_ids, drawn.token_logprobs, _likeliest(drawn), strict=True):
        own = {"token": f"token_id:{token}", "token_id": token, "logprob": number(logprob)}
        top = [
            {"token": f"token_id:{other}", "token_id": other, "logprob": number(value.logprob), "rank": value.rank}
            for other, value in _told(entry, count, named)
        ]
        content.append(own | {"rank": entry[token].rank if token in entry else None, "top_logprobs": top})
    return {"content": content}


def prompt_logprobs(output: RequestOutput) -> list[dict[str, Any] | None] | None:
    """A dict by token id for each token of the prompt, None for the first."""
    if output.prompt_logprobs is None:
        return None
    return [None if entry is None else _described(entry) for entry in output.prompt_logprobs]


def _described(entry: dict[int, Logprob]) -> dict[str, Any]:
    return {
        str(token): {"logprob": number(value.logprob), "rank": value.rank, "decoded_token": value.decoded_token}
        for token, value in entry.items()
    }


def coordinate(sample: CompletionOutput) -> Any:
    """The replay coordinate as JSON values, or None."""
    return None if sample.coordinate is None else json.loads(sample.coordinate.to_json())


def version_spans(drawn: Drawn) -> list[dict[str, int]]:
    """Which version of the weights drew tokens [start, stop)."""
    return [{"version": span.version, "start": span.start, "stop": span.stop} for span in drawn.weight_versions]


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Tokens of a call. A prompt counts once, however many samples it has."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    drawn = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": drawn,
        "total_tokens": prompt + drawn,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def _likeliest(drawn: Drawn) -> Sequence[dict[int, Logprob]]:
    """The drawn token, the likeliest and the named ones at each token, empty where none were asked for."""
    return drawn.logprobs if drawn.logprobs is not None else [{}] * len(drawn.token_ids)


def _told(entry: dict[int, Logprob], count: int, named: Sequence[int]) -> list[tuple[int, Logprob]]:
    """The `count` likeliest, the likeliest first, -1 is all; then the `named` tokens that are not among them. The drawn
    token is there only where it is likely or named.
    """
    ranked = [(value.rank, token) for token, value in entry.items() if value.rank is not None]
    likeliest = [token for rank, token in sorted(ranked) if count == -1 or rank <= count]
    return [(token, entry[token]) for token in dict.fromkeys([*likeliest, *named])]
