"""An answer's text in parts: what was thought, what was said, which tools are called. Read as the text grows."""

from typing import NamedTuple


class Thought(NamedTuple):
    """Text between <think> and </think>."""

    text: str


class Said(NamedTuple):
    """Text for the user."""

    text: str


class ToolCall(NamedTuple):
    """A tool's name and its arguments, an object as JSON text."""

    name: str
    arguments: str


Part = Thought | Said | ToolCall
THINK, THOUGHT = "<think>", "</think>"


def held_back(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    longest = min(len(text), len(tag) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(tag[:count])), 0)


class ThoughtReader:
    """Tells what is thought from what is said, as Qwen3 and DeepSeek-R1 mark it.

    A text that does not begin with <think> is all said, unless `has_begun`: the prompt ends with <think> already.
    Newlines around the tags belong to neither.
    """

    def __init__(self, has_begun: bool) -> None:
        self._inside: bool | None = True if has_begun else None  # None: the text has not said yet
        self._pending = ""
        self._skips_newlines = True

    def push(self, text: str) -> list[Part]:
        """The parts that `text` completes."""
        self._pending += text
        if self._inside is None and not self._find_beginning():
            return []
        parts: list[Part] = []
        if self._inside:
            parts += self._thoughts()
        if not self._inside:
            parts += self._said()
        return parts

    def finish(self) -> list[Part]:
        """The parts that were held back; no text follows."""
        rest, self._pending = self._pending, ""
        if self._inside:
            return [Thought(rest)] if rest.strip("\n") else []
        return [Said(rest)] if rest else []

    def _find_beginning(self) -> bool:
        begun = self._pending.lstrip()
        if not begun or (THINK.startswith(begun) and begun != THINK):
            return False
        self._inside = begun.startswith(THINK)
        if self._inside:
            self._pending = begun.removeprefix(THINK)
        else:
            self._skips_newlines = False
        return True

    def _thoughts(self) -> list[Part]:
        if self._skips_newlines:
            self._pending = self._pending.lstrip("\n")
        found = self._pending.find(THOUGHT)
        if found >= 0:
            thought, self._pending = self._pending[:found].rstrip("\n"), self._pending[found + len(THOUGHT) :]
            self._inside, self._skips_newlines = False, True
        else:
            held = held_back(self._pending, THOUGHT)
            sure = self._pending[: len(self._pending) - held].rstrip("\n")
            thought, self._pending = sure, self._pending[len(sure) :]
            self._skips_newlines = self._skips_newlines and not thought
        return [Thought(thought)] if thought else []

    def _said(self) -> list[Part]:
        if self._skips_newlines:
            self._pending = self._pending.lstrip("\n")
            self._skips_newlines = not self._pending
        text, self._pending = self._pending, ""
        return [Said(text)] if text else []
