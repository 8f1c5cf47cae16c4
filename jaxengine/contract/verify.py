"""The contract on the user's own machine and model: every axis is run with random traffic, and every bit compared.

`llm.verify()` in a notebook, `jaxengine verify MODEL` on a command line. A check runs the same requests in another way,
on the engine that serves, and compares tokens and logprobs as uint32 with those of the plain batch.
"""

import dataclasses
import hashlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from jaxengine.base.keys import sample_key, seeded
from jaxengine.base.progress import Report, say_nothing
from jaxengine.config import QUERY_BLOCK
from jaxengine.contract.compare import Comparison, compare
from jaxengine.contract.report import Check, Verification
from jaxengine.device.scoring import plain_logprobs
from jaxengine.engine import scoring_proof
from jaxengine.engine.lockstep import as_one
from jaxengine.engine.replicas import Replicas
from jaxengine.engine.scoring_proof import NothingHoldsError
from jaxengine.engine.session import Session
from jaxengine.models.params import Decoder
from jaxengine.outputs import CompletionOutput, RequestOutput
from jaxengine.rl.rollout import Rollout
from jaxengine.sampling_params import SamplingParams
from pallas_kernels.numbers import cdiv
from sharding.distributed import gathered
from sharding.mesh import on_host

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
PLAIN = SamplingParams(ignore_eos=True, detokenize=False)
Requests = list[tuple[list[int], SamplingParams]]


class Outcome(NamedTuple):
    """Whether every bit stayed, and the figures or the first difference in words."""

    holds: bool
    text: str


class Axis(NamedTuple):
    """One check to run: the contract's axis, what is changed, and the run."""

    name: str
    what: str
    run: Callable[[], Outcome]


def verify(
    session: Session, *, quick: bool = False, samples: int | None = None, seed: int = 0, report: Report = say_nothing
) -> Verification:
    """Run every check, as `run_checks`, and tell what this machine refuses."""
    checks = list(run_checks(session, quick=quick, samples=samples, seed=seed, report=report))
    refused = [str(variant) for variant in session.engine.step_variants.refused]
    refused += map(str, scoring_proof.refused(session.model_config, session.engine.kernels))
    return Verification(session.contract(), refused, checks)


def run_checks(
    session: Session, *, quick: bool = False, samples: int | None = None, seed: int = 0, report: Report = say_nothing
) -> Iterator[Check]:
    """Every check, as soon as it is done.

    `samples` of one prompt are drawn at temperature 0 and at temperature 1 among random traffic: 1,000 unless said
    otherwise, 100 with `quick`. `seed` makes the traffic. The engine must be idle; afterwards it is as it was, except
    for its prefix cache. Raises ValueError where it has work, and for fewer than two samples.
    """
    count = samples if samples is not None else (QUICK_SAMPLES if quick else SAMPLES)
    if count < 2:
        raise ValueError(f"samples must be at least 2, got {count}")
    with session.runner.reserved():
        for axis in _axes(Traffic(session, seed), quick, count):
            report(f"{axis.name}: {axis.what} …")
            start = time.perf_counter()
            outcome = axis.run()
            yield Check(axis.name, axis.what, outcome.holds, outcome.text, time.perf_counter() - start)


