"""Tokens to text, one at a time: what each token adds, where a stop string ends, what is safe to show already.

Text is the UTF-8 reading of the bytes that the tokens stand for, so it can be streamed without ever decoding a token
twice. Three rules follow. Generated ids are read without the prompt before them, so a tokenizer that strips the space
before the first word strips it from the completion too. Bytes that are no UTF-8 become U+FFFD, as `bytes.decode` has
it; for byte-level tokenizers that is what the tokenizers library writes, for byte-fallback ones (SentencePiece) the
library turns the whole run of bytes around a bad one into U+FFFD, characters already shown included, which no stream
can do. Stop strings match generated text alone and complete characters alone: the U+FFFD that ends a text cut within a
character completes none.
"""

import codecs
from collections.abc import Sequence

from jaxengine.sampling_params import SamplingParams
from jaxengine.text.stop_strings import StopStrings
from jaxengine.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one sample while it grows. The joined deltas equal `text`.

    The stop string that ends first wins, and of those that end together the longest. One that is completed within the
    first `min_tokens` tokens is ordinary text. Nothing may be pushed after a stop string was found.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._pieces = tokenizer.pieces
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stops = StopStrings(stop) if stop else None
        self._include = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_tokens = self._num_taken = 0
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
        delta, self._num_taken = self.text_since(self._num_taken)
        return delta

    def text_since(self, num_pieces: int) -> tuple[str, int]:
        """(what follows the first `num_pieces` pieces of `text`, how many there are); each token adds at most one.

        The pieces are the same for the same tokens, however they are pushed.
        """
        return "".join(self._final[num_pieces:]), len(self._final)

    def finish(self) -> None:
        """No token follows: what was held back is text, an incomplete character as U+FFFD. Idempotent."""
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
        stop = self._stops.add(text) if self._stops else None
        pending = self._held + text
        if stop and self._num_tokens > self._min_tokens:
            end = len(self._held) + stop.end
            self._end(pending[: end if self._include else end - len(stop.string)])
            return stop.string
        num_held = len(self._stops.held) if self._stops and not self._include else 0
        cut = len(pending) - num_held
        self._held = pending[cut:]
        if cut:
            self._final.append(pending[:cut])
        return ""

    def _end(self, text: str) -> None:
        self._final.append(text)
        self._held = ""
        self._ended = True


def detokenizer_for(tokenizer: Tokenizer, sampling: SamplingParams) -> Detokenizer:
    """The detokenizer of one sample that is drawn under `sampling`, before its first token."""
    return Detokenizer(
        tokenizer,
        stop=sampling.stop,
        include_stop_str_in_output=sampling.include_stop_str_in_output,
        skip_special_tokens=sampling.skip_special_tokens,
        min_tokens=sampling.min_tokens,
    )
