"""What a request gained since it was last looked at: the unit of a stream, whose cost follows what is new."""

import dataclasses

import numpy as np

from jaxengine.engine.to_outputs import spans_of, with_texts
from jaxengine.host.sample import Request, Sample
from jaxengine.outputs import CompletionDelta
from jaxengine.text.tokenizer import Tokenizer


@dataclasses.dataclass
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
        self._places: dict[int, _Place] = {}

    def read(self) -> list[CompletionDelta]:
        """What is new, of the samples that have tokens, text or an end which were not read yet."""
        deltas = [self._read(sample) for sample in self._request.samples]
        return [delta for delta in deltas if delta.token_ids or delta.text or delta.finish_reason]

    def _read(self, sample: Sample) -> CompletionDelta:
        drawn, sampling = sample.drawn, sample.request.sampling
        place = self._places.setdefault(sample.index, _Place())
        start, place.num_tokens = place.num_tokens, len(drawn.token_ids)
        text = ""
        if sample.detokenizer is not None and sampling.detokenize:
            text, place.num_pieces = sample.detokenizer.text_since(place.num_pieces)
        is_news, place.has_ended = not place.has_ended, drawn.finish_reason is not None
        top_logprobs = [with_texts(entry, self._tokenizer) for entry in drawn.top_logprobs[start:]]
        return CompletionDelta(
            index=sample.index,
            start=start,
            text=text,
            token_ids=drawn.token_ids[start:],
            token_logprobs=np.asarray(drawn.logprobs[start:], np.float32),
            weight_versions=spans_of(drawn.versions[start:], start),
            logprobs=top_logprobs if sampling.logprobs is not None else None,
            raw_logprobs=np.asarray(drawn.raw_logprobs[start:], np.float32) if sampling.raw_logprobs else None,
            entropies=np.asarray(drawn.entropies[start:], np.float32) if sampling.entropy else None,
            finish_reason=drawn.finish_reason if is_news else None,
            stop_reason=drawn.stop_reason if is_news else None,
        )