def _axes(traffic: "Traffic", quick: bool, count: int) -> Iterator[Axis]:
    config = traffic.session.engine_config
    yield Axis("C1", "the same call again", traffic.again)
    yield Axis("C2", "every request alone", partial(traffic.alone, 6 if quick else len(LENGTHS)))
    yield Axis("C2", "shuffled among others", traffic.shuffled)
    yield Axis("C2", f"temperature 0, {count} times among random traffic", partial(greedy, traffic, count))
    yield Axis("C2", f"temperature 1, {count} keys, twice among random traffic", partial(sampled, traffic, count))
    for chunk in (QUERY_BLOCK, 3 * QUERY_BLOCK):
        chunked = partial(traffic.again, max_num_batched_tokens=chunk, enable_prefix_caching=False)
        yield Axis("C3", f"prefill in chunks of {chunk}", chunked)
    yield Axis("C4", "prefix cache off", partial(traffic.again, enable_prefix_caching=False))
    yield Axis("C4", "hits on prompt pages", traffic.hits)
    yield Axis("C4", "hits on generated pages", traffic.second_turn)
    yield Axis("C5", "preempted and recomputed", traffic.preempted)
    held_slots = config.max_num_seqs - min(3, config.max_num_seqs)
    yield Axis("C6", "few slots", partial(traffic.again, held_slots=held_slots))
    loop = "the plain loop" if config.overlap else "the overlapped loop"
    yield Axis("C7", loop, partial(traffic.again, overlap=not config.overlap))
    engine = traffic.session.engine
    if isinstance(engine, Replicas):
        for index in range(engine.num_replicas):
            yield Axis("C8", f"replica {index} alone", partial(traffic.on_replica, engine, index))
    if engine.kernels.split is not None:
        yield Axis("C9", f"one device against {engine.kernels.split.degree} that share it", traffic.on_one_device)
    if engine.lockstep is not None:
        yield Axis("C10", f"all {1 + len(engine.lockstep.others)} processes against each other", traffic.in_processes)
    yield Axis("C11", "score against generate", partial(scored, traffic))
    yield Axis("drift", "against plain float32", partial(drift, traffic, 4 if quick else len(LENGTHS)))


