"""The process of chat_template.py: reads requests as lines of JSON and answers each with a line. Run by its path."""

import contextlib
import functools
import json
import re
import resource
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_MIB = 512  # of address space
ALARM_SECONDS = 10  # for a template, in case that the process that would kill this one is dead
MAX_REASON = 2_000  # characters


class Generation(Extension):
    """`{% generation %}` marks the assistant's text for trainers and changes nothing in it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Refusal(TemplateError):
    """The template called raise_exception."""


def main() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _bound_memory()
    _say({})
    for line in sys.stdin.buffer:
        signal.alarm(ALARM_SECONDS)
        reply = _answer(line)
        signal.alarm(0)
        _say(reply)


def _bound_memory() -> None:
    with contextlib.suppress(ValueError):  # macOS refuses it, and an administrator's limit may be lower
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MIB << 20, MEMORY_MIB << 20))


def _say(reply: dict[str, str]) -> None:
    sys.stdout.buffer.write(json.dumps(reply, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    sys.stdout.buffer.flush()


def _answer(line: bytes) -> dict[str, str]:
    doing = "cannot be compiled"
    try:
        request = json.loads(line)
        template = _compiled(request["source"])
        doing = "failed"
        text = template.render(request["variables"])
        if len(text) > request["max_characters"]:
            raise SecurityError(f"it makes a text of more than {request['max_characters']} characters")
        return {"text": text}
    except (MemoryError, SecurityError) as error:
        _compiled.cache_clear()  # what it holds may be large
        reason = (
            f"was stopped: {error}" if str(error) else f"was stopped: it takes more than {MEMORY_MIB} MiB of memory"
        )
    except Refusal as error:
        reason = f"refused the messages: {error}"
    except TemplateSyntaxError as error:
        reason = f"is not valid, line {error.lineno}: {error.message}"
    except Exception as error:  # a template is somebody else's program: it may raise anything
        reason = f"{doing}, {type(error).__name__}: {error}"
    return {"error": reason[:MAX_REASON]}


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(source)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers' own, without HTML escapes. Noncharacters stay, because they guard a control token's spelling."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if not ensure_ascii:
        return text
    return re.sub("[^\x00-\x7f\ufdd0-\ufdef]", lambda match: json.dumps(match[0])[1:-1], text)


def _raise_exception(message: Any) -> None:
    raise Refusal(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


if __name__ == "__main__":
    main()
