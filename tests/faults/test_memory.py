"""No memory on the device, at start or in a step: requests outside of it keep their bits, the engine stays usable."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import pytest
from conftest import make_llm
from neighbours import answers, assert_idle, run, start, step

from jaxengine import LLM, SamplingParams
from jaxengine.device import kv_cache, steps
from jaxengine.engine import memory
from jaxengine.host.sample import Request

SIZE = r"\d+\.\d\d"
WANTED = rf"weights {SIZE} GB, cache {SIZE} GB \(\d+ pages of {SIZE} MB\), workspace about {SIZE} GB, together .* GB; "
SETTINGS = (
    "lower num_pages, max_num_seqs or max_model_len for the cache, max_num_batched_tokens for the workspace, "
    "or take a dtype smaller than"
)
VICTIM = SamplingParams(max_tokens=30, seed=5)
PROMPT = list(range(200, 320))


@pytest.fixture(scope="module")
def expected(tiny) -> list[tuple]:
    return run(tiny, start(tiny))


@pytest.fixture(scope="module")
def whole(tiny) -> list[tuple]:
    """What the victim answers without a fault."""
    return run(tiny, start(tiny, [PROMPT], VICTIM))


@pytest.fixture(params=[False, True], ids=["plain", "overlapped"])
def llm(request, tiny) -> LLM:
    """Its steps are compiled and proven, so that a fault hits the step that it is planted in."""
    llm = make_llm(tiny.config, tiny.params, overlap=request.param)
    llm.warm_up()
    return llm


@pytest.fixture(params=[False, True], ids=["plain", "overlapped"])
def taking_turns(request, tiny) -> LLM:
    """As `llm`, of several steps a dispatch, so that no sample that decodes rides along in a prefill."""
    llm = make_llm(tiny.config, tiny.params, overlap=request.param, decode_steps=2)
    llm.warm_up()
    return llm


# -- at start ---------------------------------------------------------------------------------------------------------


def too_large(*args):
    """More than any machine has: XLA's own error."""
    return jnp.zeros((10**15,), jnp.float32)


def no_host_memory(*args, **kwargs):
    raise MemoryError("the host's own words")


@pytest.mark.parametrize("fault", [too_large, no_host_memory])
@pytest.mark.parametrize("doing", ["loading the weights", "making room for the cache"])
def test_no_memory_at_start_says_what_is_wanted_and_what_to_change(doing, fault, tiny, expected, monkeypatch):
    def starting():
        with (
            monkeypatch.context() as patched,
            pytest.raises(MemoryError, match=f"out of memory while {doing}: {WANTED}{SETTINGS}"),
        ):
            patched.setattr(*((kv_cache, "empty_cache") if "cache" in doing else (jax, "device_put")), fault)
            LLM("calc", progress=False, num_pages=200)

    requests = start(tiny)
    step(tiny)
    starting()
    assert run(tiny, requests) == expected
    assert_idle(tiny)


