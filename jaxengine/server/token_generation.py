"""POST /inference/v1/generate: token ids in, token ids out."""

from collections.abc import Iterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxengine.outputs import CompletionDelta, CompletionOutput, RequestDelta, RequestOutput
from jaxengine.server import body, forms
from jaxengine.server.errors import ApiError, json_response
from jaxengine.server.generation import coordinate_chunks, last_chunk
from jaxengine.server.protocol import GenerateRequest, TokenSampling
from jaxengine.server.service import Call, Service
from jaxengine.server.streaming import stream

MODES = (None, "tokens", "text")


async def generate(service: Service, http: HttpRequest) -> Response:
    form = await body.read(http, GenerateRequest, service.config.max_body_bytes)
    service.check_model(form.model)
    if form.output_mode not in MODES:
        raise ApiError(400, f"output_mode must be 'tokens' or 'text', got {form.output_mode!r:.40}", "output_mode")
    given = body.validated(form.sampling_params, TokenSampling, "sampling_params.")
    sampling = service.sampling_params(given.given | {"logprobs": given.logprobs})
    prompt = {"prompt_token_ids": form.token_ids, "cache_salt": form.cache_salt}
    call = await service.call("generate", [prompt], sampling, form.request_id, form.priority)
    answer = _Answer(service, form, call)
    if form.stream:
        return await stream(service, call, http, answer.chunks, answer.last)
    (output,) = await service.outputs(call, http)
    return json_response(answer.whole(output))


class _Answer:
    """One call's answer, whole or in chunks."""

    def __init__(self, service: Service, form: GenerateRequest, call: Call) -> None:
        self._form, self._call = form, call
        self._head = {"request_id": call.name, "model": service.config.model_name, "created": call.created}

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        choices = []
        for sample in output.outputs:
            choice = self._choice(sample)
            if self._form.return_coordinate:
                choice["coordinate"] = forms.coordinate(sample)
            choices.append(choice)
        answer = self._head | {"choices": choices, "usage": forms.usage([output]), "digest": output.digest}
        answer["prompt_logprobs"] = forms.prompt_logprobs(output)
        answer["prompt_token_ids"] = output.prompt_token_ids if self._form.return_token_ids else None
        return answer

    def chunks(self, index: int, delta: RequestDelta) -> Iterator[dict[str, Any]]:
        for new in delta.outputs:
            yield self._head | {"choices": [self._choice(new)]}
        yield from coordinate_chunks(self._form, self._head, self._call, index, delta, {"token_ids": []})

    def last(self, outputs: list[RequestOutput]) -> dict[str, Any] | None:
        return last_chunk(self._form, self._head, outputs)

    def _choice(self, drawn: CompletionDelta | CompletionOutput) -> dict[str, Any]:
        sampling = self._call.sampling
        content = forms.token_content(drawn, sampling.logprobs or 0, sampling.logprob_token_ids)
        choice: dict[str, Any] = {
            "index": drawn.index,
            "token_ids": drawn.token_ids,
            "finish_reason": drawn.finish_reason,
            "stop_reason": drawn.stop_reason,
            "logprobs": content if sampling.tells_logprobs else None,
            "weight_versions": forms.version_spans(drawn),
        }
        return choice | ({"text": drawn.text} if self._form.output_mode == "text" else {})
