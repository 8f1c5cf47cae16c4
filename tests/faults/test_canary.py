"""Pages overwritten without the engine's knowledge: page_checksums finds them, and other sequences keep their bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_llm
from neighbours import answers, assert_idle, run, start, step

from jaxengine import LLM, SamplingParams
from jaxengine.device import checksums
from jaxengine.device.kv_cache import Cache
from jaxengine.engine.page_checksums import CAUSE
from jaxengine.host.sample import Request
from jaxengine.ops.kernels import XLA

PROMPT = list(range(200, 320))  # three full pages, and most of a fourth
VICTIM = SamplingParams(max_tokens=30, seed=5)
DAMAGED = ([], b"", "error", CAUSE)


@pytest.fixture(scope="module")
def expected(tiny) -> list[tuple]:
    return run(tiny, start(tiny))


@pytest.fixture(scope="module")
def whole(tiny) -> list[tuple]:
    """What the victim answers without a fault."""
    return run(tiny, start(tiny, [PROMPT], VICTIM))


@pytest.fixture(scope="module")
def whole_pair(tiny) -> list[tuple]:
    return run(tiny, start(tiny, [PROMPT], VICTIM.replace(n=2)))


@pytest.fixture(params=[False, True], ids=["plain", "overlapped"])
def llm(request, tiny, expected) -> LLM:
    llm = make_llm(tiny.config, tiny.params, overlap=request.param, page_checksums=True)
    assert run(llm, start(llm)) == expected, "watching moves no bit"
    return llm


def overwrite(llm: LLM, page: int) -> None:
    """Garbage in a page of every layer."""
    garbage = lambda pool: pool.at[page].set(jax.random.normal(jax.random.key(page), pool.shape[1:]))
    llm.engine.cache = dataclasses.replace(
        llm.engine.cache,
        keys=tuple(map(garbage, llm.engine.cache.keys)),
        values=tuple(map(garbage, llm.engine.cache.values)),
    )


def flip_a_bit(llm: LLM, side: str, layer: int, place: tuple[int, ...], bit: int) -> None:
    """`place`: (page, token, head, number)."""
    cache = llm.engine.cache
    pools = list(getattr(cache, side))
    stored = [np.arange(x.size).reshape(x.shape) for x in (cache.keys[layer], cache.values[layer])]
    keys, values = llm.engine.step_variants.kernels.attention.by_token(*stored)
    words = np.array(pools[layer]).view(np.uint32)
    words.flat[(keys if side == "keys" else values)[place]] ^= np.uint32(1 << bit)
    pools[layer] = jnp.array(words.view(np.float32))
    llm.engine.cache = dataclasses.replace(cache, **{side: tuple(pools)})


def victim(llm: LLM, n: int = 1, tokens: int = 5) -> Request:
    """A request in the midst of its answer."""
    (request,) = start(llm, [PROMPT], VICTIM.replace(n=n))
    while not request.samples or any(len(sample.drawn.token_ids) < tokens for sample in request.samples):
        step(llm)
    return request


def assert_failed(llm: LLM, request: Request, whole: list[tuple]) -> None:
    """Ended by its checksums, and every token that was given out before is right."""
    for (tokens, logprobs, *how), (all_tokens, all_logprobs, *_) in zip(answers(llm, [request]), whole, strict=True):
        assert how == ["error", CAUSE]
        assert (
            5 <= len(tokens) < len(all_tokens)
            and tokens == all_tokens[: len(tokens)]
            and logprobs == all_logprobs[: len(logprobs)]
        )


def cached(llm: LLM) -> int:
    """Pages that a request with the victim's prompt would be served."""
    return len(llm.engine.scheduler.page_pool.match([*PROMPT, 1], 0, ""))


@pytest.mark.parametrize("place", [0, 2, 3], ids=["first page", "full page", "partly filled page"])
def test_an_overwritten_page_is_found_and_dropped(llm, place, expected, whole):
    request, beside = victim(llm), start(llm)
    page = request.samples[0].pages[place]
    assert cached(llm) == 3
    overwrite(llm, page)
    step(llm), step(llm)
    assert request.is_finished and cached(llm) == 0 and page in llm.engine.scheduler.page_pool._free
    assert run(llm, beside) == expected
    assert_failed(llm, request, whole)
    assert run(llm, start(llm, [PROMPT], VICTIM)) == whole, "computed again"
    assert_idle(llm)


def test_all_sequences_with_the_page_fail_and_no_others(llm, expected, whole_pair):
    """Two samples, and a later request that was served the page from the prefix cache."""
    request, beside = victim(llm, n=2), start(llm)
    (later,) = start(llm, [PROMPT], VICTIM.replace(max_tokens=40, n=2))
    while any(len(sample.drawn.token_ids) < 5 for sample in later.samples):
        step(llm)
    page = later.samples[1].pages[1]
    assert all(page in sample.pages for sample in (*request.samples, *later.samples)) and not request.is_finished
    overwrite(llm, page)
    assert run(llm, beside) == expected
    assert_failed(llm, request, whole_pair), assert_failed(llm, later, whole_pair)
    assert_idle(llm)


