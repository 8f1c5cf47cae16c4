"""What a server is started with."""

import dataclasses
from pathlib import Path

from jaxengine.text.tool_calls import TOOL_FORMS

TOOL_PARSERS = ("auto", *TOOL_FORMS)
REASONING_PARSERS = ("auto", "think", "none")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Name, place, keys and limits of a server. Raises ValueError where others could reach it without a key.

    `api_key` opens what reads and generates, `admin_key` that and what pauses, empties and changes the engine, which is
    off without one. Weights are read from folders inside `weights_root` alone.
    """

    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    admin_key: str | None = None
    weights_root: Path | None = None
    max_body_bytes: int = 16 * 1024 * 1024
    max_open_requests: int = 1024  # HTTP requests that are read or answered at once
    max_samples: int = 4096  # prompts times n of one HTTP request
    drain_seconds: int = 30  # how long requests may go on after SIGTERM
    tool_call_parser: str = "auto"  # one of TOOL_PARSERS; auto: by the chat template
    reasoning_parser: str = "auto"  # one of REASONING_PARSERS; auto: by the chat template

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_open_requests", "max_samples", "drain_seconds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name, known in (("tool_call_parser", TOOL_PARSERS), ("reasoning_parser", REASONING_PARSERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if "" in (self.api_key, self.admin_key):
            raise ValueError("api_key and admin_key must not be empty: leave a key out where none is wanted")
        if self.api_key is None and self.host not in LOOPBACK:
            raise ValueError(
                f"host={self.host!r} lets other machines in, and there is no key: give --api-key, or stay at 127.0.0.1"
            )