class Traffic:
    """A mixed batch of random requests, each with its own key, and its answers from the plain batch."""

    def __init__(self, session: Session, seed: int) -> None:
        self.session, self.key = session, seeded(seed)
        self.rng = random.Random(seed)
        config = session.engine_config
        self.room = min(config.max_model_len, (config.num_pages - 1) * config.page_size)
        self.new_tokens = max(min(24, self.room // 4), 1)
        lengths = [n for n in LENGTHS if n <= self.room - 2 * self.new_tokens - 2] or [1]
        self.requests = [(self.prompt(n), self._sampling(i)) for i, n in enumerate(lengths)]
        self.expected = self.run(self.requests)

    @property
    def page_size(self) -> int:
        return self.session.engine_config.page_size

    def prompt(self, length: int) -> list[int]:
        return [self.rng.randrange(self.session.model_config.vocab_size) for _ in range(length)]

    def _sampling(self, i: int) -> SamplingParams:
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

    def outputs(self, requests: Requests) -> list[RequestOutput]:
        return _outputs(self.session, requests)

    def run(self, requests: Requests) -> list[CompletionOutput]:
        return _first_samples(self.session, requests)

    def random_requests(self, count: int, seed: int) -> Requests:
        sampling = PLAIN.replace(max_tokens=self.new_tokens)
        prompts = [self.prompt(self.rng.choice(LENGTHS[:8])) for _ in range(count)]
        return [(prompt, sampling.replace(key=sample_key(self.key, seed, i))) for i, prompt in enumerate(prompts)]

    def mixed(self, requests: Requests, others: Requests) -> list[CompletionOutput]:
        """Answers of `requests`, run shuffled among others."""
        order = list(range(len(requests) + len(others)))
        self.rng.shuffle(order)
        outputs = dict(zip(order, self.run([(requests + others)[i] for i in order]), strict=True))
        return [outputs[i] for i in range(len(requests))]

    # -- the axes that change how the same requests run ---------------------------------------------------------------

    def again(self, **adjusted: int) -> Outcome:
        """The same requests from an empty prefix cache, with the engine adjusted (Engine.adjusted)."""
        self.session.engine.clear_prefix_cache()
        with self.session.engine.adjusted(**adjusted):
            return _outcome(compare("bit-equal", self.expected, self.run(self.requests)))

    def alone(self, count: int) -> Outcome:
        step = max(len(self.requests) // count, 1)
        with self.session.engine.adjusted(enable_prefix_caching=False):
            outputs = [self.run([request])[0] for request in self.requests[::step]]
        return _outcome(compare("bit-equal", self.expected[::step], outputs))

    def shuffled(self) -> Outcome:
        others = self.random_requests(len(self.requests), 1)
        return _outcome(compare("bit-equal", self.expected, self.mixed(self.requests, others)))

    def hits(self) -> Outcome:
        return self._from_cache(self.requests, self.expected)

    def second_turn(self) -> Outcome:
        """Prompt and completion as the next prompt: its pages were written by decoding."""
        turns = [
            (tokens + list(sample.token_ids) + [0], sampling.replace(max_tokens=self.new_tokens))
            for (tokens, sampling), sample in zip(self.requests, self.expected, strict=True)
        ]
        with self.session.engine.adjusted(enable_prefix_caching=False):
            cold = self.run(turns)
        return self._from_cache(turns, cold)

    def _from_cache(self, requests: Requests, expected: list[CompletionOutput]) -> Outcome:
        """`requests` after the traffic's own have filled the prefix cache; where pages are full, some must be hit."""
        with self.session.engine.adjusted(enable_prefix_caching=True):
            self.run(self.requests)
            outputs = self.outputs(requests)
        comparison = compare("bit-equal", expected, [output.outputs[0] for output in outputs])
        cached = sum(output.num_cached_tokens for output in outputs)
        must_hit = any(len(tokens) > self.page_size for tokens, _ in requests)
        return Outcome(
            comparison.holds and (cached > 0 or not must_hit), f"{comparison}, {cached} tokens from the cache"
        )

    def preempted(self) -> Outcome:
        """Requests that come to want more pages than there are, in a pool of little more than the longest needs."""
        size, engine = self.page_size, self.session.engine
        length = min(3 * size + 2, self.room)
        sampling = PLAIN.replace(max_tokens=max(length - size + 2, 1))
        prompts = [self.prompt(max(min(size - 2, length - 1), 1)) for _ in range(8)]
        requests = [(prompt, sampling.replace(key=sample_key(self.key, 6, i))) for i, prompt in enumerate(prompts)]
        expected, before = self.run(requests), engine.occupancy().preemptions
        engine.clear_prefix_cache()
        held_pages = max(self.session.engine_config.num_pages - 1 - cdiv(length, size) - 6, 0)
        with engine.adjusted(held_pages=held_pages, enable_prefix_caching=False):
            comparison = compare("bit-equal", expected, self.run(requests))
        return Outcome(comparison.holds, f"{comparison}, {engine.occupancy().preemptions - before} preemptions")

    def on_replica(self, replicas: Replicas, index: int) -> Outcome:
        self.session.engine.clear_prefix_cache()
        with replicas.only(index):
            return _outcome(compare("bit-equal", self.expected, self.run(self.requests)))

    def in_processes(self) -> Outcome:
        """What each process was told by its own devices."""
        own = _digest(self.expected)
        with as_one(self.session.engine.lockstep, "C10 of verify"):
            digests = gathered(own)
        different = [process for process, digest in enumerate(digests) if digest != own]
        text = f"the same bits in {len(digests)} processes"
        return Outcome(not different, f"other bits in process {different[0]}" if different else text)

    def on_one_device(self) -> Outcome:
        """The whole model on a device of this process; where it has no room, what was proven of one layer
        (engine/mesh_proof.py).
        """
        config, params = self.session.engine_config, self._params_here()
        pages = min(config.num_pages, len(self.requests) * cdiv(self.room, config.page_size))
        alone = dataclasses.replace(config, mesh=None, num_pages=pages)
        try:
            session = Session(self.session.model_config, alone, params, None)
        except MemoryError:
            return Outcome(True, "of one layer alone: the model does not fit one device")
        try:
            return _outcome(compare("bit-equal", self.expected, _first_samples(session, self.requests)))
        finally:
            session.close()

    def _params_here(self) -> Decoder | None:
        """The weights; where their parts lie in several processes, all of them on a device of this one."""
        params = self.session.params
        if self.session.engine.lockstep is None:
            return params
        return jax.tree.map(lambda x: jax.device_put(on_host(x), jax.local_devices()[0]), params)


def _digest(samples: Sequence[CompletionOutput]) -> bytes:
    """SHA-256 of the samples' tokens and logprobs."""
    parts = [np.asarray(sample.token_ids, np.int32).tobytes() + sample.token_logprobs.tobytes() for sample in samples]
    return hashlib.sha256(b"".join(parts)).digest()


def _outputs(session: Session, requests: Requests) -> list[RequestOutput]:
    prompts = [{"prompt_token_ids": tokens} for tokens, _ in requests]
    return session.complete(session.requests(prompts, [sampling for _, sampling in requests], (0, 0)))


def _first_samples(session: Session, requests: Requests) -> list[CompletionOutput]:
    return [output.outputs[0] for output in _outputs(session, requests)]


def _outcome(comparison: Comparison) -> Outcome:
    return Outcome(comparison.holds, str(comparison))


def greedy(traffic: Traffic, count: int) -> Outcome:
    """How many different completions one prompt has at temperature 0."""
    request = (traffic.prompt(33), PLAIN.replace(max_tokens=traffic.new_tokens, temperature=0.0))
    samples = traffic.mixed([request] * count, traffic.random_requests(count // 4, 2))
    different = {(tuple(sample.token_ids), sample.token_logprobs.tobytes()) for sample in samples}
    difference = compare("", [samples[0]] * count, samples).first_difference
    return Outcome(
        len(different) == 1, f"{len(different)} different of {count}" + (f"; {difference}" if difference else "")
    )


def sampled(traffic: Traffic, count: int) -> Outcome:
    """Whether each key gives its own sample again."""
    prompt, sampling = traffic.prompt(33), PLAIN.replace(max_tokens=traffic.new_tokens)
    requests = [(prompt, sampling.replace(key=sample_key(traffic.key, 3, i))) for i in range(count)]
    once, twice = (traffic.mixed(requests, traffic.random_requests(count // 4, seed)) for seed in (4, 5))
    some = range(0, count, max(count // 8, 1))
    alone = [traffic.run([requests[i]])[0] for i in some]
    comparisons = [compare("again", once, twice), compare("alone", [once[i] for i in some], alone)]
    different = len({tuple(sample.token_ids) for sample in once})
    text = f"{', '.join(map(str, comparisons))}; {different} different samples"
    return Outcome(all(comparison.holds for comparison in comparisons), text)


def scored(traffic: Traffic) -> Outcome:
    """generate's logprobs against those of the trainer's forward pass."""
    rollout = _rollout(traffic.requests, traffic.expected)
    sampling = [sampling for _, sampling in traffic.requests]
    try:
        logprobs, _ = traffic.session.score(rollout.tokens, rollout.mask, sampling, entropy=False)
    except NothingHoldsError as refusal:
        return Outcome(False, str(refusal))
    rows = [
        (sample.token_ids, row[mask])
        for sample, row, mask in zip(traffic.expected, logprobs, rollout.mask, strict=True)
    ]
    off = (logprobs - rollout.logprobs)[rollout.mask].astype(np.float64)
    comparison = compare("bit-equal", traffic.expected, rows)
    return Outcome(comparison.holds, f"{comparison}; max |Δlogprob| {np.abs(off).max()}, KL {-off.mean() + 0.0}")


def drift(traffic: Traffic, count: int) -> Outcome:
    """Logprobs of samples at temperature 1 against a plain float32 forward pass."""
    sampling, session = PLAIN.replace(max_tokens=traffic.new_tokens), traffic.session
    requests = [(tokens, sampling.replace(key=own.key)) for tokens, own in traffic.requests[-count:]]
    rollout = _rollout(requests, traffic.run(requests))
    assert session.params is not None
    rows = [plain_logprobs(session.params, tokens, model_config=session.model_config) for tokens in rollout.tokens]
    off = (np.stack(rows) - rollout.logprobs)[rollout.mask].astype(np.float64)
    # Unbiased and never negative: Schulman, "Approximating KL Divergence", 2020, k3.
    kl = float(np.mean(np.expm1(off) - off))
    mean = np.abs(off).mean()
    return Outcome(
        kl < DRIFT_LIMIT, f"mean |Δlogprob| {mean:.1e}, KL {kl:.1e} over {off.size} tokens (limit {DRIFT_LIMIT})"
    )


def _rollout(requests: Requests, samples: Sequence[CompletionOutput]) -> Rollout:
    outputs = [
        RequestOutput("", None, tokens, [sample], True) for (tokens, _), sample in zip(requests, samples, strict=True)
    ]
    return Rollout.from_outputs(outputs)
