"""The assistant's messages of a chat, whole or as they grow: text, thoughts and calls of tools."""

from collections.abc import Mapping
from typing import Any

from jaxengine.server.errors import ApiError, refusals
from jaxengine.server.generation import structure_of
from jaxengine.server.protocol import ChatRequest
from jaxengine.server.service import Service
from jaxengine.text.answer_parts import THINK, THOUGHT, Part, Said, Thought, ToolCall
from jaxengine.text.answer_reader import AnswerReader
from jaxengine.text.tool_calls import TOOL_FORMS, ToolForm, grammar_of_calls, tools_of

CHOICES = ("none", "auto", "required")


class Messages:
    """How the messages of one call are read, and which structured outputs they ask for."""

    def __init__(self, service: Service, form: ChatRequest, prompt: str) -> None:
        """`prompt` is the text that the chat template made. Raises ApiError for tools that cannot be had."""
        is_begun = prompt.rstrip().endswith(THINK)
        asked = structure_of(form)
        is_structured = bool(asked or form.structured_outputs)
        self._form = _tool_form(service, form)
        self.structure = asked | _structure(self._form, form, is_structured, f"\n{THOUGHT}\n\n" if is_begun else "")
        # A form holds from the first token on, so that what the prompt has begun is not gone on with.
        self._thinks = is_begun and not is_structured if service.tells_thoughts else None
        self._readers: dict[int, AnswerReader] = {}
        self._num_calls: dict[int, int] = {}

    def gained(self, choice: int, text: str, is_over: bool) -> list[Part]:
        """The parts that a choice has more, now that its text has `text` more."""
        if choice not in self._readers:
            self._readers[choice] = AnswerReader(self._form, self._thinks)
        reader = self._readers[choice]
        parts = reader.push(text) + (reader.finish() if is_over else [])
        self._num_calls[choice] = self._num_calls.get(choice, 0) + sum(isinstance(part, ToolCall) for part in parts)
        return parts

    def fields(self, call: str, choice: int, parts: list[Part]) -> dict[str, Any]:
        """The message's fields that parts, the newest of a choice, are. Calls are numbered from its first on."""
        calls = [part for part in parts if isinstance(part, ToolCall)]
        first = self._num_calls[choice] - len(calls)
        fields: dict[str, Any] = {"content": "".join(part.text for part in parts if isinstance(part, Said))}
        if thoughts := "".join(part.text for part in parts if isinstance(part, Thought)):
            fields["reasoning_content"] = thoughts
        if calls:
            name = call.removeprefix("chatcmpl-")
            fields["tool_calls"] = [
                {
                    "index": first + index,
                    "id": f"call_{name}_{choice}_{first + index}",
                    "type": "function",
                    "function": {"name": part.name, "arguments": part.arguments},
                }
                for index, part in enumerate(calls)
            ]
        return fields

    def finish_reason(self, choice: int, reason: str | None) -> str | None:
        """The engine's reason, or that tools are called."""
        return "tool_calls" if reason == "stop" and self._num_calls[choice] else reason


def _tool_form(service: Service, form: ChatRequest) -> ToolForm | None:
    """How calls are looked for in this call's answers; None where they are not."""
    chosen = form.tool_choice
    if chosen is not None and not isinstance(chosen, Mapping) and chosen not in CHOICES:
        raise ApiError(400, f"tool_choice must be one of {', '.join(CHOICES)} or name a function", "tool_choice")
    if not form.tools:
        if chosen in (None, "none", "auto"):
            return None
        raise ApiError(400, f"tool_choice={chosen!r:.80} takes tools", "tool_choice")
    return None if chosen == "none" else TOOL_FORMS[service.tool_parser]


def _structure(tool_form: ToolForm | None, form: ChatRequest, is_structured: bool, before: str) -> dict[str, Any]:
    """The structured outputs of calls that have to be made; nothing where the model is free to make some."""
    if tool_form is None:
        return {}
    with refusals():
        tools = tools_of(form.tools or ())
    chosen = form.tool_choice
    if isinstance(chosen, Mapping):
        named = chosen.get("function")
        name = named.get("name") if isinstance(named, Mapping) else None
        if name not in tools:
            raise ApiError(400, f"tool_choice names no tool: {name!r:.80} is none of {', '.join(tools)}", "tool_choice")
        tools = {name: tools[name]}
    elif chosen != "required":
        if form.parallel_tool_calls is False:
            raise ApiError(400, "parallel_tool_calls=false takes tool_choice='required'", "parallel_tool_calls")
        return {}
    if is_structured:
        raise ApiError(
            400, f"tool_choice={chosen!r:.80} and another structured output exclude each other", "tool_choice"
        )
    is_one = isinstance(chosen, Mapping) or form.parallel_tool_calls is False
    return {"structured_outputs": {"grammar": grammar_of_calls(tool_form, tools, several=not is_one, before=before)}}
