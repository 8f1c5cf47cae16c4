"""From what a caller gives to a Request: everything is checked here, before anything is allocated."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxengine.base.arguments import check_keywords, flag
from jaxengine.base.keys import key_data, key_of, seed_data
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.coordinate import Coordinate
from jaxengine.host.sample import Earlier, Request
from jaxengine.outputs import CompletionOutput, RequestOutput
from jaxengine.sampling_params import MAX_STOPS, SamplingParams, stop_token_ids, token_ids_of
from jaxengine.text.detokenizer import Detokenizer
from jaxengine.text.tokenizer import Tokenizer

PROMPT_KEYS = ("prompt", "prompt_token_ids", "allow_special_tokens", "cache_salt")


def prompts_of(prompts: Any) -> list[Any]:
    """A batch of prompts: one string, one list of ids or one dict is a batch of one, as in vLLM."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, (bytes, type(None))) or not hasattr(prompts, "__iter__"):
        raise ValueError(f"prompts must be strings, lists of token ids or dicts, got {type(prompts).__name__}")
    batch = list(prompts)
    is_token = lambda x: getattr(x, "ndim", None) == 0 or not isinstance(x, str) and not hasattr(x, "__iter__")
    return [batch] if batch and all(map(is_token, batch)) else batch


def sampling_of(params: Any, count: int) -> list[SamplingParams]:
    """One SamplingParams a prompt: one for all, or one each."""
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if isinstance(params, (str, bytes, Mapping)) or not isinstance(params, Sequence):
        raise TypeError(f"sampling_params must be a SamplingParams or a list of them, got {type(params).__name__}")
    for index, item in enumerate(params):
        if not isinstance(item, SamplingParams):
            raise TypeError(f"sampling_params[{index}] must be a SamplingParams, got {type(item).__name__}")
    if len(params) != count:
        raise ValueError(f"{len(params)} sampling_params for {count} prompts: give one for all, or one each")
    return list(params)


def make_request(
    request_id: str,
    prompt: Any,
    index: int,
    params: SamplingParams,
    key: tuple[int, int],
    model_config: ModelConfig,
    engine_config: EngineConfig,
    tokenizer: Tokenizer | None,
) -> Request:
    """A checked Request; errors name the prompt's index."""
    text, ids, salt = _tokens(prompt, index, model_config, tokenizer)
    _check_params(params, index, model_config, engine_config)
    stops = stop_token_ids(params, model_config.eos_token_ids)
    if len(stops) > MAX_STOPS:
        raise ValueError(
            f"prompts[{index}] has {len(stops)} stop token ids, end tokens included: at most {MAX_STOPS} are possible"
        )
    if params.stop and tokenizer is None:
        raise ValueError(f"prompts[{index}] has stop strings, but the model has no tokenizer: use stop_token_ids")
    own = (
        key_data(params.key) if params.key is not None else seed_data(params.seed) if params.seed is not None else None
    )
    return Request(
        request_id,
        ids,
        params,
        own or key,
        -1 if own else index,
        stops,
        _limit(len(ids), index, params, engine_config),
        text,
        salt,
    )


def replayed(
    request_id: str, coordinate: Coordinate, model_config: ModelConfig, engine_config: EngineConfig
) -> Request:
    """The request that draws a coordinate's sample again, alone."""
    params, (prompt, sample) = coordinate.request_params(), coordinate.key_folds
    key = key_of(coordinate.key)
    for fold in (prompt, sample):
        key = jax.random.fold_in(key, fold) if fold >= 0 else key
    return make_request(
        request_id, coordinate.prompt_token_ids, 0, params.replace(key=key), (0, 0), model_config, engine_config, None
    )


def extended(
    request_id: str,
    output: RequestOutput,
    params: SamplingParams | None,
    model_config: ModelConfig,
    engine_config: EngineConfig,
    tokenizer: Tokenizer | None,
) -> Request:
    """The request that goes on where the samples of an output stand; those that a stop or an error ended stay as they are."""
    begun = output.outputs[0].coordinate
    assert begun is not None
    params = params or begun.sampling_params
    if params.n != len(output.outputs):
        raise ValueError(
            f"request {output.request_id} has {len(output.outputs)} samples, sampling_params has n={params.n}"
        )
    prompt = {"prompt": output.prompt, "prompt_token_ids": output.prompt_token_ids, "cache_salt": output.cache_salt}
    request = make_request(
        request_id, prompt, 0, params.replace(key=None, seed=None), begun.key, model_config, engine_config, tokenizer
    )
    request.sampling, request.prompt_index = params, begun.key_folds[0]
    request.earlier = [_earlier(sample, request) for sample in output.outputs]
    if params.prompt_logprobs is not None and output.outputs[0].token_ids:  # else they are found now
        if output.prompt_logprobs is None:
            raise ValueError(f"prompt_logprobs is asked for, but request {output.request_id} was begun without")
        request.prompt_logprobs = output.prompt_logprobs
    for sample, earlier in zip(output.outputs, request.earlier, strict=True):
        if params.stop and tokenizer is not None and earlier.finish_reason is None:
            found = Detokenizer(tokenizer, stop=params.stop, min_tokens=params.min_tokens).push(earlier.token_ids)
            if found is not None:
                raise ValueError(
                    f"stop has {found[1]!r}, which ends at token {found[0] - 1} of sample {sample.index}, and that goes on: "
                    "leave it out, or cut the sample there"
                )
    return request


