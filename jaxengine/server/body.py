"""A request's body: read up to a limit, parsed, its fields known by name."""

import json
from typing import Any, NoReturn, TypeVar

import pydantic
from starlette.requests import Request

from jaxengine.base.arguments import nearest
from jaxengine.server.errors import ApiError
from jaxengine.server.protocol import IGNORED, UNSUPPORTED

M = TypeVar("M", bound=pydantic.BaseModel)
NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})  # values of an unsupported field that ask for nothing


async def read(request: Request, form: type[M], limit: int) -> M:
    """The body as `form`; an empty one is an empty object. Raises ApiError."""
    return parse(await _bytes(request, limit), form)


def parse(body: bytes, form: type[M]) -> M:
    try:
        value = json.loads(body or b"{}", parse_constant=_no_number)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(value).__name__}", code="invalid_json")
    return validated(value, form)


def validated(value: dict[str, Any], form: type[M], where: str = "") -> M:
    """A JSON object as `form`, every field known."""
    known = form.model_fields.keys()
    for name in [name for name in value if name not in known]:
        if name in UNSUPPORTED and value[name] not in NOTHING:
            raise ApiError(400, f"{where}{name} is not supported: {UNSUPPORTED[name]}", name, "unsupported")
        if name not in UNSUPPORTED and name not in IGNORED:
            hint = nearest(name, known) or f". Known are: {', '.join(known)}"
            raise ApiError(400, f"{where}{name:.80} is no known field{hint}", name[:80], "unknown_field")
    try:
        return form.model_validate({name: value[name] for name in value if name in known})
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"][:1]))
        raise ApiError(400, f"{where}{place}: {first['msg']}, got {first['input']!r:.80}", place) from None


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


async def _bytes(request: Request, limit: int) -> bytes:
    """The body. Raises ApiError as soon as it is known to be longer than `limit`."""
    too_long = ApiError(413, f"the body is longer than {limit} bytes", code="body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_long
    body = bytearray()
    async for chunk in request.stream():
        if len(body) + len(chunk) > limit:
            raise too_long
        body += chunk
    return bytes(body)
