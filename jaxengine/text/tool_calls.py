"""Tools: the forms in which models call them, read as the text grows, and the grammar of a call."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxengine.text.answer_parts import Part, Said, ToolCall, held_back

MAX_TOOLS = 128
_NAME = re.compile("[A-Za-z0-9_.-]{1,64}")


class ToolForm(NamedTuple):
    """How a family of models writes calls. With an empty `opens` a call is an object at the beginning of the answer."""

    opens: str
    closes: str
    arguments: str  # the key of the arguments


TOOL_FORMS = {
    "hermes": ToolForm("<tool_call>", "</tool_call>", "arguments"),  # Qwen's too
    "llama3_json": ToolForm("", ";", "parameters"),
}
PYTHON_TAG = "<|python_tag|>"  # which Llama may write before an object


def form_of_template(has: Callable[[str], bool]) -> str:
    """The name of the form that a chat template has calls in; `has` says whether a text is in the template."""
    is_llama = has("python_tag") or has("ipython")
    return "llama3_json" if is_llama and not has("<tool_call>") else "hermes"


class ToolReader:
    """Finds the calls in a text that grows. What looks like one and is none is said, letter by letter."""

    def __init__(self, form: ToolForm) -> None:
        self._form = form
        self._pending = ""
        self._object: _ObjectEnd | None = None  # while one is read
        self._is_after_call = self._has_closed = False
        self._only_says = False

    def push(self, text: str) -> list[Part]:
        """The parts that `text` completes: what is said at once, a call when its object has ended."""
        self._pending += text
        parts: list[Part] = []
        while not self._only_says:
            before = len(self._pending), self._object
            parts += self._object_read() if self._object is not None else self._call_sought()
            if before == (len(self._pending), self._object):
                return parts
        said, self._pending = self._pending, ""
        return [*parts, Said(said)] if said else parts

    def finish(self) -> list[Part]:
        """What was held back; no text follows."""
        rest, self._pending, self._object = self._pending, "", None
        is_nothing = not rest or self._is_after_call and not rest.strip()
        return [] if is_nothing else [Said(rest)]

    def _call_sought(self) -> list[Part]:
        """What is said before the next call, which begins with `opens`."""
        if self._is_after_call and not self._skip_what_closes():
            return []
        opens = self._form.opens
        if not opens:
            return self._object_sought()
        found = self._pending.find(opens)
        if found >= 0:
            begun = self._pending[found + len(opens) :].lstrip()
            if not begun:
                return self._say(found)
            if begun[0] == "{":
                self._object = _ObjectEnd(self._pending.index("{", found + len(opens)))
                return self._say(found)
            return self._say(found + len(opens))
        return self._say(len(self._pending) - held_back(self._pending, opens))

    def _object_sought(self) -> list[Part]:
        begun = self._pending.lstrip().removeprefix(PYTHON_TAG).lstrip()
        if begun.startswith("{"):
            self._object = _ObjectEnd(len(self._pending) - len(begun))
        elif begun and not PYTHON_TAG.startswith(begun):
            self._only_says = True
        return []

    def _skip_what_closes(self) -> bool:
        """Whether the text after a call has begun; white space and the closing tag belong to the call."""
        rest, closes = self._pending.lstrip(), self._form.closes
        if self._has_closed:
            self._pending = rest
        elif rest.startswith(closes):
            self._pending, self._has_closed = rest[len(closes) :].lstrip(), True
        elif rest and not closes.startswith(rest):
            self._has_closed = True
        self._is_after_call = not self._pending.strip() or not self._has_closed
        return not self._is_after_call

    def _say(self, count: int) -> list[Part]:
        said, self._pending = self._pending[:count], self._pending[count:]
        if self._object is not None:
            self._object.move(-count)
        return [Said(said)] if said else []

    def _object_read(self) -> list[Part]:
        assert self._object is not None
        stop = self._object.find(self._pending)
        if stop is None:
            return []
        call = _call(self._pending[self._object.start : stop], self._form)
        if call is None:
            self._object, self._only_says = None, not self._form.opens
            return self._say(stop)
        self._object, self._pending = None, self._pending[stop:]
        self._is_after_call, self._has_closed = True, False
        return [call]


class _ObjectEnd:
    """Where a JSON object ends in a text that grows; each character is looked at once."""

    def __init__(self, start: int) -> None:
        self.start = self._place = start
        self._depth, self._in_string, self._escaped = 0, False, False

    def move(self, count: int) -> None:
        """The text in front of it has so many characters more."""
        self.start += count
        self._place += count

    def find(self, text: str) -> int | None:
        """The index after its last character, None where it goes on."""
        for place in range(self._place, len(text)):
            character = text[place]
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = not self._escaped and character == "\\"
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place + 1
        self._place = len(text)
        return None


def _call(text: str, form: ToolForm) -> ToolCall | None:
    """The call that an object is, None where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name, arguments = found.get("name"), found.get(form.arguments, found.get("arguments", {}))
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        return None
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


# -- calls that have to be made ----------------------------------------------------------------------------------------


def tools_of(tools: Sequence[Any]) -> dict[str, Mapping[str, Any]]:
    """The schema of each tool's arguments, by its name. Raises ValueError naming the tool that is wrong."""
    if len(tools) > MAX_TOOLS:
        raise ValueError(f"tools has {len(tools)} tools, at most {MAX_TOOLS} are possible")
    found: dict[str, Mapping[str, Any]] = {}
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping):
            raise ValueError(
                f'tools[{index}] must be {{"type": "function", "function": {{"name": …}}}}, got {tool!r:.80}'
            )
        name, parameters = function.get("name"), function.get("parameters") or {"type": "object"}
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name in found:
            raise ValueError(f"tools[{index}].function.name must be a word of its own, got {name!r:.80}")
        if not isinstance(parameters, Mapping):
            raise ValueError(f"tools[{index}].function.parameters must be a JSON schema, got {parameters!r:.80}")
        found[name] = parameters
    return found


def grammar_of_calls(form: ToolForm, tools: Mapping[str, Mapping[str, Any]], *, several: bool, before: str = "") -> str:
    """A grammar in Lark's form that is followed by calls of these tools alone, after the text `before`."""
    each = {"anyOf": [_schema(name, parameters, form) for name, parameters in tools.items()]}
    object_ = f"%json {json.dumps(each | {'x-guidance': {'whitespace_pattern': '[ ]?'}})}"
    opens, closes = (f'"{form.opens}\\n" call "\\n{form.closes}"', '"\\n"') if form.opens else ("call", '"; "')
    more = f" ({closes} one)*" if several else ""
    return f"start: {json.dumps(before) + ' ' if before else ''}one{more}\none: {opens}\ncall: {object_}\n"


def _schema(name: str, parameters: Mapping[str, Any], form: ToolForm) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, form.arguments: dict(parameters)},
        "required": ["name", form.arguments],
        "additionalProperties": False,
    }
