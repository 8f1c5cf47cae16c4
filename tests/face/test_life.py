"""The life of an LLM: freed when nothing refers to it, asleep, closed; and many threads at it."""

import threading
import weakref

import jax
import numpy as np
import pytest
from conftest import bits, make_llm, random_model

from jaxengine import LLM, SamplingParams
from jaxengine.device import kv_cache
from jaxengine.engine import idle_pools, memory, session
from jaxengine.models.params import initialise

PARAMS = SamplingParams(max_tokens=12, ignore_eos=True, n=2)
PROMPTS = [[3, 1, 4, 1, 5], list(range(40)), [9]]
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def model():
    return random_model(num_hidden_layers=1)


@pytest.fixture(scope="module")
def expected(model) -> list:
    return drawn(make_llm(*model))


def drawn(llm: LLM, **how) -> list:
    return bits(llm.generate(PROMPTS, PARAMS, key=KEY, **how))


def live_bytes() -> int:
    """Of all arrays; those that share memory count once."""
    arrays = [array for array in jax.live_arrays() if not array.is_deleted()]
    return sum({array.unsafe_buffer_pointer(): array.nbytes for array in arrays}.values())


# -- memory -----------------------------------------------------------------------------------------------------------


def test_an_llm_that_nothing_refers_to_is_freed_at_once(model):
    """No reference cycle keeps it, so no garbage collection is waited for."""
    before = live_bytes()
    llm = make_llm(*model)
    list(llm.stream(PROMPTS[0], PARAMS))
    drawn(llm)
    llm.score(np.ones((1, 4), np.int32), np.array([[False, True, True, True]]))
    ref = weakref.ref(llm)
    del llm
    assert ref() is None and live_bytes() <= before


@pytest.fixture
def small_memory(monkeypatch):
    """A host on which one pool takes nearly all that is free."""
    limit = live_bytes() + 3_000_000
    monkeypatch.setattr(memory, "CPU_SHARE", 0.9)
    monkeypatch.setattr(memory.machine, "free_memory", lambda: limit - live_bytes())


def sized(model) -> LLM:
    """An LLM whose pool takes what memory allows."""
    return LLM.from_params(*model, max_num_seqs=64, max_model_len=1024, max_num_batched_tokens=128)


def test_a_cell_that_is_run_twice_has_room(model, expected, small_memory, monkeypatch):
    llm = sized(model)
    first, pages = llm, llm.engine_config.num_pages
    llm = sized(model)  # while the first is still referred to, as in a notebook
    assert llm.engine_config.num_pages > 0.9 * pages and not first.engine.has_pool
    assert drawn(llm) == expected
    real = kv_cache.rebuild

    def rebuild(*given):
        if llm.engine.has_pool:
            raise MemoryError("no room for two")
        return real(*given)

    monkeypatch.setattr(kv_cache, "rebuild", rebuild)
    assert drawn(first) == expected and not llm.engine.has_pool  # and back, as either is used


def test_without_idle_pools_there_is_no_room(model, small_memory, monkeypatch):
    """The control."""
    llm = sized(model)
    monkeypatch.setattr(idle_pools, "release", lambda: 0)
    with pytest.raises(MemoryError, match="one context"):
        sized(model)
    assert llm.engine.has_pool


def test_a_pool_in_use_is_not_taken(model, expected, small_memory):
    llm = sized(model)
    stream = llm.stream(PROMPTS[1], PARAMS)
    next(stream)
    with pytest.raises(MemoryError, match="one context"):
        sized(model)
    *_, last = stream
    assert last.finished and llm.engine.has_pool


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_gives_memory_back(model, expected, level, tmp_path):
    config, params = model
    llm = make_llm(config, params)
    assert drawn(llm) == expected
    before = live_bytes()
    llm.sleep(level)
    llm.sleep(level)
    assert llm.is_sleeping and live_bytes() <= before - memory.memory_plan(config, llm.engine_config).cache
    tokens, mask = np.ones((1, 2), np.int32), np.array([[False, True]])
    for use in (lambda: drawn(llm), llm.warm_up, lambda: llm.score(tokens, mask)):
        with pytest.raises(RuntimeError, match=r"wake_up\(\)"):
            use()
    if level == 2:
        assert llm.params is None
        for use in (llm.wake_up, lambda: llm.save(tmp_path / "saved")):
            with pytest.raises(RuntimeError, match="update_params"):
                use()
        assert not (tmp_path / "saved").exists()
        llm.wake_up(["weights"])
        llm.update_params(params)
    llm.wake_up(["kv_cache"] if level == 2 else None)
    llm.wake_up()
    assert not llm.is_sleeping and drawn(llm) == expected


