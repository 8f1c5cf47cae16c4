"""From a step's results to its samples: tokens and what is known of them, and where a sample ends."""

from typing import Any

import numpy as np

from jaxengine.device.step_inputs import RowOutputs
from jaxengine.host.sample import Sample, Status
from jaxengine.host.scheduler import Scheduler
from jaxengine.outputs import Logprob

DEAD_END = (
    "min_tokens, stop tokens, allowed_token_ids, bad_words, logit_bias and penalties rule out every token of the "
    "vocabulary"
)
NOT_FINITE = "the model's logits were not finite"
Index = int | tuple[int, int]  # of a row: its place, or (step, place) where a dispatch ran several steps


class HostRows:
    """A step's results as numpy arrays; those that few requests ask for are fetched when one does."""

    def __init__(self, out: RowOutputs) -> None:
        self._out = out
        self.tokens = np.asarray(out.tokens)
        self.logprobs = np.asarray(out.logprobs)
        self.finite = np.asarray(out.finite)

    def __getattr__(self, name: str) -> Any:
        array = np.asarray(getattr(self._out, name))
        setattr(self, name, array)
        return array

    def likeliest(self, row: Index, count: int) -> dict[int, Logprob]:
        """The chosen token and the `count` likeliest, as vLLM's dictionary; -1 is all of the vocabulary."""
        found = {int(self.tokens[row]): Logprob(float(self.logprobs[row]), int(self.ranks[row]))}
        stop = count if count >= 0 else None
        likeliest = zip(self.top_ids[row][:stop].tolist(), self.top_logprobs[row][:stop].tolist(), strict=True)
        for rank, (token, logprob) in enumerate(likeliest, start=1):
            found[token] = Logprob(logprob, rank)
        return found


def append_token(scheduler: Scheduler, sample: Sample, rows: HostRows, row: Index) -> None:
    """Append the token in a row of the results, unless the sample ended in the meantime."""
    if sample.status is Status.FINISHED:
        return
    sample.num_pending -= 1
    if sample.request.sampling.max_tokens == 0:  # its prompt alone was to be scored, and now is
        scheduler.finish(sample, "length")
    elif rows.tokens[row] < 0:
        scheduler.finish(sample, "error", DEAD_END)
    elif not rows.finite[row]:
        _fail_not_finite(scheduler, sample)
    else:
        _record(sample, rows, row)
        scheduler.register_pages(sample)
        _stop(scheduler, sample)
        sample.num_recorded += 1


def _record(sample: Sample, rows: HostRows, row: Index) -> None:
    drawn, sampling = sample.drawn, sample.request.sampling
    drawn.token_ids.append(int(rows.tokens[row]))
    drawn.logprobs.append(float(rows.logprobs[row]))
    drawn.versions.append(sample.version)
    if sampling.raw_logprobs:
        drawn.raw_logprobs.append(rows.raw_logprobs[row])
    if sampling.entropy:
        drawn.entropies.append(rows.entropies[row])
    if sampling.logprobs is not None:
        drawn.top_logprobs.append(rows.likeliest(row, sampling.logprobs))


def _stop(scheduler: Scheduler, sample: Sample) -> None:
    """End the sample where its last token says so: a stop token, a stop string, or the edge."""
    request, sampling, token = sample.request, sample.request.sampling, sample.drawn.token_ids[-1]
    if token in request.stop_token_ids and len(sample.drawn.token_ids) >= sampling.min_tokens:
        if sample.detokenizer is not None and sampling.include_stop_str_in_output:
            sample.detokenizer.push([token])
        scheduler.finish(sample, "stop", token if token in sampling.stop_token_ids else None)
        return
    found = sample.detokenizer.push([token]) if sample.detokenizer is not None else None
    if found is not None:
        scheduler.finish(sample, "stop", found[1])
    elif sample.num_tokens >= request.limit:
        scheduler.finish(sample, "length")


def _fail_not_finite(scheduler: Scheduler, sample: Sample) -> None:
    scheduler.page_pool.discard(sample.pages)
    scheduler.finish(sample, "error", NOT_FINITE)


def score_prompt(scheduler: Scheduler, sample: Sample, rows: HostRows, row: int, position: int) -> None:
    """Write down the logprob of the prompt's token at `position`."""
    request = sample.request
    count = request.sampling.prompt_logprobs
    if sample.status is Status.FINISHED or count is None:
        return
    if not rows.finite[row]:
        _fail_not_finite(scheduler, sample)
        return
    entries: Any = request.prompt_logprobs or [None] * sample.prompt_length
    entries[position] = rows.likeliest(row, count)
    request.prompt_logprobs = entries
