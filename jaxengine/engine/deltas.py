"""What a request gained since it was last looked at: the unit of a stream, whose cost follows what is new."""

import dataclasses

from jaxengine.engine.to_outputs import token_fields
from jaxengine.host.sample import Request, Sample
from jaxengine.outputs import CompletionDelta
from jaxengine.text.tokenizer import Tokenizer


@dataclasses.dataclass(slots=True)
class _Place:
    """How far one sample was read."""

    num_tokens: int = 0
    num_pieces: int = 0  # of its text
    has_ended: bool = False


class DeltaReader:
    """Reads one request as it grows; what it reads, joined, is the whole output.

    Texts are read where the engine keeps them as they grow (`Engine.add(with_text=True)`), else they are empty. Reading
    changes nothing, so that several may read one request. Between two steps only.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self._request, self._tokenizer = request, tokenizer
        self._places: list[tuple[Sample, _Place]] = []

    def read(self) -> list[CompletionDelta]:
        """What is new, of the samples that have tokens, text or an end which were not read yet."""
        if not self._places:  # a request has its samples once it is queued
            self._places = [(sample, _Place()) for sample in self._request.samples]
        deltas = [self._read(sample, place) for sample, place in self._places]
        return [delta for delta in deltas if delta is not None]

    def _read(self, sample: Sample, place: _Place) -> CompletionDelta | None:
        drawn, start, had_ended = sample.drawn, place.num_tokens, place.has_ended
        place.num_tokens, place.has_ended = len(drawn.token_ids), drawn.finish_reason is not None
        if place.num_tokens == start and place.has_ended == had_ended:
            return None
        text = ""
        if sample.detokenizer is not None and sample.request.sampling.detokenize:
            text, place.num_pieces = sample.detokenizer.text_since(place.num_pieces)
        return CompletionDelta(
            index=sample.index,
            start=start,
            text=text,
            finish_reason=None if had_ended else drawn.finish_reason,
            stop_reason=None if had_ended else drawn.stop_reason,
            **token_fields(sample, self._tokenizer, start),
        )
