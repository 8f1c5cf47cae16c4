"""SGLang's POST /generate and /update_weights_from_disk."""

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxengine.host.prompts import prompts_of
from jaxengine.outputs import CompletionOutput, RequestOutput
from jaxengine.server import body, forms, weights
from jaxengine.server.errors import ApiError, json_response, refusals
from jaxengine.server.protocol import SglangGenerate, SglangSampling, SglangWeights
from jaxengine.server.service import Service
from jaxengine.text.grammar import lark_of_ebnf

MAX_NEW_TOKENS = 128  # SGLang's default
# Names that are others here.
OURS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "no_stop_trim": "include_stop_str_in_output",
    "sampling_seed": "seed",
}
STRUCTURES = {"json_schema": "json", "regex": "regex"}


async def generate(service: Service, http: HttpRequest) -> Response:
    """Token ids or text in, one answer for each prompt and sample: a list unless there is one of both."""
    form = await body.read(http, SglangGenerate, service.config.max_body_bytes)
    if form.stream:
        raise ApiError(400, "stream: /v1/completions and /inference/v1/generate stream", "stream", "unsupported")
    if (form.text is None) == (form.input_ids is None):
        raise ApiError(400, "give text or input_ids, one of them", "text")
    given_prompts = form.text if form.text is not None else form.input_ids
    if given_prompts == []:
        raise ApiError(400, "text or input_ids is an empty list: give at least one", "text")
    given = body.validated(form.sampling_params or {}, SglangSampling, "sampling_params.")
    sampling = service.sampling_params(_sampling(given))
    with refusals():
        prompts = prompts_of(given_prompts)
    call = await service.call("sglang", prompts, sampling, form.rid)
    outputs = await service.outputs(call, http)
    answers = [_answer(service, form, output, sample) for output in outputs for sample in output.outputs]
    is_single = isinstance(form.text, str) or form.input_ids is not None and isinstance(form.input_ids[0], int)
    return json_response(answers[0] if is_single and sampling.n == 1 else answers)


async def update_weights_from_disk(service: Service, http: HttpRequest) -> Response:
    """As /update_weights: nothing under way is aborted, and no cached page is read under other weights."""
    form = await body.read(http, SglangWeights, service.config.max_body_bytes)
    number = await weights.from_disk(service, form.model_path, None, form.weight_version)
    message = f"Succeeded to update model weights: version {number}."
    return json_response({"success": True, "message": message, "num_paused_requests": 0})


def _sampling(given: SglangSampling) -> Any:
    """The same under our names."""
    fields = given.model_dump(exclude_none=True)
    structure = {STRUCTURES[name]: fields.pop(name) for name in STRUCTURES if name in fields}
    if "ebnf" in fields:
        structure["grammar"] = _lark(fields.pop("ebnf"))
    fields = {OURS.get(name, name): value for name, value in fields.items()}
    fields.setdefault("max_tokens", MAX_NEW_TOKENS)
    if structure:
        fields["structured_outputs"] = structure
    return fields


def _lark(ebnf: str) -> str:
    try:
        return lark_of_ebnf(ebnf)
    except ValueError as error:
        raise ApiError(400, f"ebnf cannot be read: {error}", "ebnf") from error


def _answer(service: Service, form: SglangGenerate, output: RequestOutput, sample: CompletionOutput) -> dict[str, Any]:
    told = {
        "id": output.request_id,
        "finish_reason": _finish_reason(sample),
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(sample.token_ids),
        "cached_tokens": output.num_cached_tokens,
        "weight_version": service.weights_name,
        "weight_versions": forms.version_spans(sample),
    }
    if form.return_logprob:
        drawn = zip(sample.token_logprobs, sample.token_ids, strict=True)
        told["output_token_logprobs"] = [[forms.number(logprob), token, None] for logprob, token in drawn]
    if form.return_coordinate:
        told["coordinate"] = forms.coordinate(sample)
    return {"text": sample.text, "output_ids": sample.token_ids, "meta_info": told}


def _finish_reason(sample: CompletionOutput) -> dict[str, Any]:
    reason: dict[str, Any] = {"type": sample.finish_reason}
    if sample.finish_reason == "length":
        return reason | {"length": len(sample.token_ids)}
    if sample.finish_reason == "stop":
        matched = sample.stop_reason if sample.stop_reason is not None else sample.token_ids[-1]
        return reason | {"matched": matched}
    return reason
