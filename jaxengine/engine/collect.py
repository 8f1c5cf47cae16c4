"""From a step's results to its sequences: tokens and what is known of them, and where a sequence ends."""
from typing import Any

import numpy as np

from jaxengine.device.step_inputs import RowOutputs
from jaxengine.host.sample import Sequence, Status
from jaxengine.host.scheduler import Scheduler
from jaxengine.outputs import Logprob

DEAD_END = "min_tokens, stop tokens, logit_bias and penalties rule out every token of the vocabulary"


class HostRows:
    """A step's results as numpy arrays; those that few requests ask for are fetched when one does."""

    def __init__(self, out: RowOutputs) -> None:
        self._out = out
        self.tokens, self.logprobs, self.finite = np.asarray(out.tokens), np.asarray(out.logprobs), np.asarray(out.finite)

    def __getattr__(self, name: str) -> Any:
        array = np.asarray(getattr(self._out, name))
        setattr(self, name, array)
        return array

    def likeliest(self, lane, count: int) -> dict[int, Logprob]:
        """The chosen token and the `count` likeliest, as vLLM's dictionary."""
        chosen = {int(self.tokens[lane]): Logprob(float(self.logprobs[lane]), int(self.ranks[lane]))}
        ids, values = self.top_ids[lane][:count], self.top_logprobs[lane][:count]
        return chosen | {int(t): Logprob(float(v), i + 1) for i, (t, v) in enumerate(zip(ids, values, strict=True))}


def extend(scheduler: Scheduler, sequence: Sequence, rows: HostRows, lane: Any) -> None:
    """Append the token in a lane of the results, unless the sequence ended in the meantime."""
    if sequence.status is Status.FINISHED:
        return
    sequence.num_pending -= 1
    if rows.tokens[lane] < 0:
        scheduler.finish(sequence, "error", DEAD_END)
        return
    if not rows.finite[lane]:
        _fail_not_finite(scheduler, sequence)
        return
    token, params = int(rows.tokens[lane]), sequence.request.params
    sequence.token_ids.append(token)
    sequence.token_logprobs.append(float(rows.logprobs[lane]))
    sequence.token_versions.append(sequence.version)
    if params.raw_logprobs:
        sequence.raw_logprobs.append(rows.raw_logprobs[lane])
    if params.entropy:
        sequence.entropies.append(rows.entropies[lane])
    if params.logprobs is not None:
        sequence.logprobs.append(rows.likeliest(lane, params.logprobs))
    scheduler.register_pages(sequence)
    _stop(scheduler, sequence, token)
    sequence.num_settled += 1


def _stop(scheduler: Scheduler, sequence: Sequence, token: int) -> None:
    """End the sequence where its last token says so: a stop token, a stop string, or the edge."""
    request = sequence.request
    num_generated = len(sequence.token_ids) - sequence.prompt_length
    if token in request.stop_token_ids and num_generated >= request.params.min_tokens:
        if sequence.detokenizer is not None and request.params.include_stop_str_in_output:
            sequence.detokenizer.push([token])
        scheduler.finish(sequence, "stop", token if token in request.params.stop_token_ids else None)
        return
    found = sequence.detokenizer.push([token]) if sequence.detokenizer is not None else None
    if found is not None:
        scheduler.finish(sequence, "stop", found[1])
    elif len(sequence.token_ids) >= request.limit:
        scheduler.finish(sequence, "length")


def _fail_not_finite(scheduler: Scheduler, sequence: Sequence) -> None:
    scheduler.blocks.discard(sequence.pages)
    scheduler.finish(sequence, "error", "the model's logits were not finite")


def score_prompt(scheduler: Scheduler, sequence: Sequence, rows: HostRows, lane: int, position: int) -> None:
    """Write down the logprob of the prompt's token at `position`."""
    request = sequence.request
    count = request.params.prompt_logprobs
    if sequence.status is Status.FINISHED or count is None:
        return
    if not rows.finite[lane]:
        _fail_not_finite(scheduler, sequence)
        return
    entries: Any = request.prompt_logprobs or [None] * sequence.prompt_length
    entries[position] = rows.likeliest(lane, count)
    request.prompt_logprobs = entries
