"""Python functions as a model's tools: their descriptions, and calls of them that a model wrote."""

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxengine.text.answer_parts import ToolCall
from jaxengine.text.tool_calls import tools_of

_TYPES = {  # JSON's names for the types of what json.loads gives
    str: {"string"},
    int: {"integer", "number"},
    float: {"number"},
    bool: {"boolean"},
    list: {"array"},
    dict: {"object"},
    type(None): {"null"},
}
_KNOWN = set().union(*_TYPES.values())


@dataclasses.dataclass(frozen=True)
class Function:
    """`call(**arguments)`, and the description of it that the chat template is given as one of its `tools`.

    `description` is in OpenAI's form, `{"type": "function", "function": {"name": …, "parameters": …}}`. What the call
    returns is the answer, text as it is and other values as JSON. Where it raises ValueError, the error's text is the
    answer; other errors end the run.
    """

    call: Callable[..., Any]
    description: Mapping[str, Any]

    def __post_init__(self) -> None:
        inspect.signature(self.call)  # raises here for what has none, as some builtins, and not in a run

    @property
    def properties(self) -> Mapping[str, Any]:
        """The schema of each argument, by its name."""
        return (self.description["function"].get("parameters") or {}).get("properties") or {}

    def answer(self, arguments: Mapping[str, Any]) -> str:
        """The answer to a call. Raises ValueError for arguments of other names or types than the description's."""
        for name, value in arguments.items():
            if name not in self.properties:
                raise ValueError(f"there is no argument {name!r:.80}, only {', '.join(self.properties) or 'none'}")
            if not _has_type(value, self.properties[name]):
                raise ValueError(f"{name} must be of type {self.properties[name]['type']}, got {value!r:.80}")
        try:
            inspect.signature(self.call).bind(**arguments)
        except TypeError as error:
            raise ValueError(error) from None
        found = self.call(**arguments)
        return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)


def functions_of(tools: Sequence[Callable[..., Any] | Function]) -> dict[str, Function]:
    """The functions by the names that the model calls them by.

    A plain function is described as transformers.utils.get_json_schema does, by its type hints and its docstring of
    Google's form. Raises ValueError where that cannot be done, where a description is wrong, and without any tool.
    """
    functions = [tool if isinstance(tool, Function) else Function(tool, _described(tool)) for tool in tools]
    if not functions:
        raise ValueError("tools must be one function at least: without tools use LLM.chat")
    return dict(zip(tools_of([each.description for each in functions]), functions, strict=True))


def answer_of(functions: Mapping[str, Function], call: ToolCall) -> str:
    """The answer to a call that a model wrote, which is "error: …" for a call that cannot be made."""
    try:
        if call.name not in functions:
            raise ValueError(f"there is no tool {call.name!r:.80}, only {', '.join(functions)}")
        return functions[call.name].answer(json.loads(call.arguments))
    except ValueError as error:
        return f"error: {error}"


def _described(function: Callable[..., Any]) -> dict[str, Any]:
    from transformers.utils import chat_template_utils  # imported late: it takes a second

    try:
        return chat_template_utils.get_json_schema(function)
    except (chat_template_utils.TypeHintParsingException, chat_template_utils.DocstringParsingException) as error:
        raise ValueError(
            f"{error}: complete its type hints and its docstring, or give Function(call, description)"
        ) from None


def _has_type(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a JSON value has a type that its schema declares, as far as it declares JSON's types."""
    declared = schema.get("type", [])
    names = {declared} if isinstance(declared, str) else {*declared}
    if schema.get("nullable"):  # how transformers writes None among the types
        names.add("null")
    return not declared or not names <= _KNOWN or bool(names & _TYPES[type(value)])
