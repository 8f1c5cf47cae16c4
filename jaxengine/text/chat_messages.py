"""What a chat is given, as plain JSON values that a template may see. Errors name the place."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MAX_DEPTH = 64  # of lists and objects in a message
_ROLE = re.compile("[A-Za-z][A-Za-z0-9_-]{0,63}")


def messages_of(messages: Any, json_arguments: bool = False) -> list[dict[str, Any]]:
    """Plain copies, in the form that templates expect, which is vLLM's.

    Keys that hold None and empty lists of tool calls are left out, `content` is always text (parts are joined by
    newlines, none at all is ""), and the `arguments` of a tool call are an object where OpenAI's form has its JSON.
    With `json_arguments` they are JSON, as it was given.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise ValueError(f'messages must be a list of {{"role": …, "content": …}}, one at least, got {messages!r:.80}')
    return [_message(message, f"messages[{index}]", json_arguments) for index, message in enumerate(messages)]


def _message(message: Any, where: str, json_arguments: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f'{where} must be {{"role": …, "content": …}}, got {message!r:.80}')
    copy = {key: value for key, value in plain(message, where).items() if value is not None}
    role, content = copy.get("role"), copy.setdefault("content", "")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise ValueError(f"{where}.role must be a word of at most 64 letters, digits, - and _, got {role!r:.80}")
    if isinstance(content, list):
        copy["content"] = "\n".join(_part_text(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    elif not isinstance(content, str):
        raise ValueError(
            f'{where}.content must be a string or a list of {{"type": "text", "text": …}}, got {content!r:.80}'
        )
    if isinstance(calls := copy.get("tool_calls"), list):
        named = [(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
        copy["tool_calls"] = [_tool_call(call, place, json_arguments) for call, place in named]
        if not calls:
            del copy["tool_calls"]
    return copy


def _tool_call(call: Any, where: str, json_arguments: bool) -> Any:
    """The call with its arguments as an object; "", "null" and None are the call without any."""
    if not isinstance(call, dict):
        raise ValueError(f'{where} must be {{"type": "function", "function": …}}, got {call!r:.80}')
    if isinstance(function := call.get("function"), dict):
        return call | {"function": _with_arguments(function, f"{where}.function", json_arguments)}
    return _with_arguments(call, where, json_arguments) if "arguments" in call else call


def _with_arguments(function: dict[str, Any], where: str, json_arguments: bool) -> dict[str, Any]:
    given, where = function.get("arguments"), f"{where}.arguments"
    try:
        arguments = json.loads(given.strip() or "null") if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} must be an object or its JSON, got {given!r:.80}: {error}") from None
    if isinstance(given, str) and not isinstance(arguments, dict | None):
        raise ValueError(f"{where} must be an object or its JSON, got {given!r:.80}")
    arguments = {} if arguments is None else plain(arguments, where)
    if json_arguments:
        arguments = given if isinstance(given, str) else json.dumps(arguments, ensure_ascii=False)
    return function | {"arguments": arguments}


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f'{where} must be {{"type": "text", "text": …}}, got {part!r:.80}: the engine takes text only')
    return part["text"]


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of JSON values alone, so that a template can reach no object's methods."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{where} is nested in more than {MAX_DEPTH} lists and objects")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        check_characters(value, where)
        return str.__str__(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {
            plain(key, f"a key of {where}"): plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise ValueError(f"{where} must be a JSON value, got {value!r:.80} ({type(value).__name__})")


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has a lone surrogate, U+{ord(text[error.start]):04X}, at position {error.start}: "
            "it is half a character and has no tokens"
        ) from None
