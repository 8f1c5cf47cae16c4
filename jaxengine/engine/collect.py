"""From a step's results to its samples: tokens and what is known of them, and where a sample ends."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxengine.device.step_inputs import RowOutputs
from jaxengine.host.plan import Decode, Row
from jaxengine.host.sample import Sample, Status
from jaxengine.host.scheduler import Scheduler
from jaxengine.outputs import Logprob
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.grammar import Allowed

DEAD_END = (
    "min_tokens, stop tokens, structured_outputs, allowed_token_ids, bad_words, logit_bias and penalties rule out "
    "every token of the vocabulary"
)
NOT_FINITE = "the model's logits were not finite"
ALWAYS = ("tokens", "logprobs", "finite")  # of a step's results
LIKELIEST = ("ranks", "top_ids", "top_logprobs", "named_logprobs")  # where a request asks for them
DETAILS = ("raw_logprobs", "entropies", *LIKELIEST)
Index = int | tuple[int, int]  # of a row: its place, or (step, place) where a dispatch ran several steps


class HostRows:
    """A step's results as numpy arrays; those that few requests ask for are fetched when one does."""

    def __init__(self, out: RowOutputs) -> None:
        self._out = out
        self.tokens = np.asarray(out.tokens)
        self.logprobs = np.asarray(out.logprobs)
        self.finite = np.asarray(out.finite)
        self.good = self.finite & (self.tokens >= 0)  # a token was drawn, and all logits were finite

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

    def told(self, row: Index, sampling: SamplingParams) -> dict[int, Logprob]:
        """What is told of a generated position: the likeliest that were asked for, then tokens that were named."""
        found = self.likeliest(row, sampling.logprobs or 0)
        named = self.named_logprobs[row].tolist()
        for token, logprob in zip(sampling.logprob_token_ids, named, strict=False):
            found.setdefault(token, Logprob(logprob, None))
        return found


def begin_copies(out: RowOutputs, with_details: bool) -> None:
    """Start to copy a step's results to the host, while the step is still under way."""
    for name in ALWAYS + DETAILS if with_details else ALWAYS:
        getattr(out, name).copy_to_host_async()


def append_decoded(scheduler: Scheduler, decodes: Sequence[Decode], rows: HostRows) -> None:
    """Append a decode's tokens, `[steps, R]`.

    Most tokens neither fill a page nor end anything: they are written down here, in few words.
    """
    for step in range(len(rows.tokens)):
        tokens, logprobs, good = rows.tokens[step].tolist(), rows.logprobs[step].tolist(), rows.good[step].tolist()
        each = zip(decodes, tokens, logprobs, good, strict=False)
        for place, ((sample, _, count), token, logprob, is_good) in enumerate(each):
            drawn = sample.drawn
            known = drawn.token_ids
            if not is_good or len(known) + 1 >= sample.next_event or token in sample.request.stop_token_ids:
                if step < count:
                    append_token(scheduler, sample, token, logprob, is_good, rows, (step, place))
            elif step < count:
                known.append(token)
                drawn.logprobs.append(logprob)
                drawn.versions.append(sample.version)
                sample.num_recorded += 1


def append_prefilled(scheduler: Scheduler, planned: Sequence[Row], rows: HostRows) -> None:
    """Append the tokens that a prefill drew, `[R]`, and write down what it scored."""
    tokens, logprobs, good = rows.tokens.tolist(), rows.logprobs.tolist(), rows.good.tolist()
    for place, (sample, position, scored) in enumerate(planned):
        if scored:
            score_prompt(scheduler, sample, rows, place, position + 1)
        else:
            append_token(scheduler, sample, tokens[place], logprobs[place], good[place], rows, place)


def append_token(
    scheduler: Scheduler, sample: Sample, token: int, logprob: float, is_good: bool, rows: HostRows, row: Index
) -> None:
    """Append the token in a row of the results, unless the sample ended in the meantime."""
    if sample.status is Status.FINISHED:
        return
    if sample.request.sampling.max_tokens == 0:  # its prompt alone was to be scored, and now is
        scheduler.finish(sample, "length")
        return
    if not is_good:
        _fail(scheduler, sample, DEAD_END if token < 0 else NOT_FINITE)
        return
    drawn, sampling = sample.drawn, sample.request.sampling
    drawn.token_ids.append(token)
    drawn.logprobs.append(logprob)
    drawn.versions.append(sample.version)
    tells_details = sampling.tells_logprobs or sampling.raw_logprobs or sampling.entropy
    if tells_details:
        _record_details(sample, rows, row)
    scheduler.register_pages(sample)
    _stop(scheduler, sample)
    sample.num_recorded += 1
    on_news = sample.request.on_news
    if on_news is not None:
        on_news(sample.request)
    is_watched = tells_details or sample.detokenizer is not None or sample.is_steered or on_news is not None
    if sample.status is Status.RUNNING and not is_watched:
        full = (sample.num_registered + 1) * scheduler.engine_config.page_size
        sample.next_event = min(full, sample.request.limit) - sample.prompt_length


def _record_details(sample: Sample, rows: HostRows, row: Index) -> None:
    drawn, sampling = sample.drawn, sample.request.sampling
    if sampling.raw_logprobs:
        drawn.raw_logprobs.append(rows.raw_logprobs[row])
    if sampling.entropy:
        drawn.entropies.append(rows.entropies[row])
    if sampling.tells_logprobs:
        drawn.top_logprobs.append(rows.told(row, sampling))


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
    elif sample.is_steered and not any((allowed := sample.allowed()).bits):
        _end_of_grammar(scheduler, sample, allowed)
    elif sample.num_tokens >= request.limit:
        scheduler.finish(sample, "length")


def _end_of_grammar(scheduler: Scheduler, sample: Sample, allowed: Allowed) -> None:
    """Where no text can follow, the sample draws an end token if it has one, and ends here if it has none."""
    if not allowed.may_end:
        _fail(scheduler, sample, allowed.error or "structured_outputs: no token of the vocabulary goes on from here")
    elif not sample.request.stop_token_ids:
        scheduler.finish(sample, "stop")
    elif sample.num_tokens >= sample.request.limit:
        scheduler.finish(sample, "length")


def _fail(scheduler: Scheduler, sample: Sample, cause: str) -> None:
    if cause == NOT_FINITE:
        scheduler.page_pool.discard(sample.pages)
    scheduler.finish(sample, "error", cause)


def score_prompt(scheduler: Scheduler, sample: Sample, rows: HostRows, row: int, position: int) -> None:
    """Write down the logprob of the prompt's token at `position`."""
    request = sample.request
    count = request.sampling.prompt_logprobs
    if sample.status is Status.FINISHED or count is None:
        return
    if not rows.finite[row]:
        _fail(scheduler, sample, NOT_FINITE)
        return
    entries: Any = request.prompt_logprobs or [None] * sample.prompt_length
    entries[position] = rows.likeliest(row, count)
    request.prompt_logprobs = entries
