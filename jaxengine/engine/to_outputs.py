"""From finished (or growing) requests to the outputs that callers see."""

import itertools
from typing import Any

import numpy as np

from jaxengine.coordinate import Contract, Coordinate
from jaxengine.engine.contract_digest import Contracts
from jaxengine.host.sample import Request, Sample, text_ids
from jaxengine.outputs import CompletionOutput, Logprob, RequestOutput, VersionSpan
from jaxengine.text.tokenizer import Tokenizer


def to_output(request: Request, tokenizer: Tokenizer | None, contracts: Contracts) -> RequestOutput:
    """A RequestOutput of the request as it stands."""
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=list(request.prompt_token_ids),
        outputs=[_completion(sample, tokenizer, contracts) for sample in request.samples],
        finished=request.is_finished,
        prompt_logprobs=_prompt_logprobs(request, tokenizer),
        num_cached_tokens=request.num_cached_tokens or 0,
        digest=contracts.of(_newest_version(request)).digest,
        cache_salt=request.cache_salt,
    )


def _newest_version(request: Request) -> list[int]:
    """The version of the weights that drew the request's newest token, if one was drawn."""
    drew = [sample.drawn.versions[-1] for sample in request.samples if sample.drawn.versions]
    return [max(drew)] if drew else []


def _prompt_logprobs(request: Request, tokenizer: Tokenizer | None) -> list[dict[int, Logprob] | None] | None:
    if request.sampling.prompt_logprobs is None and request.prompt_logprobs is None:
        return None
    entries = request.prompt_logprobs or [None] * len(request.prompt_token_ids)
    return [entry and _with_texts(entry, tokenizer) for entry in entries]


def _completion(sample: Sample, tokenizer: Tokenizer | None, contracts: Contracts) -> CompletionOutput:
    drawn, fields = sample.drawn, token_fields(sample, tokenizer)
    return CompletionOutput(
        index=sample.index,
        text=_text(sample, tokenizer),
        finish_reason=drawn.finish_reason,
        stop_reason=drawn.stop_reason,
        token_texts=[tokenizer.token_text(token) for token in drawn.token_ids] if tokenizer is not None else None,
        coordinate=_coordinate(sample, fields["token_logprobs"], _contract(sample, tokenizer, contracts)),
        **fields,
    )


def token_fields(sample: Sample, tokenizer: Tokenizer | None, start: int = 0) -> dict[str, Any]:
    """What is known of each token from the `start`-th on: fields of a CompletionOutput, and of a CompletionDelta."""
    drawn, sampling = sample.drawn, sample.request.sampling
    top_logprobs = [_with_texts(entry, tokenizer) for entry in drawn.top_logprobs[start:]]
    return {
        "token_ids": drawn.token_ids[start:],
        "token_logprobs": np.asarray(drawn.logprobs[start:], np.float32),
        "weight_versions": _spans(drawn.versions[start:], start),
        "logprobs": top_logprobs if sampling.tells_logprobs else None,
        "raw_logprobs": np.asarray(drawn.raw_logprobs[start:], np.float32) if sampling.raw_logprobs else None,
        "entropies": np.asarray(drawn.entropies[start:], np.float32) if sampling.entropy else None,
    }


def _contract(sample: Sample, tokenizer: Tokenizer | None, contracts: Contracts) -> Contract:
    found = contracts.of(sample.drawn.versions)
    return found.with_grammars(tokenizer.grammars.identity) if sample.is_steered and tokenizer is not None else found


def _coordinate(sample: Sample, logprobs: np.ndarray, contract: Contract) -> Coordinate:
    """A sample that several weights drew can be replayed by none of them: its contract names them all."""
    request = sample.request
    return Coordinate(
        contract=contract,
        key=request.key,
        key_folds=request.key_folds(sample.index),
        prompt_token_ids=request.prompt_token_ids,
        sampling_params=request.sampling,
        token_ids=list(sample.drawn.token_ids),
        token_logprobs=logprobs,
    )


def _text(sample: Sample, tokenizer: Tokenizer | None) -> str:
    """The completion's text so far."""
    sampling = sample.request.sampling
    if tokenizer is None or not sampling.detokenize:
        return ""
    if sample.detokenizer is None:
        return tokenizer.decode(text_ids(sample), skip_special_tokens=sampling.skip_special_tokens)
    return sample.detokenizer.text


def _with_texts(entry: dict[int, Logprob], tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """The entry with each token's text."""
    if tokenizer is None:
        return entry
    return {token: Logprob(value.logprob, value.rank, tokenizer.token_text(token)) for token, value in entry.items()}


def _spans(versions: list[int], start: int) -> list[VersionSpan]:
    """Runs of equal versions; the first token is the `start`-th of its sample."""
    spans = []
    for version, run in itertools.groupby(versions):
        stop = start + len(list(run))
        spans.append(VersionSpan(version, start, stop))
        start = stop
    return spans
