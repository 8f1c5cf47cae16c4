"""The contract on the user's own machine and model: every axis is run with random traffic, and every bit compared.

`llm.verify()` in a notebook, `jaxengine verify MODEL` on a command line. A check runs the same requests in another way, on the engine that
serves, and compares tokens and logprobs as uint32 with those of the plain batch.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxengine.base.keys import sample_key, seeded
from jaxengine.config import QUERY_BLOCK
from jaxengine.contract.compare import Comparison, compare
from jaxengine.contract.report import Check, Verification
from jaxengine.device.scoring import plain_logprobs
from jaxengine.outputs import CompletionOutput, RequestOutput
from jaxengine.rl.rollout import Rollout
from jaxengine.sampling_params import SamplingParams

LENGTHS = (
    1,
    2,
    15,
    16,
    17,
    31,
    33,
    48,
    63,
    64,
    65,
    97,
    127,
    128,
    129,
    200,
)  # of prompts: around blocks, pages and tiles
SAMPLES, QUICK_SAMPLES = 1000, 100
DRIFT_LIMIT = 1e-3  # KL against float32 (the project's promise), in nats a token
Requests = list[tuple[list[int], SamplingParams]]


def verify(
    llm: Any,
    *,
    quick: bool = False,
    samples: int | None = None,
    seed: int = 0,
    report: Callable[[str], None] = lambda text: None,
) -> Verification:
    """Run every check. `samples` of one prompt are drawn at temperature 0 and at temperature 1 among random traffic, 1,000 unless said
    otherwise, 100 with `quick`; `seed` makes the traffic. The LLM must be idle, and is as it was afterwards but for its prefix cache."""
    count = samples if samples is not None else QUICK_SAMPLES if quick else SAMPLES
    if count < 2:
        raise ValueError(f"samples must be at least 2, got {count}")
    if llm.engine.has_work:
        raise ValueError("the LLM has requests under way: verify it when they have ended")
    traffic, checks = Traffic(llm, seed), []
    for axis, what, run in _checks(llm, traffic, quick, count):
        report(f"{axis}: {what} …")
        start = time.perf_counter()
        holds, found = run()
        checks.append(Check(axis, what, holds, found, time.perf_counter() - start))
    refused = [f"{kind} on {tile.rows} rows" for kind, tile in llm.engine.step_variants.refused]
    return Verification(llm.contract(), refused, checks)


Run = Callable[[], tuple[bool, str]]


def _checks(llm: Any, traffic: "Traffic", quick: bool, count: int) -> Iterator[tuple[str, str, Run]]:
    adjusted, pages = llm.engine.adjusted, llm.engine_config.num_pages - 1

    def among(**changes: Any) -> Run:
        return lambda: traffic.again(adjusted(**changes))

    yield "C1", "the same call again", among()
    yield "C2", "every request alone", lambda: traffic.alone(len(LENGTHS) if not quick else 6)
    yield "C2", "shuffled among others", lambda: traffic.shuffled()
    yield "C2", f"temperature 0, {count} times among random traffic", lambda: greedy(traffic, count)
    yield "C2", f"temperature 1, {count} keys, twice among random traffic", lambda: sampled(traffic, count)
    for chunk in (QUERY_BLOCK, 3 * QUERY_BLOCK):
        yield "C3", f"prefill in chunks of {chunk}", among(max_num_batched_tokens=chunk, enable_prefix_caching=False)
    yield "C4", "prefix cache off", among(enable_prefix_caching=False)
    yield "C4", "hits on prompt pages", lambda: traffic.hits()
    yield "C4", "hits on generated pages", lambda: traffic.second_turn()
    yield "C5", "preempted and recomputed", lambda: traffic.preempted(pages)
    yield "C6", "few slots", among(held_slots=llm.engine_config.max_num_seqs - min(3, llm.engine_config.max_num_seqs))
    yield (
        "C7",
        "the overlapped loop" if not llm.engine_config.overlap else "the plain loop",
        among(overlap=not llm.engine_config.overlap),
    )
    yield "C11", "score against generate", lambda: scored(traffic)
    yield "drift", "against plain float32", lambda: drift(traffic, 4 if quick else len(LENGTHS))


class Traffic:
    """A mixed batch of random requests, each with its own key, and its answers from the plain batch."""

    def __init__(self, llm: Any, seed: int) -> None:
        self.llm, self.key = llm, seeded(seed)
        self.rng = random.Random(seed)
        self.room = room = min(
            llm.engine_config.max_model_len, (llm.engine_config.num_pages - 1) * llm.engine_config.page_size
        )
        self.new_tokens = max(min(24, room // 4), 1)
        lengths = [n for n in LENGTHS if n <= room - 2 * self.new_tokens - 2] or [1]
        self.requests = [(self.prompt(n), self._params(i)) for i, n in enumerate(lengths)]
        self.expected = self.run(self.requests)

    def prompt(self, length: int) -> list[int]:
        return [self.rng.randrange(self.llm.config.vocab_size) for _ in range(length)]

    def _params(self, i: int) -> SamplingParams:
        """A mix: greedy, sampled, cut, penalised."""
        return SamplingParams(
            max_tokens=max(self.new_tokens - i % 5 * 4, 1),
            temperature=(1.0, 0.0, 0.7, 1.3)[i % 4],
            top_p=(1.0, 0.9)[i % 2],
            top_k=(0, 20, 0)[i % 3],
            min_p=0.02 if i % 5 == 0 else 0.0,
            repetition_penalty=1.2 if i % 6 == 1 else 1.0,
            frequency_penalty=0.5 if i % 7 == 2 else 0.0,
            ignore_eos=True,
            detokenize=False,
            key=sample_key(self.key, i, 0),
        )

    def run(self, requests: Requests) -> list[CompletionOutput]:
        prompts = [{"prompt_token_ids": tokens} for tokens, _ in requests]
        outputs = self.llm.generate(prompts, [params for _, params in requests], use_tqdm=False)
        return [output.outputs[0] for output in outputs]

    def random_requests(self, count: int, seed: int) -> Requests:
        params = SamplingParams(max_tokens=self.new_tokens, ignore_eos=True, detokenize=False)
        return [
            (self.prompt(self.rng.choice(LENGTHS[:8])), params.replace(key=sample_key(self.key, seed, i)))
            for i in range(count)
        ]

    def mixed(self, requests: Requests, others: Requests) -> list[CompletionOutput]:
        """Answers of `requests`, run shuffled among others."""
        order = list(range(len(requests) + len(others)))
        self.rng.shuffle(order)
        found = dict(zip(order, self.run([(requests + others)[i] for i in order]), strict=True))
        return [found[i] for i in range(len(requests))]

    # -- the axes that change how the same requests run --------------------------------------------------------------------------

    def again(self, adjusted: Any) -> tuple[bool, str]:
        self.llm.engine.scheduler.page_pool.clear_cache()
        with adjusted:
            return said(compare("bit-equal", self.expected, self.run(self.requests)))

    def alone(self, count: int) -> tuple[bool, str]:
        step = max(len(self.requests) // count, 1)
        with self.llm.engine.adjusted(enable_prefix_caching=False):
            found = [self.run([request])[0] for request in self.requests[::step]]
        return said(compare("bit-equal", self.expected[::step], found))

    def shuffled(self) -> tuple[bool, str]:
        return said(
            compare("bit-equal", self.expected, self.mixed(self.requests, self.random_requests(len(self.requests), 1)))
        )

    def hits(self) -> tuple[bool, str]:
        with self.llm.engine.adjusted(enable_prefix_caching=True):
            self.run(self.requests)
            prompts = [{"prompt_token_ids": tokens} for tokens, _ in self.requests]
            outputs = self.llm.generate(prompts, [params for _, params in self.requests], use_tqdm=False)
        return _with_hits(
            compare("bit-equal", self.expected, [o.outputs[0] for o in outputs]),
            sum(o.num_cached_tokens for o in outputs),
            any(len(tokens) > self.llm.engine_config.page_size for tokens, _ in self.requests),
        )

    def second_turn(self) -> tuple[bool, str]:
        """Prompt and completion as the next prompt: its pages were written by decoding."""
        turns = [
            (tokens + list(sample.token_ids) + [0], params.replace(max_tokens=self.new_tokens))
            for (tokens, params), sample in zip(self.requests, self.expected, strict=True)
        ]
        prompts, params = [{"prompt_token_ids": tokens} for tokens, _ in turns], [params for _, params in turns]
        with self.llm.engine.adjusted(enable_prefix_caching=False):
            cold = self.run(turns)
        with self.llm.engine.adjusted(enable_prefix_caching=True):
            self.run(self.requests)
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return _with_hits(
            compare("bit-equal", cold, [o.outputs[0] for o in outputs]),
            sum(o.num_cached_tokens for o in outputs),
            any(len(tokens) > self.llm.engine_config.page_size for tokens, _ in turns),
        )

    def preempted(self, pages: int) -> tuple[bool, str]:
        """Requests that come to want more pages than there are, in a pool of little more than the longest needs."""
        size, scheduler = self.llm.engine_config.page_size, self.llm.engine.scheduler
        length = min(3 * size + 2, self.room)
        params = SamplingParams(max_tokens=max(length - size + 2, 1), ignore_eos=True, detokenize=False)
        requests = [
            (self.prompt(max(min(size - 2, length - 1), 1)), params.replace(key=sample_key(self.key, 6, i)))
            for i in range(8)
        ]
        expected, before = self.run(requests), scheduler.num_preemptions
        scheduler.page_pool.clear_cache()
        with self.llm.engine.adjusted(held_pages=max(pages - -(-length // size) - 6, 0), enable_prefix_caching=False):
            found = compare("bit-equal", expected, self.run(requests))
        return found.holds, f"{found}, {scheduler.num_preemptions - before} preemptions"


def said(comparison: Comparison) -> tuple[bool, str]:
    return comparison.holds, str(comparison)


def _with_hits(comparison: Comparison, cached: int, expected: bool) -> tuple[bool, str]:
    return comparison.holds and (cached > 0 or not expected), f"{comparison}, {cached} tokens from the cache"


def greedy(traffic: Traffic, count: int) -> tuple[bool, str]:
    """How many different completions one prompt has at temperature 0."""
    request = (
        traffic.prompt(33),
        SamplingParams(max_tokens=traffic.new_tokens, temperature=0.0, ignore_eos=True, detokenize=False),
    )
    found = traffic.mixed([request] * count, traffic.random_requests(count // 4, 2))
    different = {(tuple(s.token_ids), s.token_logprobs.tobytes()) for s in found}
    first = compare("", [found[0]] * count, found).first_difference
    return len(different) == 1, f"{len(different)} different of {count}" + (f"; {first}" if first else "")


def sampled(traffic: Traffic, count: int) -> tuple[bool, str]:
    """Whether each key gives its own sample again."""
    prompt, params = (
        traffic.prompt(33),
        SamplingParams(max_tokens=traffic.new_tokens, ignore_eos=True, detokenize=False),
    )
    requests = [(prompt, params.replace(key=sample_key(traffic.key, 3, i))) for i in range(count)]
    once, twice = (traffic.mixed(requests, traffic.random_requests(count // 4, seed)) for seed in (4, 5))
    some = range(0, count, max(count // 8, 1))
    alone = [traffic.run([requests[i]])[0] for i in some]
    comparisons = [compare("again", once, twice), compare("alone", [once[i] for i in some], alone)]
    different = len({tuple(sample.token_ids) for sample in once})
    return all(c.holds for c in comparisons), f"{', '.join(map(str, comparisons))}; {different} different samples"


def scored(traffic: Traffic) -> tuple[bool, str]:
    """generate's logprobs against those of the trainer's forward pass."""
    rollout = _rollout(traffic.requests, traffic.expected)
    logprobs = traffic.llm.score(rollout.tokens, rollout.mask, [params for _, params in traffic.requests])
    rows = [
        (sample.token_ids, row[mask])
        for sample, row, mask in zip(traffic.expected, logprobs, rollout.mask, strict=True)
    ]
    off = (logprobs - rollout.logprobs)[rollout.mask].astype(np.float64)
    found = compare("bit-equal", traffic.expected, rows)
    return found.holds, f"{found}; max |Δlogprob| {np.abs(off).max()}, KL {-off.mean() + 0.0}"


def drift(traffic: Traffic, count: int) -> tuple[bool, str]:
    """Logprobs of samples at temperature 1 against a plain float32 forward pass."""
    requests = [
        (tokens, SamplingParams(max_tokens=traffic.new_tokens, ignore_eos=True, detokenize=False, key=params.key))
        for tokens, params in traffic.requests[-count:]
    ]
    rollout = _rollout(requests, traffic.run(requests))
    reference = np.stack(
        [plain_logprobs(traffic.llm.params, tokens, model_config=traffic.llm.config) for tokens in rollout.tokens]
    )
    off = (reference - rollout.logprobs)[rollout.mask].astype(np.float64)
    # Unbiased and never negative: Schulman, "Approximating KL Divergence", 2020, k3.
    kl = float(np.mean(np.expm1(off) - off))
    return (
        kl < DRIFT_LIMIT,
        f"mean |Δlogprob| {np.abs(off).mean():.1e}, KL {kl:.1e} over {off.size} tokens (limit {DRIFT_LIMIT})",
    )


def _rollout(requests: Requests, samples: Sequence[CompletionOutput]) -> Rollout:
    return Rollout.from_outputs(
        [RequestOutput("", None, tokens, [sample], True) for (tokens, _), sample in zip(requests, samples, strict=True)]
    )
