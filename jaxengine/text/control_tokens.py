"""Control tokens in text: made where they were put on purpose, and nowhere else."""

import json
import re
import secrets
from collections.abc import Iterable
from typing import Any

import tokenizers


class Controls:
    """The control tokens, and a copy of the tokenizer that makes them only where they were put on purpose."""

    def __init__(self, spec: dict[str, Any], tokens: dict[str, tokenizers.AddedToken]) -> None:
        added = [token | {"special": token["special"] or token["content"] in tokens} for token in spec["added_tokens"]]
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(spec | {"added_tokens": added}))
        self._backend.encode_special_tokens = True  # the library's name for "encode their spelling as text"
        self.ids = {token["content"]: token["id"] for token in added if token["content"] in tokens}
        self.longest_first = [tokens[content] for content in sorted(tokens, key=len, reverse=True)]
        self.spelling = re.compile("|".join(re.escape(token.content) for token in self.longest_first) or "(?!)")
        secret = f"\ufdd0{secrets.token_hex(16)}"  # no text can hold it; Unicode keeps U+FDD0 for a program's own use
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
