"""What the routes that generate share; the first two are OpenAI's."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxengine.outputs import CompletionDelta, CompletionOutput, RequestDelta, RequestOutput
from jaxengine.server import forms
from jaxengine.server.errors import ApiError
from jaxengine.server.protocol import ChatRequest, CompletionRequest, Generating
from jaxengine.server.service import Call, Service

Form = ChatRequest | CompletionRequest
Drawn = CompletionDelta | CompletionOutput


def structure_of(form: Form) -> dict[str, Any]:
    """`structured_outputs` as `response_format` asks for them, nothing where it does not. Raises ApiError."""
    given = form.response_format or {"type": "text"}
    kind, described = given.get("type"), given.get("json_schema")
    if kind == "text":
        return {}
    if form.structured_outputs is not None:
        raise ApiError(400, "give response_format or structured_outputs, not both", "response_format")
    if kind == "json_object":
        return {"structured_outputs": {"json_object": True}}
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if kind != "json_schema" or not isinstance(schema, Mapping):
        message = (
            'response_format must be {"type": "text"}, {"type": "json_object"} or {"type": '
            f'"json_schema", "json_schema": {{"schema": …}}}}, got {given!r:.80}'
        )
        raise ApiError(400, message, "response_format")
    return {"structured_outputs": {"json": schema}}


def check_named(form: Form, wants_logprobs: bool) -> None:
    """Raises ApiError where the logprobs of named tokens are asked for, and the answer has no place for them."""
    if form.logprob_token_ids and not wants_logprobs:
        raise ApiError(400, "logprob_token_ids takes logprobs beside it", "logprob_token_ids")


def head(service: Service, kind: str, call: Call) -> dict[str, Any]:
    """What every chunk of an answer has."""
    return {"id": call.name, "object": kind, "created": call.created, "model": service.config.model_name}


def extras(form: Form, drawn: Drawn, prompt_token_ids: list[int] | None) -> dict[str, Any]:
    """What a choice has where it was asked for: token ids, the versions of the weights, the coordinate."""
    more: dict[str, Any] = {}
    if form.return_token_ids:
        more["token_ids"] = drawn.token_ids
        more["weight_versions"] = forms.version_spans(drawn)
        if prompt_token_ids is not None:
            more["prompt_token_ids"] = prompt_token_ids
    if form.return_coordinate and isinstance(drawn, CompletionOutput):
        more["coordinate"] = forms.coordinate(drawn)
    return more


def coordinate_chunks(
    form: Generating, head: dict[str, Any], call: Call, index: int, delta: RequestDelta, empty: dict
) -> Iterator[dict[str, Any]]:
    """A chunk for each sample of the `index`-th prompt that has ended, where coordinates were asked for: a choice that
    gained nothing, `empty` in the route's own form, and the coordinate.
    """
    if delta.output is None or not form.return_coordinate:
        return
    for sample in delta.output.outputs:
        choice = {"index": call.choice(index, sample.index)} | empty
        yield head | {"choices": [choice | {"coordinate": forms.coordinate(sample)}]}


def last_chunk(form: Generating, head: dict[str, Any], outputs: list[RequestOutput]) -> dict[str, Any] | None:
    """The chunk without choices that tells the usage, where it was asked for."""
    if form.stream_options is None or not form.stream_options.include_usage:
        return None
    return head | {"choices": [], "usage": forms.usage(outputs)}
