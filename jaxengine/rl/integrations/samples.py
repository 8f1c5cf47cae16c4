"""Samples for trainers of other libraries, which have no word for one that failed."""

from collections.abc import Iterator, Sequence

from jaxengine.outputs import CompletionOutput, RequestOutput


def samples_of(outputs: Sequence[RequestOutput]) -> Iterator[tuple[RequestOutput, CompletionOutput]]:
    """Every sample with its prompt. Raises RuntimeError where one ended with an error."""
    for output in outputs:
        for sample in output.outputs:
            if sample.finish_reason == "error":
                raise RuntimeError(f"the engine ended a sample with an error: {sample.stop_reason}")
            yield output, sample
