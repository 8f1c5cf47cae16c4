"""Who may come in: keys, web pages, and how many requests at once. Runs before a byte of a body is read."""

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxengine.server.errors import ApiError, too_many
from jaxengine.server.settings import LOOPBACK, ServerConfig

PUBLIC = frozenset({"/health", "/liveness"})
ADMIN = frozenset({
    "/pause", "/resume", "/abort_requests", "/reset_prefix_cache", "/sleep", "/wake_up", "/init_weight_transfer_engine",
    "/start_weight_update", "/update_weights", "/finish_weight_update", "/update_weights_from_disk",
})  # fmt: skip


class Gate:
    """ASGI middleware. Every path but PUBLIC needs the key, also those that do not exist; ADMIN needs the admin's."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app, self._config = app, config
        self._keys = [_digest(key) for key in (config.api_key, config.admin_key) if key is not None]
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_public = scope["path"] in PUBLIC
        try:
            if not is_public:
                self._check(scope["path"], Headers(scope=scope))
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        self._num_open += not is_public
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_open -= not is_public

    def _check(self, path: str, headers: Headers) -> None:
        """Raises ApiError where the request may not go on."""
        config = self._config
        if config.api_key is None and "origin" in headers and path not in ADMIN:
            raise ApiError(403, "a web page asks, and this server has no key: start it with --api-key", code="origin")
        if config.api_key is None and _host(headers) not in LOOPBACK and path not in ADMIN:
            message = "a web page's name may have been made to lead here, and this server has no key: ask 127.0.0.1, "
            raise ApiError(403, message + f"not {_host(headers)!r:.80}, or start it with --api-key", code="host")
        given = _bearer(headers)
        if path in ADMIN:
            if config.admin_key is None:
                raise ApiError(403, f"{path} is off: start the server with --admin-key", code="no_admin_key")
            if not _is_one_of(given, [_digest(config.admin_key)]):
                raise _unauthorized("this route needs the admin key as a bearer token")
        elif config.api_key is not None and not _is_one_of(given, self._keys):
            raise _unauthorized("this server needs its key as a bearer token")
        if self._num_open >= config.max_open_requests:
            raise too_many(f"{self._num_open} requests are open, at most {config.max_open_requests} may be")


def _bearer(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


def _host(headers: Headers) -> str:
    """The name that the client asked, without a port and an address's brackets."""
    name, colon, port = headers.get("host", "").rpartition(":")
    return (name if colon and port.isdecimal() else headers.get("host", "")).strip("[]").lower()


def _digest(key: str) -> bytes:
    """Digests have one length, so that comparing them tells nothing of the key's."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _is_one_of(given: str | None, digests: list[bytes]) -> bool:
    """In a time that does not depend on what is given."""
    found = [hmac.compare_digest(_digest(given or ""), digest) for digest in digests]
    return given is not None and any(found)


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
