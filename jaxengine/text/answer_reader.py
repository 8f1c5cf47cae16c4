"""Reads an answer that grows: its thoughts, its text and its calls of tools."""

from jaxengine.text.answer_parts import Part, Said, ThoughtReader
from jaxengine.text.tool_calls import ToolForm, ToolReader


class AnswerReader:
    """The parts of one answer. Where neither thoughts nor tools are looked for, all of it is said.

    `thinks` is None where thoughts are not told apart, else whether the prompt has begun one.
    """

    def __init__(self, tool_form: ToolForm | None, thinks: bool | None) -> None:
        self._thoughts = None if thinks is None else ThoughtReader(thinks)
        self._tools = None if tool_form is None else ToolReader(tool_form)

    def push(self, text: str) -> list[Part]:
        """The parts that `text` completes, in their order."""
        found: list[Part] = [Said(text)] if text else []
        return self._with_calls(self._thoughts.push(text) if self._thoughts is not None else found)

    def finish(self) -> list[Part]:
        """What was held back; no text follows."""
        parts = self._with_calls(self._thoughts.finish()) if self._thoughts is not None else []
        return parts + (self._tools.finish() if self._tools is not None else [])

    def _with_calls(self, parts: list[Part]) -> list[Part]:
        if self._tools is None:
            return parts
        each = [self._tools.push(part.text) if isinstance(part, Said) else [part] for part in parts]
        return [part for group in each for part in group]
