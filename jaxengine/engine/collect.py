"""From a step's results to its sequences: tokens and what is known of them, and where a sequence ends."""

from typing import Any

import numpy as np

from jaxengine.device.step_inputs import RowOutputs
from jaxengine.host.sample import Sample, Status
from jaxengine.host.scheduler import Scheduler
from jaxengine.outputs import Logprob

DEAD_END = "min_tokens, stop tokens, logit_bias and penalties rule out every token of the vocabulary"


class HostRows:
    """A step's results as numpy arrays; those that few requests ask for are fetched when one does."""

    def __init__(self, out: RowOutputs) -> None:
        self._out = out
        self.tokens, self.logprobs, self.finite = (
            np.asarray(out.tokens),
            np.asarray(out.logprobs),
            np.asarray(out.finite),
        )

    def __getattr__(self, name: str) -> Any:
        array = np.asarray(getattr(self._out, name))
        setattr(self, name, array)
        return array

    def likeliest(self, lane, count: int) -> dict[int, Logprob]:
        """The chosen token and the `count` likeliest, as vLLM's dictionary."""
        chosen = {int(self.tokens[lane]): Logprob(float(self.logprobs[lane]), int(self.ranks[lane]))}
        ids, values = self.top_ids[lane][:count], self.top_logprobs[lane][:count]
        return chosen | {int(t): Logprob(float(v), i + 1) for i, (t, v) in enumerate(zip(ids, values, strict=True))}


def extend(scheduler: Scheduler, sample: Sample, rows: HostRows, lane: Any) -> None:
    """Append the token in a lane of the results, unless the sequence ended in the meantime."""
    if sample.status is Status.FINISHED:
        return
    sample.num_pending -= 1
    if rows.tokens[lane] < 0:
        scheduler.finish(sample, "error", DEAD_END)
        return
    if not rows.finite[lane]:
        _fail_not_finite(scheduler, sample)
        return
    token, params = int(rows.tokens[lane]), sample.request.sampling
    sample.token_ids.append(token)
    sample.token_logprobs.append(float(rows.logprobs[lane]))
    sample.token_versions.append(sample.version)
    if params.raw_logprobs:
        sample.raw_logprobs.append(rows.raw_logprobs[lane])
    if params.entropy:
        sample.entropies.append(rows.entropies[lane])
    if params.logprobs is not None:
        sample.logprobs.append(rows.likeliest(lane, params.logprobs))
    scheduler.register_pages(sample)
    _stop(scheduler, sample, token)
    sample.num_settled += 1


def _stop(scheduler: Scheduler, sample: Sample, token: int) -> None:
    """End the sequence where its last token says so: a stop token, a stop string, or the edge."""
    request = sample.request
    num_generated = len(sample.token_ids) - sample.prompt_length
    if token in request.stop_token_ids and num_generated >= request.sampling.min_tokens:
        if sample.detokenizer is not None and request.sampling.include_stop_str_in_output:
            sample.detokenizer.push([token])
        scheduler.finish(sample, "stop", token if token in request.sampling.stop_token_ids else None)
        return
    found = sample.detokenizer.push([token]) if sample.detokenizer is not None else None
    if found is not None:
        scheduler.finish(sample, "stop", found[1])
    elif len(sample.token_ids) >= request.limit:
        scheduler.finish(sample, "length")


def _fail_not_finite(scheduler: Scheduler, sample: Sample) -> None:
    scheduler.page_pool.discard(sample.pages)
    scheduler.finish(sample, "error", "the model's logits were not finite")


def score_prompt(scheduler: Scheduler, sample: Sample, rows: HostRows, lane: int, position: int) -> None:
    """Write down the logprob of the prompt's token at `position`."""
    request = sample.request
    count = request.sampling.prompt_logprobs
    if sample.status is Status.FINISHED or count is None:
        return
    if not rows.finite[lane]:
        _fail_not_finite(scheduler, sample)
        return
    entries: Any = request.prompt_logprobs or [None] * sample.prompt_length
    entries[position] = rows.likeliest(lane, count)
    request.prompt_logprobs = entries
