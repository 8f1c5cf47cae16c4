"""The process of chat_template.py: reads requests as lines of JSON and answers each with a line. Run by its path."""

import contextlib
import functools
import json
import random
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
from jinja2.visitor import NodeTransformer

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


def _say(reply: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(reply, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    sys.stdout.buffer.flush()


def _answer(line: bytes) -> dict[str, Any]:
    doing = "cannot be compiled"
    try:
        request = json.loads(line)
        template = _compiled(request["source"])
        doing = "failed"
        text = _rendered(template, request["variables"], now := datetime.now())
        if len(text) > request["max_characters"]:
            raise SecurityError(f"it makes a text of more than {request['max_characters']} characters")
        return {"text": text, "marked": _marked(request, text, now) if "marks" in request else None}
    except (MemoryError, SecurityError) as error:
        for kept in (_compiled, _compiled_marked):
            kept.cache_clear()  # what they hold may be large
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


def _rendered(template: Template, variables: dict[str, Any], now: datetime) -> str:
    """The template's text. Clock and chance are those of every rendering of one request."""
    random.seed(0)
    return template.render({"strftime_now": now.strftime} | variables)


# -- what the template wrote itself: provenance.py --

SEARCHES = {
    "split", "rsplit", "partition", "rpartition", "startswith", "endswith", "find", "rfind", "index", "rindex", "count",
    "strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "select", "reject", "selectattr", "rejectattr",
}  # fmt: skip
SEARCHES_FIRST = {"replace", "get"}  # these methods and filters look for their first argument, those above for all


class Marks:
    """Stand-ins for what the literals of a template spell of control tokens."""

    def __init__(self, spellings: tuple[str, ...], characters: str, stand_ins: str) -> None:
        self._all = "\0".join(spellings)
        self.spelled = re.compile("|".join(map(re.escape, spellings)) or "(?!)")
        self._beginnings = {text[:cut] for text in spellings for cut in range(1, len(text))}
        self._endings = {text[cut:] for text in spellings for cut in range(1, len(text))}
        self._longest = max(map(len, spellings), default=0)
        self._marked = str.maketrans(characters, stand_ins)
        self._restored = str.maketrans(stand_ins, characters)
        self._stand_in = f"[{re.escape(stand_ins)}]" if stand_ins else "(?!)"

    def literal(self, text: str) -> str:
        """Marks control tokens, and at its ends parts of one that other parts may complete."""
        text = self.spelled.sub(self._of_match, text)
        lengths = range(min(self._longest - 1, len(text)), 0, -1)
        end = next((length for length in lengths if _is_part(text[-length:], self._beginnings)), 0)
        text = text[: len(text) - end] + text[len(text) - end :].translate(self._marked)
        start = next((length for length in lengths if _is_part(text[:length], self._endings)), 0)
        return text[:start].translate(self._marked) + text[start:]

    def words(self, text: str, words: set[str]) -> str:
        """Marks words, roles among them, that stand between parts which the template wrote: '<|' + role + '|>'."""
        inner = [word for word in words if word in self._all]
        pattern = f"(?<={self._stand_in})(?:{'|'.join(map(re.escape, inner)) or '(?!)'})(?={self._stand_in})"
        return re.sub(pattern, self._of_match, text)

    def restored(self, text: str) -> str:
        return text.translate(self._restored)

    def _of_match(self, match: re.Match[str]) -> str:
        return match[0].translate(self._marked)


def _is_part(text: str, parts: set[str]) -> bool:
    """Whether it is one, and no mere letters, which any word may begin or end with."""
    return text in parts and re.fullmatch(r"\w*", text) is None


class Marker(NodeTransformer):
    """Marks the literals of a template: all, or all but those that it looks for in a text."""

    def __init__(self, marks: Marks, but_searched: bool) -> None:
        self._marks, self._but_searched = marks, but_searched
        self.words: set[str] = set()

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        node.data = self._marks.literal(node.data)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, str):
            self.words.update(re.findall(r"\A[\w-]+\Z", node.value))
            node.value = self._marks.literal(node.value)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node.node = self.visit(node.node)
        if not isinstance(node.arg, nodes.Const):  # else it is the name of a field
            node.arg = self.visit(node.arg)
        return node

    def visit_Compare(self, node: nodes.Compare | nodes.Test) -> nodes.Node:
        return node if self._but_searched else self.generic_visit(node)

    visit_Test = visit_Compare

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        return self._visit_but_searched(node, getattr(node.node, "attr", ""))

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        return self._visit_but_searched(node, node.name)

    def _visit_but_searched(self, node: nodes.Call | nodes.Filter, name: str) -> nodes.Node:
        searched = len(node.args) if name in SEARCHES else int(name in SEARCHES_FIRST)
        kept, node.args = node.args[:searched], node.args[searched:]
        if not self._but_searched:
            kept = [self.visit(argument) for argument in kept]
        self.generic_visit(node)
        node.args = kept + node.args
        return node


def _marked(request: dict[str, Any], text: str, now: datetime) -> str | None:
    """`text` with stand-ins where the template wrote control tokens; None where there is no telling."""
    given = request["marks"]
    key = tuple(given["spellings"]), given["characters"], given["stand_ins"]
    marks = _marks(*key)
    if not marks.spelled.search(text) and marks.restored(text) == text:
        return text
    variables = request["variables"]
    variables |= {name: marks.literal(token) for name, token in given["named"].items()}
    for but_searched in (True, False):
        template, words = _compiled_marked(request["source"], key, but_searched)
        try:
            marked = marks.words(_rendered(template, variables, now), words.union(given["words"]))
        except (MemoryError, SecurityError):
            raise
        except Exception:  # a literal that it needed as it was
            continue
        if marks.restored(marked) == text:
            return marked
    return None


_marks = functools.lru_cache(maxsize=4)(Marks)


# -- compiling --


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


@functools.lru_cache(maxsize=16)
def _compiled_marked(source: str, key: tuple[Any, ...], but_searched: bool) -> tuple[Template, set[str]]:
    """The template with its literals marked, and the words among them."""
    environment, marker = _environment(), Marker(_marks(*key), but_searched)
    return environment.from_string(marker.visit(environment.parse(source))), marker.words


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception}
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers' own, without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise Refusal(str(message))


if __name__ == "__main__":
    main()
