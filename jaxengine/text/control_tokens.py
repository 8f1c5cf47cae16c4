"""Control tokens in text: made where they were put on purpose, and nowhere else."""

import json
import re
import secrets
from collections.abc import Iterable
from typing import Any

import tokenizers

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode keeps them for a program's own use


class Controls:
    """The control tokens, and a copy of the tokenizer that makes them only where they were put on purpose."""

    def __init__(self, spec: dict[str, Any], tokens: dict[str, tokenizers.AddedToken]) -> None:
        added = [token | {"special": token["special"] or token["content"] in tokens} for token in spec["added_tokens"]]
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(spec | {"added_tokens": added}))
        self._backend.encode_special_tokens = True  # the library's name for "encode their spelling as text"
        self.ids = {token["content"]: token["id"] for token in added if token["content"] in tokens}
        longest_first = sorted(tokens, key=len, reverse=True)
        self.spelling = "|".join(map(re.escape, longest_first)) or "(?!)"
        self.in_template = "|".join(_with_context(tokens[content]) for content in longest_first) or "(?!)"
        self.beginnings = frozenset(content[:cut] for content in tokens for cut in range(1, len(content)))
        self.longest = max(map(len, tokens), default=0)
        self.endings = frozenset(content[cut:] for content in tokens for cut in range(1, len(content)))
        secret = f"{_NONCHARACTERS[0]}{secrets.token_hex(16)}"  # no text can hold it
        self.place, self._cut = f"{secret}p", f"{secret}c"
        own = [tokenizers.AddedToken(mark, normalized=False) for mark in (self.place, self._cut)]
        self._backend.add_tokens(own)
        self._place_id, self._cut_id = (self._backend.token_to_id(token.content) for token in own)
        unknown = spec["model"].get("unk_token"), spec["model"].get("unk_id")  # what plain text may well become
        self._forbidden = frozenset(
            token_id for content, token_id in self.ids.items() if not {content, token_id} & {*unknown}
        )

    def encode(self, text: str, *, add_special_tokens: bool = False, placed: Iterable[int] = ()) -> list[int]:
        """The ids of `text`, with the ids `placed` where the text has `self.place`."""
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        while spans := self._forged(encoding):
            text = self._divided(text, spans)
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        next_placed = iter(placed)
        return [
            next(next_placed) if token_id == self._place_id else token_id
            for token_id in encoding.ids
            if token_id != self._cut_id
        ]

    def _forged(self, encoding: tokenizers.Encoding) -> list[tuple[int, int]]:
        """Where the vocabulary itself holds a control token's spelling, as word-level and unigram ones may."""
        if self._forbidden.isdisjoint(encoding.ids):
            return []
        own_marks = encoding.special_tokens_mask
        forged = [
            index for index, token_id in enumerate(encoding.ids) if token_id in self._forbidden and not own_marks[index]
        ]
        return [encoding.offsets[index] for index in forged]

    def _divided(self, text: str, spans: list[tuple[int, int]]) -> str:
        for start, end in reversed(spans):
            if end - start < 2:
                raise ValueError(
                    f"the tokenizer makes a control token of the text {text[start:end]!r}: leave it out or give token "
                    "ids"
                )
            text = text[: start + 1] + self._cut + text[start + 1 :]
        return text


class Guard:
    """Tells, in one rendered chat, what the user spelled from what the template wrote.

    Noncharacters that occur in nothing given stand around every control token that is spelled there, and where a string
    begins or ends with a part of one, so that two strings cannot be joined to one. A template that deletes text from
    the middle of a message could still join what stood around it.
    """

    def __init__(self, controls: Controls, strings: list[str]) -> None:
        self._controls = controls
        self.num_characters = sum(map(len, strings))
        taken = set().union(*strings)
        free = [mark for mark in _NONCHARACTERS if mark not in taken]
        if len(free) < 3:
            raise ValueError(
                "the messages hold nearly all of Unicode's noncharacters U+FDD0 … U+FDEF: leave three of them out"
            )
        self._open, self._close, self._cut = free[:3]

    def guarded(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._guarded_text(value)
        if isinstance(value, dict):
            return {self.guarded(key): self.guarded(item) for key, item in value.items()}
        return [self.guarded(item) for item in value] if isinstance(value, list) else value

    def encode(self, rendered: str) -> list[int]:
        controls, placed = self._controls, []

        def replaced(match: re.Match[str]) -> str:
            if match["control"] is None:
                return match["text"] or ""
            content = match["control"] if match["control"] in controls.ids else match["control"].strip()
            placed.append(controls.ids[content])
            return controls.place

        pattern = (
            f"{self._open}(?P<text>{controls.spelling}){self._close}|[{self._open}{self._close}{self._cut}]"
            f"|(?P<control>{controls.in_template})"
        )
        return controls.encode(re.sub(pattern, replaced, rendered), placed=placed)

    def _guarded_text(self, text: str) -> str:
        text = re.sub(self._controls.spelling, rf"{self._open}\g<0>{self._close}", text)
        lengths = range(1, self._controls.longest)
        end = len(text.rstrip())
        if any(text[max(end - length, 0) : end] in self._controls.beginnings for length in lengths):
            text = text[:end] + self._cut + text[end:]
        start = len(text) - len(text.lstrip())
        if any(text[start : start + length] in self._controls.endings for length in lengths):
            text = text[:start] + self._cut + text[start:]
        return text


def _with_context(token: tokenizers.AddedToken) -> str:
    """A pattern for the token in the template's text, with the white space that the token swallows."""
    word = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
    # (?<!\s) finds the beginning of white space at once; without it, a long run before no token takes quadratic time.
    return r"(?:(?<!\s)\s+)?" * token.lstrip + word[0] + re.escape(token.content) + word[1] + r"\s*" * token.rstrip
