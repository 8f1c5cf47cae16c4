"""Grammars that a completion's text follows: which tokens may come next. llguidance finds them."""

import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxengine.base.structured_outputs import MAX_CHARACTERS, StructuredOutputsParams
from jaxengine.text.pieces import Pieces

MAX_COMPILED = 64  # grammars that are kept, so that a batch under one schema reads it once
Encode = Callable[[str], list[int]]
# Of llguidance's own units of work. A grammar that needs more is refused, or ends its request: a step waits for it.
LIMITS: dict[str, Any] = dict(
    initial_lexer_fuel=200_000, step_lexer_fuel=20_000, max_lexer_states=20_000, verbose_errors=False
)
NO_TEXT = "NoExtension"  # how the library begins to say that no byte can come next
ONE_SPACE = "[ ]?"


class Allowed(NamedTuple):
    """What may follow some tokens: a bit for each token, the lowest bit of the first byte first; whether the text may
    end here; and what is wrong where nothing may follow any more.
    """

    bits: bytes
    may_end: bool
    error: str


class Grammars:
    """Reads grammars for one tokenizer. Raises ValueError where llguidance is not installed."""

    def __init__(self, pieces: Pieces, vocab_size: int, special_ids: frozenset[int], encode: Encode) -> None:
        self._library = _library()
        self._vocab_size = vocab_size
        tokens = _Tokens(pieces, vocab_size, special_ids, encode)
        self._tokens = self._library.LLTokenizer(self._library.TokenizerWrapper(tokens), n_vocab=vocab_size + 1)
        pieces_digest = hashlib.sha256(b"".join(b"%d:%b" % (len(piece), piece) for piece in tokens.tokens))
        # What the masks depend on beside the grammar: it is a part of the contract of what is drawn under them.
        self.identity = {"library": self._library.get_version(), "tokens": pieces_digest.hexdigest()[:32]}
        self.compiled = functools.lru_cache(MAX_COMPILED)(self._compiled)

    def _compiled(self, wanted: StructuredOutputsParams) -> "Grammar":
        """The grammar. Raises ValueError, with the place in it, for one that is wrong or that no text follows."""
        (kind,) = wanted.given().keys() - {"whitespace_pattern"}
        try:
            source = _source(self._library.LLMatcher, wanted)
        except ValueError as error:  # a schema that is no JSON
            raise ValueError(f"structured_outputs.{kind} cannot be read: {error}") from None
        make = functools.partial(
            self._library.LLMatcher, self._tokens, source, log_level=0, limits=self._library.LLParserLimits(**LIMITS)
        )
        grammar = Grammar(make, self._vocab_size)
        start = grammar.matcher().after(())
        if start.error and not start.error.startswith(NO_TEXT):
            raise ValueError(f"structured_outputs.{kind} cannot be read: {start.error}")
        if not any(start.bits):
            raise ValueError(f"structured_outputs.{kind} is followed by no text of one token or more")
        return grammar


class Grammar:
    """A grammar that was read."""

    def __init__(self, make: Callable[[], Any], vocab_size: int) -> None:
        self._make, self._vocab_size = make, vocab_size

    def matcher(self) -> "Matcher":
        """One for a completion. It is read anew: copies of a matcher would share its limits, so that what one
        completion may do would depend on what others did.
        """
        return Matcher(self._make(), self._vocab_size)


class Matcher:
    """Follows the tokens of one completion."""

    def __init__(self, state: Any, vocab_size: int) -> None:
        self._state, self._vocab_size, self._num_read = state, vocab_size, 0
        self._known: Allowed | None = None

    def after(self, token_ids: Sequence[int]) -> Allowed:
        """What may follow all tokens of the completion so far, of which there are never fewer than before."""
        new = list(token_ids[self._num_read :])
        if new or self._known is None:
            self._state.consume_tokens(new)
            self._num_read += len(new)
            self._known = self._found()
        return self._known

    def _found(self) -> Allowed:
        bits = bytearray() if self._state.is_error() else bytearray(self._state.compute_bitmask())
        if self._state.is_error():  # it may have come to its limits just now
            return Allowed(b"", False, self._state.get_error().replace("\n<non-verbose/>", "")[:500])
        place, bit = divmod(self._vocab_size, 8)
        may_end = bool(bits[place] >> bit & 1) and self._state.is_accepting()
        bits[place] &= ~(1 << bit)
        return Allowed(bytes(bits), may_end, "")


class _Tokens:
    """The vocabulary as llguidance asks for it, with one token more in the place of an end token: the model's own end
    tokens, of which there may be several or none, are allowed where the text may end.
    """

    bos_token_id = None

    def __init__(self, pieces: Pieces, vocab_size: int, special_ids: frozenset[int], encode: Encode) -> None:
        self._encode = encode
        self.tokens = [pieces.piece(token_id, first=False) for token_id in range(vocab_size)] + [b"<end>"]
        self.eos_token_id = vocab_size
        self.special_token_ids = [*sorted(special_ids), vocab_size]

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that a grammar leaves no choice about: the tokenizer's own, unless they stand for
        another text (some tokenizers put a space before the first word), else the longest that match, one after
        another.
        """
        token_ids, wanted = self._encode(text), text.encode()
        if b"".join(self.tokens[token_id] for token_id in token_ids) == wanted:
            return token_ids
        return list(self._longest(wanted))

    def _longest(self, text: bytes) -> Iterator[int]:
        start = 0
        while start < len(text):
            stops = range(min(len(text), start + self._most_bytes), start, -1)
            stop = next((stop for stop in stops if text[start:stop] in self._ids), None)
            if stop is None:
                return  # llguidance goes on byte by byte
            yield self._ids[text[start:stop]]
            start = stop

    @functools.cached_property
    def _ids(self) -> dict[bytes, int]:
        special = frozenset(self.special_token_ids)
        return {piece: token_id for token_id, piece in enumerate(self.tokens) if piece and token_id not in special}

    @functools.cached_property
    def _most_bytes(self) -> int:
        return max(map(len, self._ids), default=1)


def _source(matcher: Any, wanted: StructuredOutputsParams) -> str:
    """The grammar in llguidance's own form."""
    if wanted.regex is not None:
        return matcher.grammar_from_regex(wanted.regex)
    if wanted.grammar is not None:
        return matcher.grammar_from_lark(wanted.grammar)
    if wanted.choice is not None:
        return matcher.grammar_from_regex("|".join(map(_literally, wanted.choice)))
    schema = json.dumps({"type": "object"}) if wanted.json is None else wanted.json
    return matcher.grammar_from_json_schema(
        schema, overrides={"whitespace_pattern": wanted.whitespace_pattern or ONE_SPACE}
    )


def lark_of_ebnf(text: str) -> str:
    """A grammar in EBNF, llama.cpp's or SGLang's (`root ::= "a" | b`), in Lark's form.

    Raises ValueError for one that cannot be read or is longer than structured outputs may be, and where llguidance is
    not installed.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the grammar has {len(text)} characters, at most {MAX_CHARACTERS} are possible")
    return _library().grammar_from("ebnf", text)


def _literally(text: str) -> str:
    """A regular expression for this text alone."""
    is_plain = lambda character: character.isascii() and character.isalnum()
    return "".join(character if is_plain(character) else f"\\x{{{ord(character):x}}}" for character in text)


def _library() -> Any:
    try:
        return importlib.import_module("llguidance")
    except ImportError as error:
        raise ValueError(
            "structured_outputs needs llguidance, which is not installed: pip install 'jaxengine[structured]'"
        ) from error
