"""Aborts, interrupts, no pages, NaN, colliding hashes: the bits of other requests do not move."""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import bits, make_llm
from neighbours import answers, assert_idle, run, start, step

import jaxengine
from jaxengine import LLM, SamplingParams
from jaxengine.engine import engine as engine_module
from jaxengine.host import page_pool
from jaxengine.host.sample import Request, Status

PROMPT = list(range(200, 320))  # a page more is wanted after eight tokens; more than a chunk of the small budget below
VICTIM = SamplingParams(max_tokens=30, seed=5)
OVERLAP = pytest.mark.parametrize("llm", [False, True], ids=["plain", "overlapped"], indirect=True)


@pytest.fixture(scope="module")
def expected(tiny) -> list[tuple]:
    """The neighbours alone, in the plain engine."""
    return run(tiny, start(tiny))


def engine(params, overlap: bool, expected: list[tuple], like: LLM) -> LLM:
    """An engine of the shapes that are compiled already."""
    llm = make_llm(like.config, params, overlap=overlap)
    assert run(llm, start(llm)) == expected
    return llm


@pytest.fixture
def llm(request, tiny, expected) -> LLM:
    return engine(tiny.params, request.param, expected, tiny)


@pytest.fixture(scope="module")
def whole(tiny) -> list[tuple]:
    """What the victim answers without a fault."""
    return run(tiny, start(tiny, [PROMPT], VICTIM.replace(n=2)))


def victim(llm: LLM, name: str = "victim", n: int = 2) -> Request:
    (request,) = start(llm, [PROMPT], VICTIM.replace(n=n), [name])
    return request


def step_until(llm: LLM, condition, held: list[int] | None = None) -> None:
    for _ in range(200):
        if condition():
            return
        step(llm, held)
    raise AssertionError("it never came to that")


def assert_aborted(llm: LLM, request: Request, whole: list[tuple]) -> list[int]:
    """Ended by abort, with the first tokens of its whole answer. Returns how many, for each sample."""
    for (tokens, logprobs, reason, stop_reason), (all_tokens, all_logprobs, *_) in zip(
        answers(llm, [request]), whole, strict=True
    ):
        assert (reason, stop_reason) == ("abort", None)
        assert (
            tokens == all_tokens[: len(tokens)]
            and logprobs == all_logprobs[: len(logprobs)]
            and len(logprobs) == 4 * len(tokens)
        )
    assert llm.session.output(request).finished
    return [len(sample.drawn.token_ids) for sample in request.samples]


# -- abort ------------------------------------------------------------------------------------------------------------


@OVERLAP
def test_abort_of_an_unknown_id_is_nothing(llm, expected):
    assert run(llm, start(llm), lambda: llm.abort("nobody")) == expected


@OVERLAP
@pytest.mark.parametrize("times", [1, 2])
def test_abort_returns_the_tokens_so_far(llm, times, expected, whole):
    beside, request = start(llm), victim(llm)
    step_until(llm, lambda: len(request.samples[1].drawn.token_ids) >= 3)
    for _ in range(times):
        llm.abort("victim")
        assert request.is_finished and not any(s in llm.engine.scheduler.running for s in request.samples), (
            "its pages are free at once"
        )
        llm.engine.scheduler.check_integrity()
    assert min(assert_aborted(llm, request, whole)) >= 3
    assert run(llm, beside) == expected
    assert_aborted(llm, request, whole)
    assert_idle(llm)


@OVERLAP
def test_abort_before_it_was_scheduled(llm, expected, whole):
    beside, request = start(llm), victim(llm)
    llm.abort("victim")
    assert assert_aborted(llm, request, whole) == [0, 0]
    assert run(llm, beside) == expected
    assert_idle(llm)


@OVERLAP
def test_abort_in_the_middle_of_a_prompt(llm, expected, whole, monkeypatch):
    monkeypatch.setattr(
        llm.engine.scheduler, "engine_config", dataclasses.replace(llm.engine_config, max_num_batched_tokens=32)
    )
    llm.engine.scheduler.page_pool.clear_cache()
    beside, request = start(llm), victim(llm)
    step_until(llm, lambda: 0 < request.samples[0].num_computed < len(PROMPT))
    llm.abort("victim")
    assert assert_aborted(llm, request, whole) == [0, 0]
    assert run(llm, beside) == expected
    assert_idle(llm)


@OVERLAP
def test_abort_while_preempted(llm, expected, whole):
    beside, request = start(llm), victim(llm)
    step_until(llm, lambda: len(request.samples[1].drawn.token_ids) >= 3)
    blocks, held = llm.engine.scheduler.page_pool, []
    while request.samples[1].status is Status.RUNNING:
        held += blocks.take(blocks.num_available)
        step(llm, held)
    assert request.samples[1].status is Status.WAITING
    llm.abort("victim")
    assert min(assert_aborted(llm, request, whole)) >= 3
    blocks.release(held)
    assert run(llm, beside) == expected
    assert_idle(llm)