def test_weights_wait_in_the_hosts_memory(model, expected, monkeypatch):
    """As on an accelerator: they come back to where they lay, and other weights may come meanwhile."""
    monkeypatch.setattr(session, "_on_host", lambda params: False)
    config, params = model
    llm, other = make_llm(config, params), initialise(config, jax.random.key(9), scale=0.1)
    contract = llm.contract()
    llm.sleep()
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(llm.params)) and llm.contract() is contract
    with pytest.raises(RuntimeError, match="weights"):
        llm.wake_up(["kv_cache"])
    llm.wake_up()
    assert drawn(llm) == expected
    llm.sleep()
    llm.update_params(other)
    llm.wake_up()
    assert drawn(llm) == drawn(make_llm(config, other))


def test_requests_wait_while_the_llm_sleeps(model):
    """They go on where they were, by bits; who put the LLM to sleep is told that it would wait for itself."""
    llm = make_llm(*model)
    expected = bits(llm.generate([PROMPTS[1]], PARAMS, key=KEY))
    stream = llm.stream(PROMPTS[1], PARAMS, key=KEY)
    for _ in range(4):
        next(stream)
    llm.sleep()
    other = threading.Thread(target=llm.wake_up)
    with pytest.raises(RuntimeError, match=r"wake_up\(\)"):
        next(stream)
    answers = []
    stream = None
    llm.wake_up()
    waiting = threading.Thread(target=lambda: answers.extend(llm.generate([PROMPTS[1]], PARAMS, key=KEY)))
    waiting.start()
    while not llm.engine.has_work and not answers:
        pass
    llm.sleep()
    other.start()
    waiting.join()
    other.join()
    assert bits(answers) == expected


def test_levels_and_tags_are_checked(model):
    llm = make_llm(*model)
    with pytest.raises(ValueError, match="level must be one of 1, 2, got 3"):
        llm.sleep(3)
    with pytest.raises(ValueError, match="'kv_cache'|kv_cache"):
        llm.wake_up(["cache"])


def test_close(model):
    llm = make_llm(*model)
    before, answers = live_bytes(), []
    thread = threading.Thread(
        target=lambda: answers.extend(llm.generate(PROMPTS, PARAMS.replace(max_tokens=90), key=KEY))
    )
    thread.start()
    while not llm.engine.has_work:
        pass
    with llm:
        pass
    thread.join()
    llm.close()
    assert {sample.finish_reason for output in answers for sample in output.outputs} <= {"abort", "length"}
    assert live_bytes() < before and llm.params is None
    saves = lambda: llm.save("nowhere")
    for use in (lambda: drawn(llm), llm.warm_up, llm.pause, llm.sleep, lambda: llm.verify(quick=True), saves):
        with pytest.raises(RuntimeError, match="closed"):
            use()


# -- threads ----------------------------------------------------------------------------------------------------------


def test_own_ids_never_meet_a_callers(model):
    """An id is chosen as the request is queued, when nobody can take it any more."""
    llm = make_llm(*model)
    outputs = llm.generate(PROMPTS, PARAMS, request_ids=["1", "x", "0"])
    assert [output.request_id for output in outputs] == ["1", "x", "0"]
    requests = llm.admitted(PROMPTS, PARAMS, KEY, None)
    assert [request.request_id for request in requests] == ["", "", ""]
    blocked = llm.generate(PROMPTS[:2], PARAMS, request_ids=["0", "2"])
    assert len(llm.session.complete(requests)) == 3 and len({r.request_id for r in requests}) == 3 and blocked


def test_a_verification_has_the_llm_to_itself(model):
    """Other threads' calls wait for its end, and are answered as ever."""
    llm = make_llm(*model)
    expected, order = drawn(llm), []
    with llm.session.runner.reserved():
        thread = threading.Thread(target=lambda: order.append(drawn(llm)))
        thread.start()
        thread.join(0.3)
        assert drawn(llm) == expected and not order
    thread.join()
    assert order == [expected]
    stream = llm.stream(PROMPTS[0], PARAMS)
    next(stream)
    with pytest.raises(ValueError, match="requests under way"), llm.session.runner.reserved():
        pass


def test_contracts_amid_updates(model):
    """`contract` in one thread, updates in another: no error, and each contract is one of the weights that ran."""
    config, params = model
    llm, others = make_llm(config, params), [initialise(config, jax.random.key(i + 1), scale=0.1) for i in range(3)]
    known, seen, errors = set(), set(), []

    def look() -> None:
        try:
            while updating.is_alive():
                seen.add(llm.contract().digest)
        except Exception as error:
            errors.append(error)

    def update() -> None:
        for i in range(40):
            llm.update_params(others[i % 3])
            known.add(llm.contract().digest)

    known.add(llm.contract().digest)
    updating = threading.Thread(target=update)
    looking = [threading.Thread(target=look) for _ in range(2)]
    updating.start()
    for thread in looking:
        thread.start()
    for thread in (updating, *looking):
        thread.join()
    assert not errors and seen <= known and len(known) == 4
