"""From what a caller gives to a Request: everything is checked here, before anything is allocated."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxengine.base.arguments import as_integer, check_keywords, flag
from jaxengine.base.keys import folded, key_data, key_of, sample_key, seed_data, seeded
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.coordinate import Coordinate
from jaxengine.host.sample import Drawn, Request
from jaxengine.outputs import CompletionOutput, RequestOutput
from jaxengine.sampling_params import MAX_STOPS, SamplingParams, check_token_ids, stop_token_ids
from jaxengine.text.bad_words import with_token_ids
from jaxengine.text.detokenizer import Detokenizer
from jaxengine.text.tokenizer import Tokenizer
from pallas_kernels.numbers import cdiv

PROMPT_KEYS = ("prompt", "prompt_token_ids", "allow_special_tokens", "cache_salt")
FINAL = ("stop", "error")  # finish reasons after which a sample cannot go on


class Prompt(NamedTuple):
    """A prompt as the engine takes it; `text` is None where it came as token ids."""

    text: str | None
    token_ids: list[int]
    cache_salt: str


def prompts_of(prompts: Any) -> list[Any]:
    """A batch of prompts: one string, one list of ids or one dict is a batch of one, as in vLLM."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if isinstance(prompts, (bytes, type(None))) or not hasattr(prompts, "__iter__"):
        raise ValueError(f"prompts must be strings, lists of token ids or dicts, got {type(prompts).__name__}")
    batch = list(prompts)
    return [batch] if batch and all(map(_is_token, batch)) else batch


def _is_token(item: Any) -> bool:
    is_scalar_array = getattr(item, "ndim", None) == 0
    return is_scalar_array or not isinstance(item, str) and not hasattr(item, "__iter__")


def sampling_of(sampling_params: Any, count: int) -> list[SamplingParams]:
    """One SamplingParams a prompt: one for all, or one each."""
    if sampling_params is None:
        sampling_params = SamplingParams()
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * count
    if isinstance(sampling_params, (str, bytes, Mapping)) or not isinstance(sampling_params, Sequence):
        given = type(sampling_params).__name__
        raise TypeError(f"sampling_params must be a SamplingParams or a list of them, got {given}")
    for index, item in enumerate(sampling_params):
        if not isinstance(item, SamplingParams):
            raise TypeError(f"sampling_params[{index}] must be a SamplingParams, got {type(item).__name__}")
    if len(sampling_params) != count:
        raise ValueError(f"{len(sampling_params)} sampling_params for {count} prompts: give one for all, or one each")
    return list(sampling_params)


def own_key(key: Any, sampling: SamplingParams, prompt_index: int, sample_index: int) -> Any:
    """The typed key of one sample of a call under `key`: given to n=1, it draws the same bits again."""
    if sampling.key is None and sampling.seed is None:
        return sample_key(key, prompt_index, sample_index)
    own: Any = sampling.key if sampling.seed is None else seeded(sampling.seed)
    return own if sampling.n == 1 else folded(own, sample_index)


