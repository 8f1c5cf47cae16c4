"""The simulation's model, one hash a token, and the answers that a request must get when it runs alone."""

import itertools
from collections.abc import Iterable, Sequence

from jaxengine.host.sample import Request, Sample

VOCAB = 40
STOP = 1
UNKNOWN = 0  # no token: what a history holds after the end of its sequence


def root(version: int) -> int:
    """The state before the first token: other weights, other states."""
    return hash((version, VOCAB))


def link(state: int, token: int) -> int:
    """The state after a token: of the weights version and of every token up to this one.

    Hashes of ints are the same in every process.
    """
    return hash((state, token))


def turn(state: int, version: int) -> int:
    """The state where other weights go on after pages that stay."""
    return hash((state, version, VOCAB))


Spans = tuple[
    tuple[int, int], ...
]  # (position, version): which weights wrote a sequence's pages from which position on


def states_of(tokens: Iterable[int], version: int) -> list[int]:
    return list(itertools.accumulate(tokens, link, initial=root(version)))[1:]


def states_under(tokens: Sequence[int], spans: Spans) -> list[int]:
    """The states of pages that several versions of the weights wrote."""
    states = states_of(tokens[: spans[1][0] if len(spans) > 1 else None], spans[0][1])
    for index, (start, version) in enumerate(spans[1:], 1):
        stop = spans[index + 1][0] if index + 1 < len(spans) else None
        states += list(itertools.accumulate(tokens[start:stop], link, initial=turn(states[-1], version)))[1:]
    return states


def draw(state: int, key: Sequence[int], folds: Sequence[int]) -> tuple[int, float]:
    """(token, logprob) after a state; the logprob is exact in float32."""
    drawn = hash((state, *key, *folds))
    return 1 + (drawn >> 5) % VOCAB, score(state, drawn)


def score(state: int, token: int) -> float:
    return -((hash((state, token)) >> 5) % 4096) / 16


def check_answer(request: Request, oldest_version: int, kept: dict[int, list[Spans]]) -> None:
    """Assert that an ended request holds, in every sample, what it would have got alone.

    Weights are those that each token names, on pages written by them or, where a sample's index is in `kept`, by the
    weights of one of those spans.
    """
    for sample in request.samples:
        _check_lengths(sample)
        versions = sample.drawn.versions
        assert versions == sorted(versions) and all(v >= oldest_version for v in versions), (
            "a token of weights that were gone"
        )
        spans = [((0, version),) for version in sorted(set(versions))] + kept.get(sample.index, [])
        states = [(span[-1][1], states_under(sample.token_ids, span)) for span in spans]
        for i, (token, version) in enumerate(zip(sample.drawn.token_ids, versions, strict=True)):
            expected = [
                draw(of_one[sample.prompt_length + i - 1], request.key, (request.prompt_index, sample.index))
                for last, of_one in states
                if last == version
            ]
            assert (token, sample.drawn.logprobs[i]) in expected, (
                f"token {i} of sample {sample.index} is another than alone"
            )
        _check_end(sample)
    _check_prompt_scores(request)


def _check_lengths(sample: Sample) -> None:
    params, count = sample.request.sampling, len(sample.drawn.token_ids)
    assert list(sample.token_ids[: sample.prompt_length]) == sample.request.prompt_token_ids, "the prompt was changed"
    assert len(sample.drawn.logprobs) == len(sample.drawn.versions) == count, (
        "tokens and their logprobs are not aligned"
    )
    for asked, values in (
        (params.raw_logprobs, sample.drawn.raw_logprobs),
        (params.entropy, sample.drawn.entropies),
        (params.logprobs is not None, sample.drawn.top_logprobs),
    ):
        assert len(values) == (count if asked else 0), "tokens and their details are not aligned"


def _check_end(sample: Sample) -> None:
    request, generated, full = sample.request, sample.drawn.token_ids, len(sample.token_ids) == sample.request.limit
    stopped = bool(generated) and generated[-1] in request.stop_token_ids
    assert not request.stop_token_ids & set(generated[:-1]), "tokens after a stop token"
    assert len(sample.token_ids) <= request.limit, "tokens after the limit"
    reason = "stop" if stopped else "length" if full else "early"
    assert sample.drawn.finish_reason == reason or (
        reason == "early" and sample.drawn.finish_reason in ("abort", "error")
    ), "a wrong finish reason"


def _check_prompt_scores(request: Request) -> None:
    """The scores belong to the weights that drew the first token: whatever came before them was computed again."""
    first, prompt = request.samples[0], request.prompt_token_ids
    if request.sampling.prompt_logprobs is None or not first.drawn.token_ids or len(prompt) == 1:
        return
    states = states_of(prompt, first.drawn.versions[0])
    expected = [None] + [{token: score(state, token)} for state, token in zip(states, prompt[1:], strict=False)]
    found = [
        entry and {token: value.logprob for token, value in entry.items()} for entry in request.prompt_logprobs or ()
    ]
    assert found == expected, "the prompt's scores are others than alone"
