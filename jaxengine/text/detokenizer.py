"""Tokens to text, one at a time: what each token adds, where a stop string ends, what is safe to show already.

Text is the UTF-8 reading of the bytes that the tokens stand for, so it can be streamed without ever decoding a token twice. Three rules
follow. Generated ids are read alone, never behind the prompt, so a tokenizer that strips the space before the first word strips it from
the completion too. Bytes that are no UTF-8 become U+FFFD, as `bytes.decode` has it; for byte-level tokenizers that is what the
tokenizers library writes, for byte-fallback ones (SentencePiece) the library turns the whole run of bytes around a bad one into U+FFFD,
characters already shown included, which no stream can do. Stop strings match generated text alone and complete characters alone: the
U+FFFD that ends a text cut within a character completes none.
"""

import codecs
import functools
import json
import re
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import tokenizers

if TYPE_CHECKING:
    from jaxengine.text.tokenizer import Tokenizer


class Pieces:
    """The bytes that a token adds to the text; each distinct token is decoded once."""

    def __init__(self, backend: tokenizers.Tokenizer, decoder: object) -> None:
        kinds = json.dumps(decoder)
        self._backend = backend
        self._byte_level = '"ByteLevel"' in kinds
        self._byte_fallback = '"ByteFallback"' in kinds
        self._known: dict[tuple[int, bool], bytes] = {}
        self._anchor = () if self._byte_level else self._ordinary_token()
        self._check_joins()

    def piece(self, token_id: int, first: bool) -> bytes:
        """What `token_id` adds as the first token of a text, or behind another one. Ids that the tokenizer lacks add nothing."""
        key = (token_id, first)
        if key not in self._known:
            self._known[key] = self._decoded(token_id, first)
        return self._known[key]

    def __contains__(self, token_id: int) -> bool:
        return self._backend.id_to_token(token_id) is not None

    def join(self, token_ids: Iterable[int]) -> bytes:
        known = [token_id for token_id in token_ids if token_id in self]
        return b"".join(self.piece(token_id, first=index == 0) for index, token_id in enumerate(known))

    def _decoded(self, token_id: int, first: bool) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return _byte_level_bytes(token)
        if self._byte_fallback and (byte := re.fullmatch("<0x([89A-F][0-9A-F])>", token)):
            return bytes.fromhex(byte[1])
        before = () if first else self._anchor
        start = len(self._backend.decode(list(before), skip_special_tokens=False))
        return self._backend.decode([*before, token_id], skip_special_tokens=False)[start:].encode()

    def _ordinary_token(self) -> tuple[int, ...]:
        """A token to stand before another one, since decoders treat the first token of a text differently."""
        for token_id in range(self._backend.get_vocab_size(with_added_tokens=False)):
            text = self._backend.decode([token_id], skip_special_tokens=True)
            if text and "\ufffd" not in text:
                return (token_id,)
        return ()

    def _check_joins(self) -> None:
        size = self._backend.get_vocab_size(with_added_tokens=False)
        some = [
            token_id for token_id in range(0, size, max(size // 64, 1)) if self.piece(token_id, first=False).isascii()
        ]
        if self.join(some).decode() != self._backend.decode(some, skip_special_tokens=False):
            raise ValueError(
                "tokenizer.json has a decoder under which a token's text depends on the tokens behind it, so text cannot be "
                f"streamed ({type(self._backend.decoder).__name__}): decode with the tokenizers library, outside the engine"
            )


class StopStrings:
    """Aho and Corasick's automaton (1975) over the stop strings: time linear in the text, however many strings there are.

    A state is the longest suffix of the text that begins some stop string. `found[state]` is the longest stop string that ends
    here, `held[state]` the number of last characters that may still become one.
    """

    def __init__(self, stop: Iterable[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fail, self.held, self.found = [0], [0], [""]
        for text in stop:
            assert text, "an empty stop string would stop every text before it begins"
            self._add(text)
        self._link()

    def step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(character, 0)

    def _add(self, text: str) -> None:
        state = 0
        for depth, character in enumerate(text, 1):
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self.held.append(depth)
                self.found.append("")
            state = self._next[state][character]
        self.found[state] = text

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], character) if state else 0
                queue.append(child)
            fail = self._fail[state]
            self.found[state] = self.found[state] or self.found[fail]
            self.held[state] = self.held[state] if self._next[state] else self.held[fail]


@functools.lru_cache(maxsize=8)  # the samples of a request share one
def _automaton(stop: tuple[str, ...]) -> StopStrings:
    return StopStrings(stop)


class Detokenizer:
    """The text of one sample while it grows. The joined deltas equal `text`, which after `finish` equals the whole decoded and cut.

    The stop string that ends first wins, and of those that end together the longest. One that is completed within the first
    `min_tokens` tokens is ordinary text. Nothing may be pushed after a stop string was found.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer",
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._pieces = tokenizer.pieces
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stops = _automaton(tuple(stop)) if stop else None
        self._include = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._state = self._num_tokens = self._num_taken = 0
        self._first = True
        self._ended = False
        self._held = ""  # complete characters that may still be the beginning of a stop string
        self._final: list[str] = []

    def push(self, token_ids: Sequence[int]) -> tuple[int, str] | None:
        """Adds tokens. (how many of them were used, the stop string) where one was completed, else None."""
        assert not self._ended, "the text has ended: nothing can follow its stop string or finish()"
        for consumed, token_id in enumerate(token_ids, 1):
            self._num_tokens += 1
            stop = self._append(self._text_of(token_id))
            if stop:
                return consumed, stop
        return None

    @property
    def text(self) -> str:
        """All text so far that no later token can change."""
        return "".join(self._final)

    def take_delta(self) -> str:
        """The part of `text` that was not taken yet: whole characters, and none that a stop string may still cut."""
        delta = "".join(self._final[self._num_taken :])
        self._num_taken = len(self._final)
        return delta

    def finish(self) -> None:
        """No token follows: what was held back is text, an incomplete character as U+FFFD."""
        if not self._ended:
            self._end(self._held + self._characters.decode(b"", final=True))

    def _text_of(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        piece = self._pieces.piece(token_id, self._first)
        self._first = self._first and token_id not in self._pieces
        return self._characters.decode(piece)

    def _append(self, text: str) -> str:
        """Adds complete characters; the stop string that they completed, or ""."""
        held = 0
        if self._stops:
            for index, character in enumerate(text):
                self._state = self._stops.step(self._state, character)
                found = self._stops.found[self._state]
                if found and self._num_tokens > self._min_tokens:
                    ended = self._held + text[: index + 1]
                    self._end(ended if self._include else ended[: -len(found)])
                    return found
            held = 0 if self._include else self._stops.held[self._state]
        pending = self._held + text
        cut = len(pending) - held
        self._held = pending[cut:]
        if cut:
            self._final.append(pending[:cut])
        return ""

    def _end(self, text: str) -> None:
        self._final.append(text)
        self._held = ""
        self._ended = True


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: the printable bytes of latin-1 are themselves, the others stand at 256 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _byte_level_bytes(token: str) -> bytes:
    table = _byte_of_character()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode()
