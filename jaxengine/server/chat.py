"""POST /v1/chat/completions."""

import asyncio
from collections.abc import Iterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxengine.outputs import CompletionDelta, CompletionOutput, RequestDelta, RequestOutput
from jaxengine.server import body, forms
from jaxengine.server.errors import ApiError, json_response, refusals
from jaxengine.server.generation import check_named, coordinate_chunks, extras, head, last_chunk
from jaxengine.server.messages import Messages
from jaxengine.server.protocol import ChatRequest, TokenizeRequest
from jaxengine.server.service import Call, Service
from jaxengine.server.streaming import stream


async def chat(service: Service, http: HttpRequest) -> Response:
    form = await body.read(http, ChatRequest, service.config.max_body_bytes)
    service.check_model(form.model)
    if form.top_logprobs and not form.logprobs:
        raise ApiError(400, "top_logprobs takes logprobs=true beside it", "top_logprobs")
    check_named(form, bool(form.logprobs))
    max_tokens = form.max_tokens if form.max_completion_tokens is None else form.max_completion_tokens
    service.check_room(1, form.n or 1)
    prompt = await render(service, form)
    messages = Messages(service, form, prompt["prompt"])
    how = dict(logprobs=form.top_logprobs or None, max_tokens=max_tokens)
    sampling = service.sampling_params(form.given | how | messages.structure)
    call = await service.call(
        "chatcmpl", [prompt | {"cache_salt": form.cache_salt}], sampling, form.request_id, form.priority
    )
    answer = _Answer(service, form, call, messages)
    if form.stream:
        return await stream(service, call, http, answer.chunks, answer.last)
    (output,) = await service.outputs(call, http)
    return json_response(answer.whole(output))


async def render(service: Service, form: ChatRequest | TokenizeRequest) -> dict[str, Any]:
    """The prompt that the chat template makes of the messages, beside the event loop. Raises ApiError."""
    options = {
        "chat_template": form.chat_template,
        "add_generation_prompt": form.add_generation_prompt,
        "continue_final_message": bool(form.continue_final_message),
        "tools": form.tools or None,
        "chat_template_kwargs": form.chat_template_kwargs,
    }
    with refusals():
        return await asyncio.to_thread(service.llm.chat_prompt, form.messages, options)


class _Answer:
    """One call's answer, whole or in chunks."""

    def __init__(self, service: Service, form: ChatRequest, call: Call, messages: Messages) -> None:
        self._form, self._call, self._messages = form, call, messages
        self._head = head(service, f"chat.completion{'.chunk' if form.stream else ''}", call)
        self._names = forms.TokenNames(service.llm.tokenizer, form.return_tokens_as_token_ids)
        self._begun: set[int] = set()  # choices that had a chunk

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        choices = []
        for sample in output.outputs:
            message = {"role": "assistant"} | self._fields(sample)
            if "tool_calls" in message and not message["content"]:
                message["content"] = None
            choices.append(self._choice(sample) | {"message": message} | extras(self._form, sample, None))
        more = {"prompt_token_ids": output.prompt_token_ids} if self._form.return_token_ids else {}
        answer = self._head | {"choices": choices, "system_fingerprint": output.digest}
        answer["prompt_logprobs"] = forms.prompt_logprobs(output)
        return answer | more | {"usage": forms.usage([output])}

    def chunks(self, index: int, delta: RequestDelta) -> Iterator[dict[str, Any]]:
        """Chunks of one choice each; the first of a choice says whose turn it is."""
        for new in delta.outputs:
            message, prompt = self._fields(new), {}
            if new.index not in self._begun:
                message = {"role": "assistant"} | message
                prompt = {"prompt_token_ids": self._call.requests[index].prompt_token_ids}
            self._begun.add(new.index)
            choice = self._choice(new) | {"delta": message} | extras(self._form, new, None)
            yield self._head | {"choices": [choice]} | (prompt if self._form.return_token_ids else {})
        yield from coordinate_chunks(
            self._form, self._head, self._call, index, delta, {"delta": {}, "finish_reason": None}
        )

    def last(self, outputs: list[RequestOutput]) -> dict[str, Any] | None:
        return last_chunk(self._form, self._head, outputs)

    def _fields(self, drawn: CompletionDelta | CompletionOutput) -> dict[str, Any]:
        parts = self._messages.gained(drawn.index, drawn.text, drawn.finish_reason is not None)
        return self._messages.fields(self._call.name, drawn.index, parts)

    def _choice(self, drawn: CompletionDelta | CompletionOutput) -> dict[str, Any]:
        logprobs = None
        if self._form.logprobs:
            logprobs = self._names.chat(drawn, self._form.top_logprobs or 0, self._call.sampling.logprob_token_ids)
        return {
            "index": drawn.index,
            "logprobs": logprobs,
            "finish_reason": self._messages.finish_reason(drawn.index, drawn.finish_reason),
            "stop_reason": drawn.stop_reason,
        }