@dataclasses.dataclass(frozen=True)
class Admission:
    """Makes requests for one model and engine.

    Every method raises ValueError, naming the prompt and what is allowed.
    """

    model_config: ModelConfig
    engine_config: EngineConfig
    tokenizer: Tokenizer | None

    def request(
        self, request_id: str, prompt: Any, index: int, sampling: SamplingParams, key: tuple[int, int] = (0, 0)
    ) -> Request:
        """The checked request for `prompts[index]`; `key` are the words of the call's key."""
        given = self._prompt(prompt, index)
        sampling = with_token_ids(sampling, self.tokenizer, f"prompts[{index}]")
        self._check_sampling(sampling, index)
        stops = stop_token_ids(sampling, self.model_config.eos_token_ids)
        if len(stops) > MAX_STOPS:
            raise ValueError(
                f"prompts[{index}] has {len(stops)} stop token ids, end tokens included: at most {MAX_STOPS} are "
                "possible"
            )
        if sampling.stop and self.tokenizer is None:
            raise ValueError(f"prompts[{index}] has stop strings, but the model has no tokenizer: use stop_token_ids")
        own = _own_key_data(sampling)
        return Request(
            request_id=request_id,
            prompt_token_ids=given.token_ids,
            sampling=sampling,
            key=own or key,
            prompt_index=-1 if own else index,
            stop_token_ids=stops,
            limit=self._limit(len(given.token_ids), index, sampling),
            prompt=given.text,
            cache_salt=given.cache_salt,
        )

    def replayed(self, request_id: str, coordinate: Coordinate) -> Request:
        """The request that draws a coordinate's sample again, alone."""
        key = folded(key_of(coordinate.key), *coordinate.key_folds)
        return self.request(request_id, coordinate.prompt_token_ids, 0, coordinate.request_params().replace(key=key))

    def extended(self, request_id: str, output: RequestOutput, sampling: SamplingParams | None) -> Request:
        """The request that goes on where the samples of an output stand; those that a stop or an error ended stay."""
        begun = output.outputs[0].coordinate
        assert begun is not None
        sampling = with_token_ids(sampling or begun.sampling_params, self.tokenizer, "sampling_params")
        if sampling.n != len(output.outputs):
            raise ValueError(
                f"request {output.request_id} has {len(output.outputs)} samples, sampling_params has n={sampling.n}"
            )
        prompt = {"prompt": output.prompt, "prompt_token_ids": output.prompt_token_ids, "cache_salt": output.cache_salt}
        request = self.request(request_id, prompt, 0, sampling.replace(key=None, seed=None), begun.key)
        request.sampling, request.prompt_index = sampling, begun.key_folds[0]
        request.earlier = [_drawn_before(sample, request) for sample in output.outputs]
        if sampling.prompt_logprobs is not None and output.outputs[0].token_ids:  # else they are found now
            if output.prompt_logprobs is None:
                raise ValueError(f"prompt_logprobs is asked for, but request {output.request_id} was begun without")
            request.prompt_logprobs = output.prompt_logprobs
        self._check_stop_strings(request)
        return request

    def _check_stop_strings(self, request: Request) -> None:
        """Raises where a sample that goes on has a stop string already."""
        sampling = request.sampling
        if not sampling.stop or self.tokenizer is None:
            return
        for index, drawn in enumerate(request.earlier):
            if drawn.finish_reason is not None:
                continue
            detokenizer = Detokenizer(self.tokenizer, stop=tuple(sampling.stop), min_tokens=sampling.min_tokens)
            found = detokenizer.push(drawn.token_ids)
            if found is not None:
                raise ValueError(
                    f"stop has {found[1]!r}, which ends at token {found[0] - 1} of sample {index}, and that goes on: "
                    "leave it out, or cut the sample there"
                )

    def _prompt(self, prompt: Any, index: int) -> Prompt:
        where, vocab_size = f"prompts[{index}]", self.model_config.vocab_size
        salt, special = "", False
        if isinstance(prompt, Mapping):
            check_keywords(where, prompt, PROMPT_KEYS)
            special = flag(f"{where}['allow_special_tokens']", prompt.get("allow_special_tokens", False))
            salt = _cache_salt(prompt, where)
            if prompt.get("prompt_token_ids") is not None:
                ids = token_ids_of(prompt["prompt_token_ids"], vocab_size, f"{where}['prompt_token_ids']")
                return Prompt(prompt.get("prompt"), ids, salt)
            if not isinstance(prompt.get("prompt"), str):
                raise ValueError(f"{where} needs 'prompt' or 'prompt_token_ids', got the keys {sorted(prompt)}")
            prompt = prompt["prompt"]
        if not isinstance(prompt, str):
            return Prompt(None, token_ids_of(prompt, vocab_size, where), salt)
        if not prompt:
            raise ValueError(f"{where} is empty: at least one token is needed to predict the next one")
        if self.tokenizer is None:
            raise ValueError(
                f"{where} is text, but the model has no tokenizer: give {{'prompt_token_ids': [...]}}, or give the "
                "LLM a folder with a tokenizer.json as tokenizer="
            )
        text = str(prompt)  # a numpy.str_ is a str too, and stays one in outputs otherwise
        ids = self.tokenizer.encode(text, allow_special_tokens=special)
        return Prompt(text, token_ids_of(ids, vocab_size, where), salt)

    def _check_sampling(self, sampling: SamplingParams, index: int) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            self._check_logprobs(name, getattr(sampling, name), index)
        check_token_ids(sampling, self.model_config.vocab_size, f"prompts[{index}]")

    def _check_logprobs(self, name: str, asked: int | None, index: int) -> None:
        given, vocab_size = self.engine_config.max_logprobs, self.model_config.vocab_size
        most = vocab_size if given == -1 else given
        if asked is not None and (vocab_size if asked == -1 else asked) > most:
            advice = f": that is all {vocab_size} tokens, and takes an LLM with max_logprobs=-1" if asked == -1 else ""
            raise ValueError(
                f"{name}={asked} of prompts[{index}] is more than max_logprobs={given} of this engine{advice}"
            )

    def _limit(self, prompt_length: int, index: int, sampling: SamplingParams) -> int:
        """Where the sample ends; raises where the prompt leaves no room, or where it could never fit the pool."""
        config = self.engine_config
        if prompt_length >= config.max_model_len:
            raise ValueError(
                f"prompts[{index}] has {prompt_length} tokens, the context is max_model_len={config.max_model_len}: "
                "no room for one token more"
            )
        room = (config.num_pages - 1) * config.page_size
        if sampling.max_tokens is None:
            limit = config.max_model_len if prompt_length >= room else min(config.max_model_len, room)
        else:
            limit = min(prompt_length + sampling.max_tokens, config.max_model_len)
        if limit > room:
            raise ValueError(
                f"prompts[{index}] needs {cdiv(limit, config.page_size)} pages of {config.page_size} tokens, the pool "
                f"has {config.num_pages - 1}: raise num_pages, or lower max_tokens"
            )
        return limit