@OVERLAP
def test_abort_after_the_end(llm, expected, whole):
    beside, request = start(llm), victim(llm)
    assert run(llm, [request]) == whole
    llm.abort("victim")
    assert answers(llm, [request]) == whole and request.samples[0].drawn.finish_reason == "length"
    assert run(llm, beside) == expected


@OVERLAP
def test_abort_of_all_requests_at_any_step(llm, expected):
    """The batch again and again, each time cut off a step later; then whole."""
    for at in range(0, 12, 2):
        requests = start(llm)
        run(llm, requests, lambda requests=requests: [llm.abort(r.request_id) for r in requests], at)
        for (tokens, logprobs, *_), (all_tokens, all_logprobs, *_) in zip(
            answers(llm, requests), expected, strict=True
        ):
            assert tokens == all_tokens[: len(tokens)] and logprobs == all_logprobs[: len(logprobs)]
        assert_idle(llm)
    assert run(llm, start(llm)) == expected


# -- the caller goes away ---------------------------------------------------------------------------------------------


@OVERLAP
def test_closing_a_stream_frees_its_pages(llm, expected, whole):
    beside = start(llm)
    stream = llm.stream(PROMPT, VICTIM.replace(n=2), cumulative=True)
    seen = [next(stream) for _ in range(5)]
    assert [len(output.outputs[0].token_ids) for output in seen] == sorted(
        len(output.outputs[0].token_ids) for output in seen
    )
    assert bits(seen[-1:])[0][0] == whole[0][0][: len(seen[-1].outputs[0].token_ids)]
    name = seen[0].request_id
    assert name in llm.engine.requests
    stream.close()
    assert name not in llm.engine.requests and not any(
        s.request.request_id == name for s in llm.engine.scheduler.running
    )
    llm.engine.scheduler.check_integrity()
    assert run(llm, beside) == expected
    assert_idle(llm)


@OVERLAP
def test_a_stream_that_was_never_started_asks_for_nothing(llm):
    llm.stream(PROMPT, VICTIM, cumulative=True).close()
    assert_idle(llm)


@OVERLAP
@pytest.mark.parametrize("name", ["run_decode", "run_prefill"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_in_a_step(llm, name, when, expected, whole, monkeypatch):
    """The call ends with KeyboardInterrupt and leaves nothing; donated buffers are rebuilt, other requests go on."""
    original, calls = getattr(llm.engine.step_variants, name), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 1 and when == "before":
            signal.raise_signal(signal.SIGINT)
        out = original(*args)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)
        return out

    beside = start(llm)
    step(llm), step(llm)
    monkeypatch.setattr(llm.engine.step_variants, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT, [1, 2]], VICTIM)
    assert set(llm.engine.requests) == {request.request_id for request in beside}
    llm.engine.scheduler.check_integrity()
    assert run(llm, beside) == expected
    assert run(llm, [victim(llm)]) == whole
    assert_idle(llm)


def interrupt_at(line: int, counter: list[int]):
    """A trace function that raises KeyboardInterrupt at a line, counted over all that the host half executes."""
    names = (
        "engine/engine.py",
        "host/scheduler.py",
        "host/page_pool.py",
        "host/queue.py",
        "engine/batch.py",
        "host/sample.py",
        "engine/collect.py",
    )
    files = {str(Path(jaxengine.__file__).parent / name) for name in names}
    assert all(map(os.path.exists, files)), "a file has moved: nothing in it would be interrupted"

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in files:
            return None
        counter[0] += event == "line"
        if counter[0] == line:
            counter[0] += 1
            raise KeyboardInterrupt
        return trace

    return trace


