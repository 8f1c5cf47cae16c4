"""POST /tokenize and /detokenize."""

import asyncio

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from jaxengine.host.prompts import token_ids_of
from jaxengine.server import body
from jaxengine.server.chat import render
from jaxengine.server.errors import ApiError, json_response, refusals
from jaxengine.server.protocol import DetokenizeRequest, TokenizeRequest
from jaxengine.server.service import Service
from jaxengine.text.tokenizer import Tokenizer


async def tokenize(service: Service, http: HttpRequest) -> Response:
    form = await body.read(http, TokenizeRequest, service.config.max_body_bytes)
    service.check_model(form.model)
    tokenizer = _tokenizer(service)
    if (form.prompt is None) == (form.messages is None):
        raise ApiError(400, "give prompt or messages, one of them", "prompt")
    if form.messages is not None:
        tokens = (await render(service, form))["prompt_token_ids"]
    else:
        adds = form.add_special_tokens is not False
        with refusals():
            tokens = await asyncio.to_thread(tokenizer.encode, form.prompt or "", add_special_tokens=adds)
    answer = {"count": len(tokens), "max_model_len": service.max_model_len, "tokens": tokens}
    if form.return_token_strs:
        answer["token_strs"] = [tokenizer.token_text(token) for token in tokens]
    return json_response(answer)


async def detokenize(service: Service, http: HttpRequest) -> Response:
    form = await body.read(http, DetokenizeRequest, service.config.max_body_bytes)
    service.check_model(form.model)
    tokenizer = _tokenizer(service)
    with refusals():
        tokens = token_ids_of(form.tokens, service.llm.config.vocab_size, "tokens") if form.tokens else []
    text = await asyncio.to_thread(tokenizer.decode, tokens, skip_special_tokens=False)
    return json_response({"prompt": text})


def _tokenizer(service: Service) -> Tokenizer:
    if service.llm.tokenizer is None:
        raise ApiError(400, "the model has no tokenizer: give and take token ids", code="no_tokenizer")
    return service.llm.tokenizer