def token_ids_of(ids: Any, vocab_size: int, where: str) -> list[int]:
    """`ids` as a list of Python ints in [0, vocab_size).

    Integers of any kind, numpy's and JAX's included, are accepted.

    Raises ValueError with the index and the value: a JAX gather would clamp a wrong id and answer garbage.
    """
    array_ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(array_ids, Sequence) or isinstance(array_ids, (str, bytes)):
        raise ValueError(f"{where} must be a list of token ids, got {type(ids).__name__}")
    if len(array_ids) == 0:
        raise ValueError(f"{where} is empty: at least one token is needed to predict the next one")
    tokens = []
    for position, value in enumerate(array_ids):
        token = as_integer(value)
        if token is None:
            raise ValueError(
                f"{where} has {value!r} ({type(value).__name__}) at index {position}: token ids are integers"
            )
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{where} has token id {token} at index {position}: the vocabulary is 0 … {vocab_size - 1}"
            )
        tokens.append(token)
    return tokens


def _cache_salt(prompt: Mapping[str, Any], where: str) -> str:
    salt = "" if prompt.get("cache_salt") is None else prompt["cache_salt"]
    if not isinstance(salt, str):
        raise ValueError(f"{where}['cache_salt'] must be a string or None, got {salt!r:.80}")
    return salt


def _own_key_data(sampling: SamplingParams) -> tuple[int, int] | None:
    """The words of the key that the parameters bring."""
    if sampling.key is not None:
        return key_data(sampling.key)
    return None if sampling.seed is None else seed_data(sampling.seed)


def _drawn_before(sample: CompletionOutput, request: Request) -> Drawn:
    """What an earlier call drew for the sample.

    It has ended where a stop or an error says so, or its limit is reached.
    """
    sampling = request.sampling
    for name, is_wanted, values in (
        ("raw_logprobs", sampling.raw_logprobs, sample.raw_logprobs),
        ("entropy", sampling.entropy, sample.entropies),
        ("logprobs", sampling.logprobs is not None, sample.logprobs),
    ):
        if is_wanted and values is None:
            raise ValueError(
                f"{name} is asked for, but sample {sample.index} was begun without: its earlier tokens have none"
            )
    drawn = Drawn(
        token_ids=list(sample.token_ids),
        logprobs=sample.token_logprobs.tolist(),
        raw_logprobs=[] if sample.raw_logprobs is None else sample.raw_logprobs.tolist(),
        entropies=[] if sample.entropies is None else sample.entropies.tolist(),
        top_logprobs=list(sample.logprobs or []),
    )
    for span in sample.weight_versions:
        drawn.versions += [span.version] * (span.stop - span.start)
    if sample.finish_reason in FINAL:
        drawn.finish_reason, drawn.stop_reason = sample.finish_reason, sample.stop_reason
    elif len(request.prompt_token_ids) + len(sample.token_ids) >= request.limit:
        drawn.finish_reason, drawn.stop_reason = "length", sample.stop_reason
    return drawn
