"""The bytes that each token adds to a text."""

import functools
import json
import re
from collections.abc import Iterable

import tokenizers


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
        """What `token_id` adds as the first token of a text, or after another one. An unknown id adds nothing."""
        key = (token_id, first)
        if key not in self._known:
            self._known[key] = self._decoded(token_id, first)
        return self._known[key]

    def __contains__(self, token_id: int) -> bool:
        return self._backend.id_to_token(token_id) is not None

    def join(self, token_ids: Iterable[int]) -> bytes:
        """The bytes of a whole text."""
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
        """A token to stand before another one, because decoders treat the first token of a text differently."""
        for token_id in range(self._backend.get_vocab_size(with_added_tokens=False)):
            text = self._backend.decode([token_id], skip_special_tokens=True)
            if text and "\ufffd" not in text:
                return (token_id,)
        return ()

    def _check_joins(self) -> None:
        """Raises ValueError where 64 tokens, decoded one by one, do not join to the text that the library makes."""
        size = self._backend.get_vocab_size(with_added_tokens=False)
        some = [token_id for token_id in range(0, size, max(size // 64, 1)) if self.piece(token_id, False).isascii()]
        if self.join(some).decode() != self._backend.decode(some, skip_special_tokens=False):
            raise ValueError(
                "tokenizer.json has a decoder under which a token's text depends on the tokens after it, so text "
                f"cannot be streamed ({type(self._backend.decoder).__name__}): decode with the tokenizers library, "
                "outside the engine"
            )


@functools.cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's table: the printable bytes of latin-1 are themselves, the others stand at 256 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _byte_level_bytes(token: str) -> bytes:
    table = byte_of_character()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode()
