"""From what a caller gives to a Request: everything is checked here, before anything is allocated."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxengine.base.arguments import as_integer, integer, items
from jaxengine.base.keys import folded, key_data, key_of, sample_key, seed_data, seeded
from jaxengine.config import EngineConfig, ModelConfig
from jaxengine.coordinate import Coordinate
from jaxengine.host.prompts import Prompts
from jaxengine.host.sample import Drawn, Request
from jaxengine.outputs import CompletionOutput, Logprob, RequestOutput
from jaxengine.sampling_params import MAX_STOPS, SamplingParams, check_token_ids, stop_token_ids
from jaxengine.text.bad_words import with_token_ids
from jaxengine.text.detokenizer import Detokenizer
from jaxengine.text.grammar import Grammar
from pallas_kernels.numbers import cdiv

MAX_PRIORITY = 2**31 - 1
ON_ERROR = ("refuse", "return")
FINAL = ("stop", "error")  # finish reasons after which a sample cannot go on


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


def priorities_of(priority: Any, count: int) -> list[int]:
    """One priority a prompt: one for all, or one each. Raises ValueError."""
    given = [priority] * count if as_integer(priority) is not None else items("priority", priority, "integers")
    if len(given) != count:
        raise ValueError(f"{len(given)} priorities for {count} prompts: give one for all, or one each")
    return [integer("priority", each, -MAX_PRIORITY, MAX_PRIORITY) for each in given]


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
    prompts: Prompts

    def request(
        self, request_id: str, prompt: Any, index: int, sampling: SamplingParams, key: tuple[int, int] = (0, 0)
    ) -> Request:
        """The checked request for `prompts[index]`; `key` are the words of the call's key."""
        given = self.prompts.prompt(prompt, index)
        token_ids = self._truncated(given.token_ids, sampling)
        sampling = with_token_ids(sampling, self.prompts.tokenizer, f"prompts[{index}]")
        self._check_sampling(sampling, index)
        stops = stop_token_ids(sampling, self.model_config.eos_token_ids)
        if len(stops) > MAX_STOPS:
            raise ValueError(
                f"prompts[{index}] has {len(stops)} stop token ids, end tokens included: at most {MAX_STOPS} are "
                "possible"
            )
        if sampling.stop and self.prompts.tokenizer is None:
            raise ValueError(f"prompts[{index}] has stop strings, but the model has no tokenizer: use stop_token_ids")
        own = _own_key_data(sampling)
        request = Request(
            request_id=request_id,
            prompt_token_ids=token_ids,
            sampling=sampling,
            key=own or key,
            prompt_index=-1 if own else index,
            stop_token_ids=stops,
            limit=self._limit(len(token_ids), index, sampling),
            prompt=given.text,
            cache_salt=given.cache_salt,
            grammar=self._grammar(sampling, index),
        )
        if sampling.max_tokens == 0:
            first = Drawn(finish_reason=None if request.only_scores else "length")
            request.earlier = [first, *(Drawn(finish_reason="length") for _ in range(1, sampling.n))]
        return request

    def request_or_error(
        self, request_id: str, prompt: Any, index: int, sampling: SamplingParams, key: tuple[int, int] = (0, 0)
    ) -> Request:
        """`request`, or in its place one that has ended with finish reason "error", without tokens."""
        try:
            return self.request(request_id, prompt, index, sampling, key)
        except (ValueError, TypeError) as error:
            text = prompt.get("prompt") if isinstance(prompt, Mapping) else prompt
            return _ended(request_id, text if isinstance(text, str) else None, index, sampling, key, str(error))

    def replayed(self, request_id: str, coordinate: Coordinate) -> Request:
        """The request that draws a coordinate's sample again, alone."""
        key = folded(key_of(coordinate.key), *coordinate.key_folds)
        return self.request(request_id, coordinate.prompt_token_ids, 0, coordinate.request_params().replace(key=key))

    def extended(self, request_id: str, output: RequestOutput, sampling: SamplingParams | None) -> Request:
        """The request that goes on where the samples of an output stand; those that a stop or an error ended stay."""
        begun = output.outputs[0].coordinate
        if begun is None:
            raise ValueError(
                f"request {output.request_id} cannot go on, because its sample 0 has no coordinate, which says how it "
                "was drawn (each turn of a conversation with a tool has one of its own): give generate the tokens of "
                "its prompt and sample as prompt_token_ids"
            )
        sampling = with_token_ids(sampling or begun.sampling_params, self.prompts.tokenizer, "sampling_params")
        if sampling.n != len(output.outputs):
            raise ValueError(
                f"request {output.request_id} has {len(output.outputs)} samples, sampling_params has n={sampling.n}"
            )
        if not output.prompt_token_ids:  # its prompt was refused, and `request_or_error` made the output
            reason = str(output.outputs[0].stop_reason)
            return _ended(request_id, output.prompt, begun.key_folds[0], sampling, begun.key, reason)
        prompt = {"prompt": output.prompt, "prompt_token_ids": output.prompt_token_ids, "cache_salt": output.cache_salt}
        plain = sampling.replace(key=None, seed=None, truncate_prompt_tokens=None)
        request = self.request(request_id, prompt, 0, plain, begun.key)
        request.sampling, request.prompt_index = sampling, begun.key_folds[0]
        request.earlier = [_drawn_before(sample, request) for sample in output.outputs]
        is_found_now = not output.outputs[0].token_ids and request.earlier[0].finish_reason is None
        if sampling.prompt_logprobs is not None and not is_found_now:
            if output.prompt_logprobs is None:
                raise ValueError(f"prompt_logprobs is asked for, but request {output.request_id} was begun without")
            request.prompt_logprobs = output.prompt_logprobs
        self._check_stop_strings(request)
        _check_grammar(request)
        return request

    def _check_stop_strings(self, request: Request) -> None:
        """Raises where a sample that goes on has a stop string already."""
        sampling = request.sampling
        if not sampling.stop or self.prompts.tokenizer is None:
            return
        for index, drawn in enumerate(request.earlier):
            if drawn.finish_reason is not None:
                continue
            detokenizer = Detokenizer(self.prompts.tokenizer, stop=tuple(sampling.stop), min_tokens=sampling.min_tokens)
            found = detokenizer.push(drawn.token_ids)
            if found is not None:
                raise ValueError(
                    f"stop has {found[1]!r}, which ends at token {found[0] - 1} of sample {index}, and that goes on: "
                    "leave it out, or cut the sample there"
                )

    def _truncated(self, token_ids: list[int], sampling: SamplingParams) -> list[int]:
        """The last tokens of a prompt, as many as were asked for; -1 leaves room for one token more, as in vLLM."""
        count = sampling.truncate_prompt_tokens
        if count == -1:
            count = min(self.engine_config.max_model_len, self._room) - (sampling.max_tokens != 0)
        return token_ids if count is None else token_ids[-count:]

    def _grammar(self, sampling: SamplingParams, index: int) -> Grammar | None:
        if sampling.structure is None:
            return None
        if self.prompts.tokenizer is None:
            raise ValueError(f"structured_outputs of prompts[{index}] follow text, and the model has no tokenizer")
        return self.prompts.tokenizer.grammars.compiled(sampling.structure)

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

    @property
    def _room(self) -> int:
        """Tokens that the whole pool holds."""
        return (self.engine_config.num_pages - 1) * self.engine_config.page_size

    def _limit(self, prompt_length: int, index: int, sampling: SamplingParams) -> int:
        """Where the sample ends; raises where the prompt leaves no room, or where it could never fit the pool."""
        config, room = self.engine_config, self._room
        if prompt_length + (sampling.max_tokens != 0) > config.max_model_len:
            raise ValueError(
                f"prompts[{index}] has {prompt_length} tokens, the context is max_model_len={config.max_model_len}: "
                "no room for one token more. Shorten it, or have truncate_prompt_tokens=-1 keep what fits; "
                "max_tokens=0 needs no room after the prompt"
            )
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


