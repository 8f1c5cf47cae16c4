"""What a client is told where something is wrong, in OpenAI's form, and JSON answers."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.responses import Response

from jaxengine.server.protocol import SAMPLING_FIELDS

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    501: "not_implemented_error",
    503: "service_unavailable_error",
}
NAMED = SAMPLING_FIELDS | {"logprobs", "messages", "priority", "tools"}
_FIELD = re.compile(r"[a-z][a-z_]*")


class ApiError(Exception):
    """An answer other than 200. `param` is the field that is wrong, `code` a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error as JSON; `detail` is where vLLM's control routes have it."""
        kind = TYPES.get(self.status, "internal_error")
        message = str(self)
        error = {"message": message, "type": kind, "param": self.param, "code": self.code or self.status}
        return {"error": error, "detail": message}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def too_many(message: str) -> ApiError:
    """429: the client is to come again."""
    return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})


def json_text(value: Any) -> str:
    """JSON in ASCII, since a client's own text may hold half a surrogate pair. A float32 reads back as its bits."""
    return json.dumps(value, allow_nan=False, separators=(",", ":"))


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json_text(value), status, headers, media_type="application/json")


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """What the engine refuses inside the block is the client's error, 400, and names the field."""
    try:
        yield
    except (ValueError, TypeError, OverflowError) as error:
        message = str(error)
        field = _FIELD.match(message)  # every error begins with the name of what is wrong
        raise ApiError(400, message, param=field[0] if field and field[0] in NAMED else None) from error
