"""Weights that do not fit, weights that come amid requests or at once, pause and resume."""

import dataclasses
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FEW_TILES, bits, make_llm, random_model
from neighbours import PARAMS, PROMPTS, answers, run, start

from jaxengine import LLM, SamplingParams
from jaxengine.command import bench
from jaxengine.engine import step_variants
from jaxengine.engine.engine import Engine
from jaxengine.host.scheduler import Scheduler
from jaxengine.models.params import initialise


@pytest.fixture(scope="module")
def model():
    return random_model(num_hidden_layers=2, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def other(model):
    return initialise(model[0], jax.random.key(9), scale=0.1)


@pytest.fixture(scope="module")
def llm(model) -> LLM:
    return make_llm(*model)


@pytest.fixture
def expected(llm) -> list[tuple]:
    return run(llm, start(llm))


def replaced(params, name: str, value):
    """The tree with another leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: value(leaf) if jax.tree_util.keystr(path, simple=True, separator=".") == name else leaf,
        params,
    )


def pointers(params) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)]


def interrupt(*_, **__):
    raise KeyboardInterrupt


def without_head(params):
    return dataclasses.replace(params, head=None)


# -- weights that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "broken, message",
    [
        (without_head, r"1 leaves differ:\n  head: given nothing, declared float32\[1, 1024, 96\]"),
        (
            lambda p: replaced(p, "layers.1.mlp.down", lambda x: x[:, 1:]),
            r"mlp\.down: given float32\[1, 95, 160\], declared float32\[1, 96,",
        ),
        (
            lambda p: replaced(p, "norm", lambda x: x.astype(jnp.bfloat16)),
            r"norm: given bfloat16\[96\], declared float32\[96\]",
        ),
        (
            lambda p: replaced(p, "norm", lambda x: x.at[3].set(jnp.nan)),
            r"1 leaves hold NaN or infinity, so the weights stay .*:\n  norm$",
        ),
        (lambda p: replaced(p, "embed", lambda x: x.at[0, 5, 5].set(jnp.inf)), r"hold NaN or infinity.*\n  embed$"),
        (lambda p: {"embed": p.embed}, "26 differences:\n  missing 'model.embed_tokens.weight'"),
        (lambda p: None, "leaves differ"),
    ],
    ids=["missing", "shape", "dtype", "NaN", "inf", "another tree", "nothing"],
)
def test_weights_that_do_not_fit_change_nothing(llm, model, broken, message, expected):
    version = llm.weights_version
    requests = start(llm)
    for _ in range(4):
        llm.engine.step()
    with pytest.raises(ValueError, match=message):
        llm.update_params(broken(model[1]))
    assert llm.weights_version == version
    assert run(llm, requests) == expected


def test_no_more_than_ten_differences_are_listed(llm, model):
    with pytest.raises(ValueError, match="19 leaves differ") as error:
        llm.update_params(jax.tree.map(lambda x: x[..., :-1], model[1]))
    assert str(error.value).count("\n") == 10


def test_what_is_no_tree_of_arrays_is_a_type_error(llm):
    with pytest.raises(TypeError, match="params must be a pytree of arrays, params is int"):
        llm.update_params(7)
    with pytest.raises(ValueError, match="in_flight must be one of 'recompute', 'keep', 'drain', got 'wait'"):
        llm.update_params(llm.params, in_flight="wait")
    with pytest.raises(ValueError, match="version must be higher than the current one, 0, got 0"):
        llm.update_params(llm.params, version=0)


def test_donated_weights_are_told(model):
    mine = jax.tree.map(jnp.copy, model[1])
    llm = make_llm(model[0], mine)
    before = bits(llm.generate(PROMPTS, PARAMS, key=jax.random.key(0)))
    for leaf in jax.tree.leaves(mine):
        leaf.delete()
    with pytest.raises(RuntimeError, match="the weights are gone, embed and .* others: they were donated"):
        llm.generate(PROMPTS, PARAMS)
    assert not llm.engine.requests
    llm.update_params(model[1])
    assert bits(llm.generate(PROMPTS, PARAMS, key=jax.random.key(0))) == before


# -- no copies, no compilation ----------------------------------------------------------------------------------------


def test_an_update_compiles_nothing_and_copies_nothing(model, other):
    llm = make_llm(*model)
    call = lambda: bits(llm.generate(PROMPTS, PARAMS, key=jax.random.key(0)))
    before = call()
    llm.update_params(other)  # its check of finite leaves is compiled once
    with bench.compilations() as names:
        for params in (
            other,
            jax.jit(lambda p: jax.tree.map(lambda x: x * 1, p))(model[1]),
            jax.device_put(model[1], jax.devices()[0]),
        ):
            with jax.transfer_guard("disallow"):
                llm.update_params(params)
            assert pointers(llm.params) == pointers(params)
            found = call()
    assert [name for name in names if "step" in name or "finite" in name] == [] and found == before
    llm.update_params(jax.tree.map(np.asarray, model[1]))
    assert call() == before


def test_a_step_proven_after_an_update_is_measured_by_the_weights_that_run(model, other, monkeypatch):
    monkeypatch.setattr(step_variants, "TILES", FEW_TILES)
    llm = make_llm(*model, compile_patience=1_000_000)
    llm.generate([PROMPTS[0]], PARAMS[0])
    llm.update_params(other)
    llm.warm_up()
    assert llm.engine.step_variants.refused == []


def test_cast_rounds_a_trainers_weights(model):
    config, params = random_model(num_hidden_layers=2, dtype="bfloat16")
    llm = make_llm(config, params)
    master = jax.tree.map(lambda x: x.astype(jnp.float32) * 1.001, params)
    with pytest.raises(ValueError, match="given float32"):
        llm.update_params(master)
    assert llm.update_params(master, cast=True) == 1
    same = jax.tree.map(
        lambda a, b: np.array_equal(np.asarray(a), np.asarray(b.astype(jnp.bfloat16))), llm.params, master
    )
    assert all(jax.tree.leaves(same))


# -- amid requests, and at once ---------------------------------------------------------------------------------------


def test_two_updates_at_once_come_one_after_the_other(model, other):
    llm = make_llm(*model)
    versions, barrier = [], threading.Barrier(8)

    def update(params):
        barrier.wait()
        versions.append(llm.update_params(params))

    threads = [threading.Thread(target=update, args=(params,)) for params in [model[1], other] * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(versions) == llm.weights_version == 8
    assert len(llm.generate(PROMPTS, PARAMS)) == len(PROMPTS)


def test_threads_generate_while_weights_change(model, other):
    llm = make_llm(*model)
    outputs, done = [], threading.Event()

    def generate():
        outputs.extend(llm.generate(PROMPTS * 2, SamplingParams(max_tokens=60)))
        done.set()

    thread = threading.Thread(target=generate)
    thread.start()
    for index, how in enumerate(["recompute", "keep", "recompute", "drain"]):
        if done.is_set():
            break
        llm.update_params((other, model[1])[index % 2], in_flight=how)
    thread.join()
    for output in outputs:
        (sample,) = output.outputs
        assert [v.start for v in sample.weight_versions] == [0, *(v.stop for v in sample.weight_versions[:-1])]
        assert sample.weight_versions[-1].stop == len(sample.token_ids) == 60
        assert sample.coordinate is not None and output.digest


@pytest.mark.parametrize(
    "owner, name, new", [(Engine, "_collect", False), (Scheduler, "change_version", True), (Scheduler, "preempt", True)]
)
def test_an_interrupt_amid_an_update_leaves_one_or_the_other(model, other, monkeypatch, owner, name, new):
    """Wherever it comes, weights and version agree, and requests end with tokens of weights that they name."""
    llm = make_llm(*model)
    requests = start(llm)
    for _ in range(5):
        llm.engine.step()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.update_params(other)
    assert (
        llm.weights_version == llm.engine.scheduler.version == int(new)
        and (pointers(llm.params) == pointers(other)) == new
    )
    run(llm, requests)
    fresh = make_llm(model[0], other if new else model[1])
    assert bits(llm.generate(PROMPTS, PARAMS, key=jax.random.key(1))) == bits(
        fresh.generate(PROMPTS, PARAMS, key=jax.random.key(1))
    )
    if not new:
        assert answers(llm, requests) == run(fresh, start(fresh))


def test_equal_weights_replay_under_any_version(model):
    """Weights are compared by their bits: no bit depends on the version that they run under."""
    config, params = model
    llm = make_llm(config, params)
    (output,) = llm.generate([PROMPTS[1]], SamplingParams(max_tokens=6), key=jax.random.key(3))
    for _ in range(20):
        llm.update_params(jax.tree.map(jnp.copy, params))
    assert llm.weights_version == 20 and llm.contract().digest == output.digest
    assert llm.replay(output.outputs[0].coordinate).holds
    run_ = llm.session.runner.run(
        requests := llm.admitted([PROMPTS[1]], SamplingParams(max_tokens=6), jax.random.key(3), None)
    )
    next(run_), next(run_)
    llm.update_params(params)
    for _ in run_:
        pass
    across = llm.session.output(requests[0]).outputs[0]
    assert len(across.weight_versions) == 2 and llm.replay(across.coordinate).holds


def test_a_replay_knows_its_weights(model, other):
    llm = make_llm(*model)
    (output,) = llm.generate([PROMPTS[1]], SamplingParams(max_tokens=6), key=jax.random.key(3))
    assert llm.replay(output.outputs[0].coordinate).holds
    run_ = llm.session.runner.run(
        requests := llm.admitted([PROMPTS[1]], SamplingParams(max_tokens=6), jax.random.key(3), None)
    )
    for _ in range(3):
        next(run_)
    llm.update_params(other)
    for _ in run_:
        pass
    mixed = llm.session.output(requests[0]).outputs[0]
    assert len(mixed.weight_versions) == 2
    with pytest.raises(ValueError, match=r'weights: \["\w+", "\w+"\], here "\w+"'):
        llm.replay(mixed.coordinate)
    with pytest.raises(ValueError, match=r'weights: "\w+", here "\w+"'):
        llm.replay(output.outputs[0].coordinate)


def test_what_was_delivered_is_never_drawn_again(llm, model, other, monkeypatch):
    """A recovery would draw it from other weights: tokens that a stream has shown stay, with their version."""
    stream = llm.stream([PROMPTS[1]], SamplingParams(max_tokens=12), key=jax.random.key(3), cumulative=True)
    shown = [next(stream) for _ in range(5)][-1].outputs[0]
    llm.update_params(other)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.step_variants, "run_prefill", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([PROMPTS[0]])
    for output in stream:
        found = output.outputs[0]
        assert (
            found.token_ids[:5] == shown.token_ids
            and found.token_logprobs[:5].tobytes() == shown.token_logprobs.tobytes()
        )
    assert [(span.version, span.start, span.stop) for span in found.weight_versions] == [
        (llm.weights_version - 1, 0, 6),  # the sixth was being drawn
        (llm.weights_version, 6, 12),
    ]
    llm.update_params(model[1])


# -- pause and resume -------------------------------------------------------------------------------------------------


def test_pause_and_resume_are_idempotent_and_visible(llm, expected):
    llm.resume()
    assert not llm.is_paused
    llm.pause()
    llm.pause()
    assert llm.is_paused
    with pytest.raises(
        RuntimeError, match=r"paused by this very thread, which would wait for itself: call resume\(\) first"
    ):
        llm.generate(PROMPTS, PARAMS)
    assert not llm.engine.requests
    llm.resume()
    llm.resume()
    assert not llm.is_paused and run(llm, start(llm)) == expected


def test_a_pause_holds_other_threads_and_lets_weights_in(model, other):
    llm = make_llm(*model)
    stream = llm.stream([5] * 9, SamplingParams(max_tokens=30), key=jax.random.key(0), cumulative=True)
    for _ in range(5):
        next(stream)
    outputs: list = []
    thread = threading.Thread(target=lambda: outputs.extend(stream))
    llm.pause()
    thread.start()
    while not llm.engine.requests:
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match='in_flight="drain" waits for requests, and the LLM is paused'):
        llm.update_params(other, in_flight="drain")
    drawn = len(next(iter(llm.engine.requests.values())).samples[0].drawn.token_ids)
    llm.update_params(other)
    assert not outputs, "a step was made during the pause"
    llm.resume()
    thread.join()
    (sample,) = outputs[-1].outputs
    old, new = sample.weight_versions
    assert drawn <= old.stop <= drawn + 1 and (old.version, new.version, new.stop) == (0, 1, 30)


def test_an_abort_reaches_a_request_that_waits(llm):
    llm.pause()
    outputs: list = []
    thread = threading.Thread(target=lambda: outputs.extend(llm.generate([[1, 2, 3]], PARAMS[0], request_ids=["held"])))
    thread.start()
    while "held" not in llm.engine.requests:
        time.sleep(0.01)
    llm.abort("held")
    thread.join()
    assert outputs[0].outputs[0].finish_reason == "abort" and llm.is_paused
    llm.resume()