def _check_grammar(request: Request) -> None:
    """Raises where a sample that goes on has tokens that its grammar does not allow."""
    for index, drawn in enumerate(request.earlier):
        if request.grammar is None or drawn.finish_reason is not None:
            continue
        if error := request.grammar.matcher().after(drawn.token_ids).error:
            raise ValueError(f"structured_outputs do not allow what sample {index} has, which goes on: {error}")


def _own_key_data(sampling: SamplingParams) -> tuple[int, int] | None:
    """The words of the key that the parameters bring."""
    if sampling.key is not None:
        return key_data(sampling.key)
    return None if sampling.seed is None else seed_data(sampling.seed)


def _ended(
    request_id: str, prompt: str | None, index: int, sampling: SamplingParams, key: tuple[int, int], reason: str
) -> Request:
    """The request of a prompt that was refused."""
    own = _own_key_data(sampling)
    return Request(
        request_id=request_id,
        prompt_token_ids=[],
        sampling=sampling,
        key=own or key,
        prompt_index=-1 if own else index,
        stop_token_ids=frozenset(),
        limit=0,
        prompt=prompt,
        earlier=[Drawn(finish_reason="error", stop_reason=reason) for _ in range(sampling.n)],
    )


def _with_named(sample: CompletionOutput, sampling: SamplingParams) -> list[dict[int, Logprob]] | None:
    """The sample's logprobs, where each token's have the named tokens' among them."""
    named = set(sampling.logprob_token_ids)
    entries = sample.logprobs
    return entries if entries is not None and all(named <= entry.keys() for entry in entries) else None


def _drawn_before(sample: CompletionOutput, request: Request) -> Drawn:
    """What an earlier call drew for the sample.

    It has ended where a stop or an error says so, or its limit is reached.
    """
    sampling = request.sampling
    for name, is_wanted, values in (
        ("raw_logprobs", sampling.raw_logprobs, sample.raw_logprobs),
        ("entropy", sampling.entropy, sample.entropies),
        ("logprobs", sampling.logprobs is not None, sample.logprobs),
        ("logprob_token_ids", bool(sampling.logprob_token_ids), _with_named(sample, sampling)),
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
        return drawn
    is_scored_now = request.only_scores and sample.index == 0 and not sample.token_ids
    if len(request.prompt_token_ids) + len(sample.token_ids) >= request.limit and not is_scored_now:
        drawn.finish_reason, drawn.stop_reason = "length", sample.stop_reason
    return drawn
