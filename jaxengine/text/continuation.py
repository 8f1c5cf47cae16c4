"""A chat whose text ends where its last message does, for the model to go on with that message."""

import secrets
from typing import Any


class Continuation:
    """Finds the end of the last of `messages` in what a template makes of them, as transformers does."""

    def __init__(self, messages: list[dict[str, Any]]) -> None:
        self._last = messages[-1]["content"]
        self._tag = f"{secrets.randbelow(10**24):024} "  # digits, which filters leave alone; the space shows a trim
        self.messages = [*messages[:-1], messages[-1] | {"content": self._last + self._tag}]

    def end(self, text: str) -> int:
        """Where the last message ends in `text`. Raises ValueError where the template did not write it down whole."""
        end = text.rfind(self._tag.rstrip())
        if end < 0 or self._last.strip() not in text:
            raise ValueError(
                f"continue_final_message: the chat template does not write the last message's content, "
                f"{self._last!r:.80}, as it is, so it cannot be continued: leave continue_final_message out, or change "
                "the message or the template"
            )
        is_trimmed = not text.startswith(self._tag, end)
        return len(text[:end].rstrip()) if is_trimmed else end
