"""What a request gained since it was last looked at: the unit of a stream, whose cost follows what is new."""

import dataclasses

from jaxengine.engine.to_outputs import token_fields
from jaxengine.host.sample import Request, Sample
from jaxengine.outputs import CompletionDelta
from jaxengine.text.tokenizer import Tokenizer


@dataclasses.dataclass
class _Place:
    """How far one sample was read."""

    num_tokens: int = 0
    num_pieces: int = 0  # of its text
    has_ended: bool = False


_UNREAD = _Place()


class DeltaReader:
    """Reads one request as it grows; what it reads, joined, is the whole output.

    Texts are read where the engine keeps them as they grow (`Engine.add(with_text=True)`), else they are empty. Reading
    changes nothing, so that several may read one request. Between two steps only.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self._request, self._tokenizer = request, tokenizer
        self._places: dict[int, _Place] = {}

    def read(self) -> list[CompletionDelta]:
        """What is new, of the samples that have tokens, text or an end which were not read yet."""
        deltas = [self._read(sample) for sample in self._request.samples if self._has_news(sample)]
        return [delta for delta in deltas if delta.token_ids or delta.text or delta.finish_reason]

    def _has_news(self, sample: Sample) -> bool:
        """Whether it is worth a look: most samples of a long queue have not begun."""
        place, drawn = self._places.get(sample.index, _UNREAD), sample.drawn
        return len(drawn.token_ids) != place.num_tokens or (drawn.finish_reason is not None) != place.has_ended

    def _read(self, sample: Sample) -> CompletionDelta:
        drawn = sample.drawn
        place = self._places.setdefault(sample.index, _Place())
        start, place.num_tokens = place.num_tokens, len(drawn.token_ids)
        text = ""
        if sample.detokenizer is not None and sample.request.sampling.detokenize:
            text, place.num_pieces = sample.detokenizer.text_since(place.num_pieces)
        is_news, place.has_ended = not place.has_ended, drawn.finish_reason is not None
        return CompletionDelta(
            index=sample.index,
            start=start,
            text=text,
            finish_reason=drawn.finish_reason if is_news else None,
            stop_reason=drawn.stop_reason if is_news else None,
            **token_fields(sample, self._tokenizer, start),
        )
