"""POST /v1/completions."""

from collections.abc import Iterator, Mapping
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxengine.host.prompts import prompts_of
from jaxengine.outputs import CompletionDelta, CompletionOutput, RequestDelta, RequestOutput
from jaxengine.server import body, forms
from jaxengine.server.errors import ApiError, json_response, refusals
from jaxengine.server.generation import check_named, coordinate_chunks, extras, head, last_chunk, structure_of
from jaxengine.server.protocol import CompletionRequest
from jaxengine.server.service import Call, Service
from jaxengine.server.streaming import stream

MAX_TOKENS = 16  # OpenAI's default


async def completions(service: Service, http: HttpRequest) -> Response:
    form = await body.read(http, CompletionRequest, service.config.max_body_bytes)
    service.check_model(form.model)
    if form.echo and form.stream:
        raise ApiError(400, "echo does not stream: leave stream out", "echo", "unsupported")
    check_named(form, form.wants_logprobs)
    count = 0 if form.logprobs is None else int(form.logprobs)
    # A true asks for the drawn tokens' alone, which are always there; so does a 0.
    likeliest = count if not isinstance(form.logprobs, bool) and count else None
    wants_prompt = form.echo and form.wants_logprobs and form.prompt_logprobs is None
    more: dict[str, Any] = {"prompt_logprobs": likeliest or 0} if wants_prompt else {}
    more |= dict(logprobs=likeliest, max_tokens=MAX_TOKENS if form.max_tokens is None else form.max_tokens)
    sampling = service.sampling_params(form.given | more | structure_of(form))
    call = await service.call("cmpl", _prompts(form), sampling, form.request_id, form.priority)
    answer = _Answer(service, form, call)
    if form.stream:
        return await stream(service, call, http, answer.chunks, answer.last)
    outputs = await service.outputs(call, http)
    choices = [answer.whole(index, output, each) for index, output in enumerate(outputs) for each in output.outputs]
    more = {"choices": choices, "usage": forms.usage(outputs), "system_fingerprint": outputs[0].digest}
    return json_response(answer.head | more)


def _prompts(form: CompletionRequest) -> list[Any]:
    """The prompts of a body, each as the engine's dict. Raises ApiError."""
    if form.prompt is None or isinstance(form.prompt, Mapping | bool | int | float):
        raise ApiError(400, "prompt must be a string, a list of token ids, or a list of either", "prompt")
    with refusals():
        given = prompts_of(form.prompt)
    if not given:
        raise ApiError(400, "prompt is an empty list: give at least one", "prompt")
    if any(isinstance(prompt, Mapping) for prompt in given):
        raise ApiError(400, "prompt must be a string, a list of token ids, or a list of either", "prompt")
    adds = form.add_special_tokens is not False
    text = lambda prompt: {"prompt": prompt, "add_special_tokens": adds}
    each = [text(prompt) if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt in given]
    return [prompt | {"cache_salt": form.cache_salt} for prompt in each]


class _Answer:
    """One call's answer, whole or in chunks."""

    def __init__(self, service: Service, form: CompletionRequest, call: Call) -> None:
        self._form, self._call, self._tokenizer = form, call, service.llm.tokenizer
        self._names = forms.TokenNames(service.llm.tokenizer, form.return_tokens_as_token_ids)
        self._offsets: dict[int, int] = {}  # characters of the tokens of each choice so far
        self._begun: set[int] = set()  # choices that had a chunk
        self.head = head(service, "text_completion", call)

    def whole(self, index: int, output: RequestOutput, sample: CompletionOutput) -> dict[str, Any]:
        """The choice of a sample of the `index`-th prompt."""
        choice = self._choice(index, sample) | {"prompt_logprobs": forms.prompt_logprobs(output)}
        if self._form.echo:
            self._put_prompt_before(choice, output)
        return choice | extras(self._form, sample, output.prompt_token_ids)

    def chunks(self, index: int, delta: RequestDelta) -> Iterator[dict[str, Any]]:
        """Chunks of one choice each."""
        for new in delta.outputs:
            place = self._call.choice(index, new.index)
            prompt = None if place in self._begun else self._call.requests[index].prompt_token_ids
            self._begun.add(place)
            yield self.head | {"choices": [self._choice(index, new) | extras(self._form, new, prompt)]}
        yield from coordinate_chunks(
            self._form, self.head, self._call, index, delta, {"text": "", "finish_reason": None}
        )

    def last(self, outputs: list[RequestOutput]) -> dict[str, Any] | None:
        return last_chunk(self._form, self.head, outputs)

    def _choice(self, index: int, drawn: CompletionDelta | CompletionOutput) -> dict[str, Any]:
        place = self._call.choice(index, drawn.index)
        logprobs = None
        if self._form.wants_logprobs:
            offset = self._offsets.get(place, 0)
            logprobs = self._names.completion(drawn, offset)
            self._offsets[place] = offset + sum(map(len, logprobs["tokens"]))
        return {
            "index": place,
            "text": drawn.text,
            "logprobs": logprobs,
            "finish_reason": drawn.finish_reason,
            "stop_reason": drawn.stop_reason,
        }

    def _put_prompt_before(self, choice: dict[str, Any], output: RequestOutput) -> None:
        """`echo`: the prompt's text, tokens and logprobs come first; a first token has no logprob."""
        tokens = output.prompt_token_ids
        text = output.prompt
        if text is None and self._tokenizer is not None:
            text = self._tokenizer.decode(tokens, skip_special_tokens=False)
        choice["text"] = (text or "") + choice["text"]
        drawn = choice["logprobs"]
        entries = output.prompt_logprobs
        if drawn is None or entries is None:
            return
        names = [self._names(token) for token in tokens]
        own = [entry and forms.number(entry[token].logprob) for token, entry in zip(tokens, entries, strict=True)]
        top = [entry and {self._names(i): forms.number(v.logprob) for i, v in entry.items()} for entry in entries]
        length = sum(map(len, names))
        drawn["text_offset"] = forms.text_offsets(names) + [length + offset for offset in drawn["text_offset"]]
        drawn["tokens"] = names + drawn["tokens"]
        drawn["token_logprobs"] = own + drawn["token_logprobs"]
        drawn["top_logprobs"] = top + drawn["top_logprobs"]
