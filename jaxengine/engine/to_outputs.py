"""From finished (or growing) sequences to the outputs that callers see."""

import itertools

import numpy as np

from jaxengine.coordinate import Contract, Coordinate
from jaxengine.host.sample import Request, Sample, Status
from jaxengine.outputs import CompletionOutput, Logprob, RequestOutput, VersionSpan
from jaxengine.text.tokenizer import Tokenizer


def render(request: Request, tokenizer: Tokenizer | None, contract: Contract) -> RequestOutput:
    """A RequestOutput of the request as it stands. `contract` is that of its newest token's weights."""
    prompt_logprobs = request.prompt_logprobs
    if prompt_logprobs is None and request.sampling.prompt_logprobs is not None:
        prompt_logprobs = [None] * len(request.prompt_token_ids)
    return RequestOutput(
        request.request_id,
        request.prompt,
        list(request.prompt_token_ids),
        [_completion(sample, tokenizer, contract) for sample in request.samples],
        all(sample.status is Status.FINISHED for sample in request.samples),
        None if prompt_logprobs is None else [entry and _with_texts(entry, tokenizer) for entry in prompt_logprobs],
        request.num_cached_tokens or 0,
        contract.digest,
        request.cache_salt,
    )


def _completion(sample: Sample, tokenizer: Tokenizer | None, contract: Contract) -> CompletionOutput:
    params, token_ids, logprobs = (
        sample.request.sampling,
        list(sample.generated),
        np.asarray(sample.token_logprobs, np.float32),
    )
    optional = lambda wanted, values: np.asarray(values, np.float32) if wanted else None
    return CompletionOutput(
        sample.index,
        _text(sample, tokenizer),
        token_ids,
        logprobs,
        sample.finish_reason,
        sample.stop_reason,
        _spans(sample.token_versions),
        [_with_texts(entry, tokenizer) for entry in sample.logprobs] if params.logprobs is not None else None,
        optional(params.raw_logprobs, sample.raw_logprobs),
        optional(params.entropy, sample.entropies),
        [tokenizer.token_text(token) for token in token_ids] if tokenizer is not None else None,
        _coordinate(sample, token_ids, logprobs, contract),
    )


def _coordinate(sample: Sample, token_ids: list[int], logprobs: np.ndarray, contract: Contract) -> Coordinate:
    """Of a sample that several versions of the weights drew, none of which could replay it, the contract names them all."""
    request, versions = sample.request, sorted(set(sample.token_versions))
    if versions and versions != [contract.parts["weights_version"]]:
        contract = Contract(contract.parts | {"weights_version": versions})
    return Coordinate(
        contract,
        request.key,
        request.key_folds(sample.index),
        request.prompt_token_ids,
        request.sampling,
        token_ids,
        logprobs,
    )


def _text(sample: Sample, tokenizer: Tokenizer | None) -> str:
    """The completion's text so far."""
    params = sample.request.sampling
    if tokenizer is None or not params.detokenize:
        return ""
    if sample.detokenizer is not None:
        if sample.status is Status.FINISHED:
            sample.detokenizer.finish()
        return sample.detokenizer.text
    return tokenizer.decode(text_ids(sample), skip_special_tokens=params.skip_special_tokens)


def text_ids(sample: Sample) -> list[int]:
    """The tokens of the completion's text: all, but for a stop token that ended it, unless that is asked for."""
    token_ids = list(sample.generated)
    ended = sample.finish_reason == "stop" and token_ids and token_ids[-1] in sample.request.stop_token_ids
    return token_ids[:-1] if ended and not sample.request.sampling.include_stop_str_in_output else token_ids


def _with_texts(entry: dict[int, Logprob], tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    if tokenizer is None:
        return entry
    return {token: Logprob(value.logprob, value.rank, tokenizer.token_text(token)) for token, value in entry.items()}


def _spans(versions: list[int]) -> list[VersionSpan]:
    spans, start = [], 0
    for version, run in itertools.groupby(versions):
        stop = start + sum(1 for _ in run)
        spans.append(VersionSpan(version, start, stop))
        start = stop
    return spans