class Read:
    """A detokenizer that only remembers what it was given."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = list(token_ids)

    def push(self, token_ids) -> None:
        self.token_ids += token_ids

    def finish(self) -> None:
        pass


@OVERLAP
@pytest.mark.parametrize("at", [0, 1, 5], ids=["prefill", "forks decode", "some end"])
def test_ctrl_c_at_any_line_of_a_step(llm, at, expected, monkeypatch):
    """At any line no page is lost, no token is half written down, none is read twice, and the bits are the same."""
    monkeypatch.setattr(llm.engine, "tokenizer", object())  # without one no sample has a detokenizer
    monkeypatch.setattr(engine_module, "detokenizer_of", lambda tokenizer, sample: Read(sample.drawn.token_ids))

    def start_read() -> list[Request]:
        llm.engine.scheduler.page_pool.clear_cache()
        requests = start(llm)
        for sample in (sample for request in requests for sample in request.samples):
            sample.detokenizer = Read([])
        return requests

    def interrupted_step(line: int) -> int:
        counter, before = [0], sys.gettrace()
        sys.settrace(interrupt_at(line, counter))
        try:
            llm.engine.step()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        llm.engine.scheduler.check_integrity()
        return counter[0]

    num_lines = []
    assert run(llm, start_read(), lambda: num_lines.append(interrupted_step(-1)), at) == expected
    assert num_lines[0] > 100
    for line in range(1, num_lines[0], num_lines[0] // 15):
        requests = start_read()
        assert run(llm, requests, lambda line=line: interrupted_step(line), at) == expected, (
            f"interrupted at line {line}"
        )
        assert all(s.detokenizer.token_ids == s.drawn.token_ids for r in requests for s in r.samples), (
            f"interrupted at line {line}"
        )
        assert_idle(llm)


# -- no pages ---------------------------------------------------------------------------------------------------------


@OVERLAP
@pytest.mark.parametrize("spare", [4, 7])
def test_without_pages_the_newest_is_preempted_and_recomputed(llm, spare, expected):
    """Six requests that grow to four pages each, and four or seven pages for all. With four they run one by one."""
    grow = lambda: start(
        llm, [[i] * 20 for i in range(1, 7)], [SamplingParams(max_tokens=100, temperature=i % 2) for i in range(6)]
    )
    right, blocks, preempted = run(llm, grow()), llm.engine.scheduler.page_pool, []
    blocks.clear_cache()
    held, preempt = blocks.take(blocks.num_available - spare), llm.engine.scheduler.preempt

    def watched(sequence):
        assert sequence is llm.engine.scheduler.running[-1], "the newest goes first"
        preempted.append(sequence)
        preempt(sequence)

    llm.engine.scheduler.preempt = watched
    requests, num_steps = grow(), 0
    while not all(request.is_finished for request in requests):
        step(llm, held)
        num_steps += 1
    assert answers(llm, requests) == right
    assert preempted and requests[0].samples[0] not in preempted
    assert num_steps <= 6 * 100 + len(preempted) + 6, "every step brings a token, or a prompt"
    blocks.release(held)
    assert run(llm, start(llm)) == expected
    assert_idle(llm)


def test_a_request_larger_than_the_pool_is_refused(tiny):
    llm = make_llm(tiny.config, tiny.params, num_pages=5)
    (waiting,) = start(llm, [[1, 2, 3]], SamplingParams(max_tokens=5))
    for prompt, max_tokens, needed in (([7] * 100, 60, 5), ([7] * 300, 1, 10), ([7] * 128, None, 16)):
        with pytest.raises(
            ValueError, match=rf"prompts\[1\] needs {needed} pages of 32 tokens, the pool has 4: raise num_pages"
        ):
            llm.generate([[1, 2], prompt], SamplingParams(max_tokens=max_tokens))
    assert list(llm.engine.requests.values()) == [waiting]
    (fits,) = start(llm, [[7] * 100], SamplingParams(max_tokens=28))
    (open_ended,) = start(llm, [[7] * 100], SamplingParams())
    assert fits.limit == open_ended.limit == 128


# -- logits that are no numbers ---------------------------------------------------------------------------------------

# The token whose embedding is not finite: sequences that hold it get NaN logits, no others, nor does the probe.
BAD = 778
CAUSE = "the model's logits were not finite"


@pytest.fixture(params=[(False, np.nan), (True, np.nan), (False, np.inf)], ids=["plain", "overlapped", "infinite"])
def poisoned(request, tiny, expected) -> LLM:
    overlap, value = request.param
    params = dataclasses.replace(tiny.params, embed=tiny.params.embed.at[0, BAD].set(value))
    return engine(params, overlap, expected, tiny)


def pages_of(request: Request) -> set[int]:
    return {page for sample in request.samples for page in sample.pages}


@pytest.mark.parametrize("where", [0, 20, 69])
def test_a_request_with_nan_logits_ends_in_error(poisoned, where, expected):
    prompt = list(range(300, 370))
    prompt[where] = BAD
    requests = [*start(poisoned, [prompt], SamplingParams(n=3, max_tokens=9)), *start(poisoned)]
    found = run(poisoned, requests)
    assert found[:3] == [([], b"", "error", CAUSE)] * 3, "nothing is drawn"
    assert found[3:] == expected
    assert_idle(poisoned)


def test_a_drawn_token_may_lead_to_nan(poisoned, expected):
    """The model may answer with that token, because its own logits come from the head; no second one follows it."""
    (request,), beside = (
        start(poisoned, [[1, 2, 3]], SamplingParams(max_tokens=9, temperature=0, logit_bias={BAD: 1e4})),
        start(poisoned),
    )
    assert run(poisoned, beside) == expected
    ((tokens, logprobs, reason, cause),) = answers(poisoned, [request])
    assert (tokens, len(logprobs), reason, cause) == ([BAD], 4, "error", CAUSE)
    assert_idle(poisoned)


def test_pages_with_nan_may_be_used_again(poisoned, expected):
    """The pages of a failed request go to the next one, which reads nothing of what was in them."""
    poisoned.engine.scheduler.page_pool.clear_cache()
    (request,) = start(poisoned, [[BAD] * 300], SamplingParams(max_tokens=9))
    plan = poisoned.engine.scheduler.schedule
    seen: list[set[int]] = []
    poisoned.engine.scheduler.schedule = lambda: (plan(), seen.append(pages_of(request)))[0]
    run(poisoned, [request])
    bad = set().union(*seen)
    del poisoned.engine.scheduler.schedule
    assert all(np.isnan(np.asarray(poisoned.engine.cache.keys[0][page])).any() for page in bad) and len(bad) == 10
    requests, used = start(poisoned), set()
    run(poisoned, requests, lambda: used.update(*map(pages_of, requests)))
    assert len(used & bad) >= 5
    assert answers(poisoned, requests) == expected


def test_pages_of_a_failed_request_leave_the_prefix_cache(poisoned, expected):
    front = list(range(400, 464))
    (clean,) = poisoned.generate([[*front, 1]], SamplingParams(max_tokens=2), key=jax.random.key(0))
    match = lambda tokens: poisoned.engine.scheduler.page_pool.match([*tokens, 1], 0, "")
    assert len(match(front)) == 2
    for _ in range(2):
        (output,) = poisoned.generate([[*front, BAD, *front]], SamplingParams(max_tokens=2))
        assert output.outputs[0].finish_reason == "error"
        assert match(front) == match([*front, BAD, *front]) == []
    again = poisoned.generate([[*front, 1]], SamplingParams(max_tokens=2), key=jax.random.key(0))
    assert bits(again) == bits([clean])
    assert run(poisoned, start(poisoned)) == expected
    assert_idle(poisoned)


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_logits_that_overflow_under_a_temperature_are_an_error(overlap, tiny):
    """The model's are finite; divided by a small temperature they are not, and the softmax of infinities is NaN."""
    huge = dataclasses.replace(tiny.params, head=tiny.params.head * 1e35)
    llm = make_llm(tiny.config, huge, overlap=overlap)
    alone = run(llm, start(llm))
    assert {reason for *_, reason, _ in alone} == {"length"}
    requests = [*start(llm, [[1, 2, 3]], SamplingParams(temperature=2e-5, max_tokens=5)), *start(llm)]
    assert run(llm, requests) == [([], b"", "error", CAUSE), *alone]
    assert_idle(llm)