def test_other_errors_at_start_are_left_as_they_are(tiny, monkeypatch):
    def broken(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(kv_cache, "empty_cache", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="^INTERNAL: something else"):
        make_llm(tiny.config, tiny.params)


def test_a_pool_larger_than_the_machine_is_refused_before_it_is_taken(tiny, monkeypatch):
    """The host's own lists of pages would already fill the machine."""
    monkeypatch.setattr(kv_cache, "empty_cache", lambda *args: pytest.fail("it was taken"))
    with pytest.raises(
        MemoryError, match=rf"this machine has \d+\.\d\d GB of memory in all: {WANTED}{SETTINGS} float32"
    ):
        make_llm(tiny.config, tiny.params, num_pages=10**10)


def test_no_memory_while_compiling_ahead(tiny, monkeypatch):
    llm = make_llm(tiny.config, tiny.params)
    with monkeypatch.context() as patched, pytest.raises(MemoryError, match=f"out of memory while compiling: {WANTED}"):
        patched.setattr(steps, "decode_step", short_of_memory(steps.decode_step, 0, "after it"))
        llm.warm_up()
    requests = start(llm, [PROMPT], VICTIM)
    assert run(llm, requests) == run(tiny, start(tiny, [PROMPT], VICTIM))


# -- in a step --------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, donate_argnums=0)
def needing_too_much(x):
    """XLA takes the arguments and answers; only reading the answer raises that there was no memory."""
    return x + jax.lax.sort(jax.lax.iota(jnp.float32, 10**13) * x.ravel()[:1].sum(dtype=jnp.float32))[0].astype(x.dtype)


def short_of_memory(original, at: int, when: str):
    """The step whose call number `at` finds no memory: before it took the cache, after it, or when it is read."""
    calls = itertools.count()

    def called(params, cache, *args, **kwargs):
        fails = next(calls) == at
        if fails and when == "before it":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
        cache, out = original(params, cache, *args, **kwargs)
        if fails and when == "after it":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")
        return jax.tree.map(needing_too_much, (cache, out)) if fails else (cache, out)

    called.lower = original.lower
    return called


WHEN = pytest.mark.parametrize("when", ["before it", "after it", "when it is read"])
CAUSE = f"^the device ran out of memory: {WANTED}{SETTINGS}"


def assert_failed(llm: LLM, request: Request, whole: list[tuple], at_least: int) -> None:
    """Ended by an error that says what is wanted, with the first tokens of its whole answer."""
    output = llm.session.output(request)
    ((all_tokens, all_logprobs, *_),) = whole
    (sample,) = output.outputs
    assert output.finished and sample.finish_reason == "error" and re.match(CAUSE, str(sample.stop_reason))
    assert (
        at_least <= len(sample.token_ids) < len(all_tokens) and sample.token_ids == all_tokens[: len(sample.token_ids)]
    )
    assert sample.token_logprobs.tobytes() == all_logprobs[: 4 * len(sample.token_ids)]


@WHEN
def test_no_memory_to_decode_fails_those_that_decode(taking_turns, when, expected, whole, monkeypatch):
    """The victim is in the decode that fails; the others' prompts are in the same plan, and are computed again."""
    llm = taking_turns
    (victim,) = start(llm, [PROMPT], VICTIM)
    while len(victim.samples[0].drawn.token_ids) < 5:
        step(llm)
    beside = start(llm)
    monkeypatch.setattr(steps, "decode_step", short_of_memory(steps.decode_step, 0, when))
    step(llm)
    assert run(llm, beside) == expected
    assert_failed(llm, victim, whole, 4)
    assert run(llm, start(llm, [PROMPT], VICTIM)) == whole
    assert_idle(llm)


def test_a_proof_does_not_answer_for_the_step_before(tiny, expected, whole, monkeypatch):
    """What the device still does when a step is first wanted fails in the midst of its proof."""
    llm = make_llm(tiny.config, tiny.params, overlap=True)
    (victim,) = start(llm, [PROMPT], VICTIM)
    while len(victim.samples[0].drawn.token_ids) < 5:
        step(llm)
    with monkeypatch.context() as patched:
        patched.setattr(steps, "decode_step", short_of_memory(steps.decode_step, 0, "when it is read"))
        step(llm)
    assert run(llm, start(llm)) == expected
    assert_failed(llm, victim, whole, 4)


@WHEN
def test_no_memory_to_prefill_fails_those_that_prefill(llm, when, expected, whole, monkeypatch):
    """The victim comes to others that decode by now, whose keys and values may be lost; they are computed again."""
    beside = start(llm)
    for _ in range(4):
        step(llm)
    monkeypatch.setattr(steps, "prefill_step", short_of_memory(steps.prefill_step, 0, when))
    (victim,) = start(llm, [PROMPT], VICTIM)
    assert run(llm, beside) == expected
    assert_failed(llm, victim, whole, 0)
    assert run(llm, start(llm, [PROMPT], VICTIM)) == whole
    assert_idle(llm)


@WHEN
def test_no_memory_in_each_decode_ends_all_in_bounded_time(llm, when, expected, monkeypatch):
    with monkeypatch.context() as patched:
        for at in range(3):
            patched.setattr(steps, "decode_step", short_of_memory(steps.decode_step, at, when))
        requests = start(llm)
        ends = [request for _ in range(40) for request in llm.engine.step()]
    assert (
        all(request.is_finished for request in requests)
        and {id(r) for r in ends} == {id(r) for r in requests}
        and len(ends) == len(requests)
    )
    assert {reason for *_, reason, _ in answers(llm, requests)} <= {"error", "length", "stop"}
    assert run(llm, start(llm)) == expected
    assert_idle(llm)


def test_generate_returns_what_failed_beside_what_did_not(llm, expected, monkeypatch):
    monkeypatch.setattr(steps, "prefill_step", short_of_memory(steps.prefill_step, 0, "after it"))
    (output,) = llm.generate([PROMPT], VICTIM)
    assert output.finished and output.outputs[0].finish_reason == "error" and output.outputs[0].token_ids == []
    assert run(llm, start(llm)) == expected


@pytest.mark.parametrize("message", ["INTERNAL: the device is gone", "RESOURCE_EXHAUSTED: too many compilations"])
def test_other_errors_are_raised_as_before(llm, message, expected, monkeypatch):
    """Also memory that ran out outside of any step."""

    def broken(*args, **kwargs):
        raise jax.errors.JaxRuntimeError(message)

    beside = start(llm)
    step(llm)
    with monkeypatch.context() as patched, pytest.raises(jax.errors.JaxRuntimeError, match=message):
        patched.setattr(
            *((steps, "decode_step") if "INTERNAL" in message else (llm.engine.scheduler, "schedule")), broken
        )
        llm.engine.step()
    assert run(llm, beside) == expected


def test_a_cache_that_only_answers_with_an_error_is_lost(tiny):
    cache = kv_cache.empty_cache(tiny.config, tiny.engine_config, tiny.engine.kernels, tiny.params)
    assert not kv_cache.is_lost(cache)
    poisoned = jax.tree.map(needing_too_much, cache)
    assert not any(x.is_deleted() for x in jax.tree.leaves(poisoned)) and all(
        x.is_deleted() for x in jax.tree.leaves(cache)
    )
    assert kv_cache.is_lost(poisoned) and kv_cache.is_lost(cache)
    assert not kv_cache.is_lost(kv_cache.rebuild(poisoned, tiny.config, tiny.engine_config, tiny.engine.kernels))
    assert all(x.is_deleted() for x in jax.tree.leaves(poisoned)), "there is room for one cache"
    for ask in (
        needing_too_much,
        lambda x: needing_too_much(x) + 1,
    ):  # computing on with the answer raises in other words
        with pytest.raises(jax.errors.JaxRuntimeError) as found:
            ask(jnp.zeros(3)).block_until_ready()
        assert memory.ran_out(found.value)