def _earlier(sample: CompletionOutput, request: Request) -> Earlier:
    params = request.sampling
    for name, wanted, have in (
        ("raw_logprobs", params.raw_logprobs, sample.raw_logprobs),
        ("entropy", params.entropy, sample.entropies),
        ("logprobs", params.logprobs is not None, sample.logprobs),
    ):
        if wanted and have is None:
            raise ValueError(
                f"{name} is asked for, but sample {sample.index} was begun without: its earlier tokens have none"
            )
    length = len(request.prompt_token_ids) + len(sample.token_ids)
    ended = sample.finish_reason in ("stop", "error") or length >= request.limit
    versions = [span.version for span in sample.weight_versions for _ in range(span.start, span.stop)]
    floats = lambda values: [] if values is None else values.tolist()
    return Earlier(
        list(sample.token_ids),
        sample.token_logprobs.tolist(),
        versions,
        floats(sample.raw_logprobs),
        floats(sample.entropies),
        list(sample.logprobs or []),
        (sample.finish_reason if sample.finish_reason in ("stop", "error") else "length") if ended else None,
        sample.stop_reason if ended else None,
    )


def check_scored(tokens: Any, mask: Any, config: ModelConfig) -> None:
    """Raises ValueError where tokens and mask are no batch of sequences. Values are looked at where they are known: not inside jit."""
    if tokens.ndim != 2 or tokens.shape != mask.shape or 0 in tokens.shape:
        raise ValueError(f"tokens and mask must have one shape [B, T], got {list(tokens.shape)} and {list(mask.shape)}")
    if not jnp.issubdtype(tokens.dtype, jnp.integer) or mask.dtype != bool:
        raise ValueError(f"tokens must be integers and mask booleans, got {tokens.dtype} and {mask.dtype}")
    if isinstance(tokens, Tracer) or isinstance(mask, Tracer):
        return
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    wrong = mask & ((tokens < 0) | (tokens >= config.vocab_size))
    if wrong.any():
        row, position = (int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"tokens[{row}, {position}] is {int(tokens[row, position])} under the mask: the vocabulary is "
            f"0 … {config.vocab_size - 1}"
        )
    if mask[:, 0].any():
        raise ValueError(
            f"mask[{int(mask[:, 0].argmax())}, 0] is True: the first token has nothing before it that could predict it"
        )


def _tokens(
    prompt: Any, index: int, model_config: ModelConfig, tokenizer: Tokenizer | None
) -> tuple[str | None, list[int], str]:
    """(text, token ids, cache salt) of one prompt."""
    where, salt, special = f"prompts[{index}]", "", False
    if isinstance(prompt, Mapping):
        check_keywords(where, prompt, PROMPT_KEYS)
        special = flag(f"{where}['allow_special_tokens']", prompt.get("allow_special_tokens", False))
        salt = "" if prompt.get("cache_salt") is None else prompt["cache_salt"]
        if not isinstance(salt, str):
            raise ValueError(f"{where}['cache_salt'] must be a string or None, got {salt!r:.80}")
        if prompt.get("prompt_token_ids") is not None:
            return (
                prompt.get("prompt"),
                token_ids_of(prompt["prompt_token_ids"], model_config.vocab_size, f"{where}['prompt_token_ids']"),
                salt,
            )
        if not isinstance(prompt.get("prompt"), str):
            raise ValueError(f"{where} needs 'prompt' or 'prompt_token_ids', got the keys {sorted(prompt)}")
        prompt = prompt["prompt"]
    if not isinstance(prompt, str):
        return None, token_ids_of(prompt, model_config.vocab_size, where), salt
    if not prompt:
        raise ValueError(f"{where} is empty: at least one token is needed to predict the next one")
    if tokenizer is None:
        raise ValueError(
            f"{where} is text, but the model has no tokenizer: give {{'prompt_token_ids': [...]}}, or give the "
            "LLM a folder with a tokenizer.json as tokenizer="
        )
    text = str(prompt)  # a numpy.str_ is a str too, and stays one in outputs otherwise
    return (
        text,
        token_ids_of(tokenizer.encode(text, allow_special_tokens=special), model_config.vocab_size, where),
        salt,
    )


def _check_params(params: SamplingParams, index: int, model_config: ModelConfig, engine_config: EngineConfig) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        if value is not None and value > engine_config.max_logprobs:
            raise ValueError(
                f"{name}={value} of prompts[{index}] is more than max_logprobs={engine_config.max_logprobs} of this engine"
            )
    for name, tokens in (
        ("logit_bias", [token for token, _ in params.biases]),
        ("stop_token_ids", params.stop_token_ids),
    ):
        if any(token >= model_config.vocab_size for token in tokens):
            raise ValueError(
                f"{name} of prompts[{index}] names token {max(tokens)}: the vocabulary is 0 … {model_config.vocab_size - 1}"
            )


def _limit(prompt_length: int, index: int, params: SamplingParams, engine_config: EngineConfig) -> int:
    """Where the sequence ends; raises where the prompt leaves no room, or where it could never fit the pool."""
    if prompt_length >= engine_config.max_model_len:
        raise ValueError(
            f"prompts[{index}] has {prompt_length} tokens, the context is max_model_len={engine_config.max_model_len}: "
            "no room for one token more"
        )
    limit = (
        engine_config.max_model_len
        if params.max_tokens is None
        else min(prompt_length + params.max_tokens, engine_config.max_model_len)
    )
    room = (engine_config.num_pages - 1) * engine_config.page_size
    if params.max_tokens is None and prompt_length < room:
        return min(limit, room)
    if limit > room:
        pages = lambda tokens: -(-tokens // engine_config.page_size)
        raise ValueError(
            f"prompts[{index}] needs {pages(limit)} pages of {engine_config.page_size} tokens, the pool has {engine_config.num_pages - 1}: "
            "raise num_pages, or lower max_tokens"
        )
    return limit