def test_prompt_logprobs_of_a_poisoned_prompt_are_an_error(poisoned, expected):
    prompt = list(range(300, 340)) + [BAD, 5]
    beside = start(poisoned)
    (output,) = poisoned.generate([prompt], SamplingParams(prompt_logprobs=1, max_tokens=3))
    assert (output.outputs[0].finish_reason, output.outputs[0].token_ids) == ("error", [])
    assert run(poisoned, beside) == expected


# -- colliding prefix hashes ------------------------------------------------------------------------------------------


@OVERLAP
def test_a_prefix_hash_collision_serves_no_other_prompts_pages(llm, expected, monkeypatch):
    """Every page has the same hash. Equal tokens are still found, other ones are not."""
    params, key = SamplingParams(max_tokens=6), jax.random.key(1)
    prompts = [[i] * 40 for i in range(1, 5)]
    alone = [bits(llm.generate([prompt], params, key=key)) for prompt in prompts]
    llm.engine.scheduler.page_pool.clear_cache()
    monkeypatch.setattr(page_pool, "chain_digest", lambda parent, tokens: b"all the same")
    for prompt, right in zip(prompts, alone, strict=True):
        for cached in (0, 32):
            (output,) = llm.generate([prompt], params, key=key)
            assert (output.num_cached_tokens, bits([output])) == (cached, right)
    for salt, cached in (("a", 0), ("a", 32), ("b", 0)):
        (output,) = llm.generate({"prompt_token_ids": prompts[0], "cache_salt": salt}, params, key=key)
        assert (output.num_cached_tokens, bits([output])) == (cached, alone[0])
    assert run(llm, start(llm)) == expected
    llm.engine.scheduler.page_pool.clear_cache()