def test_a_page_that_is_overwritten_in_the_prefix_cache_is_not_served(llm, expected, whole):
    """It is found when it would be used: that request fails without a token; the next computes the prompt again."""
    assert run(llm, start(llm, [PROMPT], VICTIM)) == whole and cached(llm) == 3
    overwrite(llm, llm.engine.scheduler.page_pool.match([*PROMPT, 1], 0, "")[1])
    (request,), beside = start(llm, [PROMPT], VICTIM), start(llm)
    assert run(llm, beside) == expected
    assert answers(llm, [request]) == [DAMAGED] and request.num_cached_tokens == 96
    again = start(llm, [PROMPT], VICTIM)
    assert run(llm, again) == whole and again[0].num_cached_tokens == 0
    assert_idle(llm)


def test_one_flipped_bit_is_found_wherever_it_is(llm, whole):
    """In any layer, of keys or values, of any token that was written; what comes after the last is not watched."""
    p = llm.engine_config.page_size
    for side, layer, place, token, bit in (
        ("keys", 0, 0, 0, 0),
        ("values", 1, 1, 31, 31),
        ("values", 0, 3, 20, 7),
        ("keys", 1, 3, 27, 13),
    ):
        llm.engine.scheduler.page_pool.clear_cache()
        request = victim(llm)
        page = request.samples[0].pages[place]
        flip_a_bit(llm, side, layer, (page, token, 3, 31), bit)
        run(llm, [request])
        assert_failed(llm, request, whole)
    request = victim(llm)
    page, after = request.samples[0].pages[3], (len(PROMPT) + len(request.samples[0].drawn.token_ids) + 1) % p
    assert 27 < after < p
    flip_a_bit(llm, "keys", 0, (page, p - 1, 3, 31), 30)
    assert run(llm, [request]) == whole
    assert_idle(llm)


def test_sums_change_with_each_stored_word():
    """Of 16-bit floats too, which are stored as integers."""
    stored = np.random.RandomState(0).randint(0, 2**16, (3, 2, 4, 16)).astype(np.uint16)
    cache = Cache((jnp.array(stored),), (jnp.array(stored.swapaxes(2, 3)),), jnp.zeros((1, 1), jnp.int32), ())
    before = np.asarray(checksums.token_sums(cache, jnp.array([1, 2]), kernels=XLA))
    for head in range(2):
        for i in range(4):
            changed = stored.copy()
            changed[2, head, i, 5] ^= 1 << 15
            one = dataclasses.replace(cache, keys=(jnp.array(changed),))
            found = np.argwhere(np.asarray(checksums.token_sums(one, jnp.array([1, 2]), kernels=XLA)) != before)
            assert found.tolist() == [[1, 5]]


def test_a_page_that_is_handed_out_again_is_no_damage(llm, expected):
    """Aborted, preempted, evicted: pages change hands, and many times."""
    for at in range(0, 12, 3):
        llm.engine.scheduler.page_pool.clear_cache()
        requests = start(llm)
        run(llm, requests, lambda some=requests[at % 2 :: 2]: [llm.abort(r.request_id) for r in some], at)
        assert {reason for *_, reason, _ in answers(llm, requests)} <= {"abort", "length", "stop"}
    blocks = llm.engine.scheduler.page_pool
    blocks.clear_cache()
    grow = lambda: start(
        llm, [[i] * 20 for i in range(1, 7)], [SamplingParams(max_tokens=60, temperature=i % 2) for i in range(6)]
    )
    right, held = run(llm, grow()), blocks.take(blocks.num_available - 5)
    before = llm.engine.scheduler.num_preemptions
    requests = grow()
    assert run(llm, requests, held=held) == right and llm.engine.scheduler.num_preemptions > before
    blocks.release(held)
    assert run(llm, start(llm)) == expected


def test_an_interrupt_is_no_damage(llm, expected, monkeypatch):
    """All pages are given back at once, and filled again with the same tokens or with others."""
    run_decode = llm.engine.step_variants.run_decode

    def interrupted(*args):
        run_decode(*args)
        raise KeyboardInterrupt

    requests = start(llm)
    step(llm), step(llm), step(llm)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(llm.engine.step_variants, "run_decode", interrupted)
        llm.engine.step()
    start(llm, [[7] * 200], SamplingParams(max_tokens=3))
    assert run(llm, requests) == expected


def test_the_watch_compiles_once(llm):
    before = checksums.token_sums._cache_size()
    run(llm, start(llm, [[i] * 450 for i in range(9)], SamplingParams(max_tokens=4)))
    assert checksums.token_sums._cache_size() == before > 0


def test_without_page_checksums_nothing_is_summed_up_and_nothing_found(tiny, expected, whole, monkeypatch):
    """Off by default, and then free; and the fault of these tests does move bits."""
    assert tiny.engine.page_checksums is None
    monkeypatch.setattr(checksums, "token_sums", lambda *args, **how: pytest.fail("it was summed up"))
    tiny.engine.scheduler.page_pool.clear_cache()
    request, beside = victim(tiny), start(tiny)
    overwrite(tiny, request.samples[0].pages[0])
    assert run(tiny, beside) == expected
    ((*_, reason, _),) = found = run(tiny, [request])
    assert reason == "length" and found != whole
    tiny.engine.scheduler.page_pool.clear_cache()
    assert_idle(tiny)
