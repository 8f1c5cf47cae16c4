"""What cannot be asked for is refused before anything is allocated, and what runs beside it keeps its bits."""

import dataclasses
import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bits, make_llm
from neighbours import PARAMS, PROMPTS, answers, assert_idle, run, start, step

from jaxengine import LLM, SamplingParams
from jaxengine.sampling_params import FLAGS

NAN = float("nan")
ONE = SamplingParams(max_tokens=1)


@pytest.fixture(scope="module")
def expected(tiny) -> list[tuple]:
    return run(tiny, start(tiny))


def ask(prompts, params=ONE):
    return lambda llm: llm.generate(prompts, params)


def want(**settings):
    return lambda llm: llm.generate([[1, 2]], SamplingParams(**settings))


# -- sampling parameters, which no engine has to see ------------------------------------------------------------------

# One value a field, and one an own rule; what integers, numbers and flags are is tests/base/test_arguments.py.
# (field, value, what is allowed)
WRONG = [
    ("n", 10**9, "at least 1 and at most 16384"),
    ("temperature", -1e-9, "at least 0.0 and at most 1000000.0"),
    ("temperature", NAN, "finite"),
    ("top_p", 0.0, "greater than 0.0 and at most 1.0"),
    ("top_k", -2, "at least -1"),
    ("min_p", 1.5, "at least 0.0 and at most 1.0"),
    ("repetition_penalty", 1e-300, "at least 1e-06 and at most 1000000.0"),
    ("presence_penalty", 2.5, "at least -2.0 and at most 2.0"),
    ("frequency_penalty", -2.5, "at least -2.0 and at most 2.0"),
    ("max_tokens", -1, "at least 0"),
    ("truncate_prompt_tokens", 0, "at least 1, -1"),
    ("min_tokens", -1, "at least 0"),
    ("seed", 2**64, f"at most {2**64 - 1}"),
    ("logprobs", -2, "at least -1"),
    ("logprob_token_ids", 5, "list of token ids"),
    ("prompt_logprobs", 1.5, "integer"),
    ("stop", 5, "list of strings"),
    ("stop_token_ids", 5, "list of token ids"),
    ("logit_bias", 5, "dict"),
    ("allowed_token_ids", 5, "list of token ids"),
    ("bad_words", 5, "list of strings"),
    ("bad_words_token_ids", 5, "list of lists of token ids"),
    ("structured_outputs", 5, "StructuredOutputsParams or a dict"),
    *((flag, "false", "True or False") for flag in FLAGS),
]


@pytest.mark.parametrize("field, value, allowed", WRONG)
def test_a_sampling_parameter_is_refused_by_name_and_value(field, value, allowed):
    with pytest.raises(ValueError, match=f"{field} .*{re.escape(allowed)}.* got {re.escape(repr(value))}"):
        SamplingParams(**{field: value})


def test_every_sampling_parameter_refuses_something():
    fields = {field.name for field in dataclasses.fields(SamplingParams)}
    assert fields - {field for field, *_ in WRONG} == {"key"}, "a key is whatever JAX takes"


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(max_tokens=3, min_tokens=4), "min_tokens .*max_tokens=3, got 4"),
        (dict(seed=1, key=jax.random.key(1)), "seed or key"),
        (dict(stop=["x"] * 10**6), "stop .*64 strings, got 1000000"),
        (dict(stop="x" * 10**6), r"stop\[0\] .*1 to 1024 characters"),
        (dict(stop_token_ids=[1] * 10**6), "stop_token_ids .*16 ids, got 1000000"),
        (dict(logit_bias=dict.fromkeys(range(10**6), 1.0)), "logit_bias .*512 tokens, got 1000000"),
        (dict(logit_bias=[1, 2]), r"logit_bias .*dict.* got \[1, 2\]"),
        (dict(logit_bias={1: NAN}), "logit_bias value .*finite.* got nan"),
        (dict(logit_bias={"²": 1}), "logit_bias key .*integer, got '²'"),
        (dict(logit_bias={"42": 1, 42: 2}), "logit_bias .*token 42 twice"),
        (dict(allowed_token_ids=[]), "allowed_token_ids is empty"),
        (dict(allowed_token_ids=[3, -1]), r"allowed_token_ids\[1\] .*at least 0, got -1"),
        (dict(allowed_token_ids="12"), r"allowed_token_ids\[0\] .*integer, got '1'"),
        (dict(bad_words=["x", ""]), r"bad_words\[1\] .*1 to 1024 characters, got ''"),
        (dict(bad_words=["x"] * 10**6), "bad_words .*256 strings, got 1000000"),
        (dict(bad_words_token_ids=[[1], []]), r"bad_words_token_ids\[1\] is empty: .*1 to 8 tokens"),
        (dict(bad_words_token_ids=[[1], [2, True]]), r"bad_words_token_ids\[1\]\[1\] .*integer, got True"),
        (dict(bad_words_token_ids=[[1] * 9]), r"bad_words_token_ids\[0\] .*8 ids, got 9"),
        (dict(bad_words_token_ids=[[1]] * 257), "bad_words_token_ids .*256 lists, got 257"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_sampling_parameters_that_go_together_are_refused_before_anything_is_allocated(settings, message):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            SamplingParams(**settings)
        assert tracemalloc.get_traced_memory()[1] < 32_000_000
    finally:
        tracemalloc.stop()


# -- requests ---------------------------------------------------------------------------------------------------------

REFUSED = {
    # 1: nothing to continue
    "an empty prompt among others": (ask([[1, 2], []]), r"prompts\[1\] is empty"),
    "an empty text": (ask([[1, 2], ""]), r"prompts\[1\] is empty"),
    "an empty array": (ask(np.zeros((2, 0), np.int32)), r"prompts\[0\] is empty"),
    "a dict of nothing": (ask({"prompt_token_ids": []}), r"prompts\[0\]\['prompt_token_ids'\] is empty"),
    "a dict without a prompt": (ask({"prompt": None}), r"prompts\[0\] .*'prompt_token_ids'"),
    "no batch": (ask(None), "prompts .*got NoneType"),
    "bytes": (ask(b"12+30="), "prompts .*got bytes"),
    # 2: what is no token of this model
    "a negative id": (ask([[1], [5, -1]]), r"prompts\[1\] .*-1 at index 1: .*0 … 999"),
    "the id after the last": (ask([5, 1000]), r"prompts\[0\] .*1000 at index 1: .*0 … 999"),
    "an id beyond int64": (ask([2**70]), "1180591620717411303424 at index 0"),
    "a bool": (ask([5, True]), r"prompts\[0\] has True \(bool\) at index 1: .*integers"),
    "a float": (ask([5, 6.0]), r"has 6.0 \(float\) at index 1"),
    "None": (ask([5, None]), r"has None \(NoneType\) at index 1"),
    "a numpy bool": (ask([[5, np.True_]]), "at index 1: .*integers"),
    "an array of bools": (ask([[1], np.array([True, False])]), r"prompts\[1\] has True \(bool\) at index 0"),
    "an array of floats": (ask([np.array([1.0, NAN])]), r"prompts\[0\] has 1.0 \(float\) at index 0"),
    "a JAX array of floats": (ask([jnp.array([2.5])]), r"prompts\[0\] has 2.5 \(float\) at index 0"),
    "an array too deep": (ask([[1], np.ones((1, 1, 2), int)]), r"prompts\[1\] has \[\[1, 1\]\] \(list\) at index 0"),
    "digits": (ask([["5"]]), r"has '5' \(str\) at index 0"),
    "text without a tokenizer": (ask(["12+30="]), r"prompts\[0\] .*no tokenizer"),
    "a stop token that is none": (want(stop_token_ids=[3, 1000]), r"stop_token_ids of prompts\[0\] .*1000"),
    "a biased token that is none": (want(logit_bias={1000: 1.0}), r"logit_bias of prompts\[0\] .*1000"),
    "an allowed token that is none": (
        want(allowed_token_ids=[3, 1000, 7]),
        r"allowed_token_ids of prompts\[0\] .*1000 at index 1: .*0 … 999",
    ),
    "a bad word of no tokens": (
        want(bad_words_token_ids=[[3], [4, 1000]]),
        r"bad_words_token_ids\[1\] of prompts\[0\] .*1000 at index 1: .*0 … 999",
    ),
    "bad words without a tokenizer": (
        want(bad_words=["x"]),
        r"sampling_params\[0\] .*no tokenizer.*bad_words_token_ids",
    ),
    # 3: no room
    "a prompt as long as the context": (ask([[1], [2] * 512]), r"prompts\[1\] .*512 tokens.* max_model_len=512"),
    "a prompt that is longer": (ask([2] * 5_000), r"prompts\[0\] .*5000 tokens.* max_model_len=512"),
    # 4: what is checked before and what an engine checks
    "an impossible value": (want(top_p=1.01), "top_p .*at most 1.0, got 1.01"),
    "logprobs = 10⁹": (want(logprobs=10**9), r"logprobs=1000000000 of prompts\[0\] .*max_logprobs=20"),
    "prompt_logprobs = 10⁹": (
        want(prompt_logprobs=10**9),
        r"prompt_logprobs=1000000000 of prompts\[0\] .*max_logprobs=20",
    ),
    # 5: values of another kind
    "a salt of no text": (
        ask({"prompt_token_ids": [1], "cache_salt": 7}),
        r"prompts\[0\]\['cache_salt'\] must be a string or None, got 7",
    ),
    "special tokens allowed in words": (
        ask({"prompt_token_ids": [1], "allow_special_tokens": "false"}),
        r"prompts\[0\]\['allow_special_tokens'\] must be True or False, got 'false'",
    ),
    "an id of no text": (
        lambda llm: llm.generate([[1], [2]], ONE, request_ids=["a", 7]),
        r"request_ids\[1\] must be a string, got 7",
    ),
    # 6: what does not go together
    "params for other prompts": (ask([[1], [2]], [ONE]), "1 sampling_params for 2 prompts"),
    "a stream of two": (lambda llm: next(llm.stream([[1], [2]], ONE)), "one prompt, got 2"),
    "a stream of none": (lambda llm: next(llm.stream([], ONE)), "one prompt, got 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_beside_running_requests(name, tiny, expected):
    """With the index or the name, and the value; what runs keeps its bits, and nothing of the refused stays."""
    refused, message = REFUSED[name]

    def fault():
        before = dict(tiny.engine.requests)
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=message):
                refused(tiny)
            assert tracemalloc.get_traced_memory()[1] < 32_000_000, "more was allocated than its message"
        finally:
            tracemalloc.stop()
        assert tiny.engine.requests == before, "the refused request left something"

    assert run(tiny, start(tiny), fault) == expected
    assert_idle(tiny)


# -- an empty batch ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [[], (), np.zeros((0, 3), np.int32)], ids=["list", "tuple", "array"])
def test_an_empty_batch_is_answered_by_an_empty_list(batch, tiny, expected):
    assert run(tiny, start(tiny), lambda: tiny.generate(batch) == [] or pytest.fail("not empty")) == expected


# -- integers of any kind ---------------------------------------------------------------------------------------------

TOKENS = [5, 999, 0, 17]
KINDS = {
    "tuple": (5, 999, 0, 17),
    "uint16": np.array(TOKENS, np.uint16),
    "int64": np.array(TOKENS, np.int64),
    "jax": jnp.array(TOKENS),
    "numpy scalars": [np.int8(5), np.uint64(999), np.int32(0), np.int64(17)],
    "jax scalars": [jnp.int32(5), jnp.uint32(999), 0, jnp.int32(17)],
    "arrays of no dimension": [np.array(5), np.array(999), 0, 17],
    "a row": np.array([TOKENS]),
    "a jax row": jnp.array([TOKENS]),
    "dict": {"prompt_token_ids": np.array(TOKENS)},
    "batch of arrays": [np.array(TOKENS)],
    "batch of jax arrays": [jnp.array(TOKENS)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_integers_of_any_kind_are_the_same_prompt(kind, tiny):
    params, key = SamplingParams(max_tokens=3), jax.random.key(1)
    (output,) = tiny.generate(KINDS[kind], params, key=key)
    assert output.prompt_token_ids == TOKENS and all(type(token) is int for token in output.prompt_token_ids)
    assert bits([output]) == bits(tiny.generate([TOKENS], params, key=key))


def test_settings_take_numpy_and_jax_numbers(tiny):
    given = SamplingParams(
        n=np.int64(2),
        temperature=np.float32(0.5),
        top_k=jnp.int32(9),
        max_tokens=np.int32(3),
        stop_token_ids=np.array([3, 4]),
        logit_bias={np.int64(5): jnp.float32(1.5)},
    )
    plain = SamplingParams(n=2, temperature=0.5, top_k=9, max_tokens=3, stop_token_ids=[3, 4], logit_bias={5: 1.5})
    assert given == plain
    answers = [bits(tiny.generate([TOKENS], params, key=jax.random.key(1))) for params in (given, plain)]
    assert answers[0] == answers[1]


def test_settings_take_numpy_bools_and_pairs():
    given = SamplingParams(
        ignore_eos=np.True_, entropy=np.bool_(False), logit_bias={"5": 1, 6: 2.0}, stop=None, stop_token_ids=None
    )
    assert (
        given
        == SamplingParams(ignore_eos=True, logit_bias=[[6, 2.0], (5, 1.0)])
        == given.replace(logit_bias=given.logit_bias)
    )
    assert SamplingParams(logit_bias={}) == SamplingParams()


def test_a_salt_of_none_is_no_salt(tiny):
    for salt in (None, ""):
        (output,) = tiny.generate({"prompt_token_ids": TOKENS, "cache_salt": salt}, ONE)
        assert output.cache_salt == ""


# -- the edge of the context ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length, max_tokens, generated", [(511, 5, 1), (505, 100, 7), (505, 10**12, 7), (505, None, 7), (505, 7, 7)]
)
def test_a_completion_ends_at_the_edge_of_the_context(length, max_tokens, generated, tiny, expected):
    beside = start(tiny)
    (output,) = tiny.generate(
        [[7] * length], SamplingParams(max_tokens=max_tokens, ignore_eos=True), key=jax.random.key(2)
    )
    assert [(len(s.token_ids), s.finish_reason) for s in output.outputs] == [(generated, "length")]
    assert run(tiny, beside) == expected


# -- values that mean something else ----------------------------------------------------------------------------------


def first_bits(llm: LLM, **settings) -> list[tuple]:
    return bits(llm.generate([TOKENS], SamplingParams(max_tokens=5, **settings), key=jax.random.key(3)))


@pytest.mark.parametrize("temperature", [1e-9, 9.9e-6, np.float32(1e-30), 1e-300])
def test_a_tiny_temperature_is_greedy(temperature, tiny):
    greedy = first_bits(tiny, temperature=0)
    assert first_bits(tiny, temperature=temperature) == greedy != first_bits(tiny)


@pytest.mark.parametrize("top_k", [0, -1, 1000, 1001, 1024, 10**12])
def test_top_k_of_the_vocabulary_or_more_is_off(top_k, tiny):
    assert first_bits(tiny, top_k=top_k) == first_bits(tiny) != first_bits(tiny, top_k=2)


@pytest.mark.parametrize(
    "settings", [dict(top_p=1e-300), dict(min_p=1.0), dict(top_k=1), dict(temperature=1.01e-5)], ids=str
)
def test_what_leaves_one_token_draws_the_likeliest(settings, tiny):
    (tokens, logprobs, *_), (greedy, *_) = first_bits(tiny, **settings) + first_bits(tiny, temperature=0)
    assert tokens == greedy and np.frombuffer(logprobs, np.float32).tolist() == [0.0] * 5


@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=1e6),
        dict(repetition_penalty=1e6),
        dict(repetition_penalty=1e-6),
        dict(min_p=1e-300),
        dict(logit_bias={5: -1e4, 6: 1e4}),
        dict(repetition_penalty=1e6, temperature=1.01e-5, frequency_penalty=2.0, logit_bias={5: 1e4}),
    ],
    ids=str,
)
def test_the_extremes_that_are_accepted_are_answered(settings, tiny, expected):
    beside = start(tiny)
    ((tokens, logprobs, reason, _),) = first_bits(tiny, **settings)
    assert reason == "length" and len(tokens) == 5 and all(0 <= token < 1000 for token in tokens)
    assert np.isfinite(np.frombuffer(logprobs, np.float32)).all()
    assert run(tiny, beside) == expected


def test_min_tokens_beyond_the_context_never_stops(tiny):
    likeliest = first_bits(tiny, temperature=0)[0][0][0]
    params = dict(temperature=0, stop_token_ids=[likeliest])
    (stopped,) = tiny.generate([TOKENS], SamplingParams(**params))
    assert stopped.outputs[0].token_ids == [likeliest] and stopped.outputs[0].finish_reason == "stop"
    (output,) = tiny.generate([[7] * 500], SamplingParams(min_tokens=10**12, **params))
    assert len(output.outputs[0].token_ids) == 12 and output.outputs[0].finish_reason == "length"


def test_all_bits_of_a_seed_count(tiny):
    seeded = {seed: first_bits(tiny, seed=seed)[0] for seed in (0, 5, 2**31, 2**32, 2**32 + 5, 2**64 - 1)}
    assert len({tuple(tokens) for tokens, *_ in seeded.values()}) == len(seeded)
    assert first_bits(tiny, key=jax.random.key(5)) == [seeded[5]]


# -- a full queue -----------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_the_whole_call(tiny):
    llm = make_llm(tiny.config, tiny.params, max_waiting=6)
    waiting = start(llm, [[1], [2]], SamplingParams(n=2))
    with pytest.raises(
        ValueError, match="the queue holds 5 of at most 6 samples: no room for 3 more; wait, or raise max_waiting"
    ):
        llm.generate([[3], [4]], [SamplingParams(n=1), SamplingParams(n=3)])
    assert list(llm.engine.requests.values()) == waiting and len(llm.engine.scheduler.waiting) == 4
    with pytest.raises(ValueError, match="no room for 16384 more"):
        llm.generate([[3]], SamplingParams(n=16_384))


# -- a request id in use ----------------------------------------------------------------------------------------------

IDS = [f"mine {i}" for i in range(len(PROMPTS))]


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.generate([[1, 2]], ONE, request_ids=["mine 2"]),
        lambda llm: llm.generate([[1, 2], [3, 4], [5, 6]], ONE, request_ids=["new", "newer", "mine 0"]),
        lambda llm: llm.generate([[1, 2], [3, 4]], ONE, request_ids=["new", "new"]),
    ],
    ids=["in use", "last of three in use", "twice in a call"],
)
def test_an_id_in_use_refuses_the_call_and_leaves_the_first_alone(call, tiny, expected):
    requests = start(tiny, ids=IDS)

    def fault():
        with pytest.raises(
            ValueError, match="request id '(mine|new).*' is in use: ids of unfinished requests must differ"
        ):
            call(tiny)
        assert list(tiny.engine.requests.values()) == [r for r in requests if r.request_id in tiny.engine.requests]
        assert {"mine 0", "mine 2"} <= set(tiny.engine.requests), "the first is still there"

    assert run(tiny, requests, fault) == expected
    assert_idle(tiny)


@pytest.mark.parametrize("bad", [[], [1000], "text", [0.5]], ids=["empty", "out of range", "text", "float"])
def test_one_bad_prompt_refuses_its_whole_call(bad, tiny, expected):
    def fault():
        with pytest.raises(ValueError, match=r"prompts\[2\]"):
            tiny.generate([[1, 2], [3, 4], bad, [5]], ONE)
        assert not any(r.prompt_token_ids in ([1, 2], [3, 4], [5]) for r in tiny.engine.requests.values())

    assert run(tiny, start(tiny), fault) == expected


def test_an_interrupt_while_a_call_is_queued_leaves_none_of_it(tiny, monkeypatch):
    add, added = tiny.engine.add, []

    def interrupted(request, **how):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(request)
        add(request, **how)

    monkeypatch.setattr(tiny.engine, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny.generate(PROMPTS, PARAMS)
    assert_idle(tiny)


def test_an_id_is_free_again_after_its_request(tiny, expected):
    for _ in range(2):
        assert run(tiny, start(tiny, ids=IDS)) == expected
    assert_idle(tiny)


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlapped"])
def test_an_id_is_free_again_after_an_abort(overlap, tiny, expected):
    """Also while a step of the aborted request is still under way."""
    llm = make_llm(tiny.config, tiny.params, overlap=overlap)
    first = start(llm, ids=IDS)
    for _ in range(3):
        step(llm)
    for name in IDS:
        llm.abort(name)
    second = start(llm, ids=IDS)
    for _ in range(3):
        step(llm)
        assert list(llm.engine.requests.values()) == second, "the second has taken the first's place"
    assert run(llm, second) == expected
    assert {reason for _, _, reason, _ in answers(llm, first)} == {"abort"}
    assert_idle(llm)


def test_numbered_ids_avoid_those_that_callers_chose(tiny, expected):
    number = int(start(tiny, [[1]], ONE)[0].request_id)
    chosen = [str(number + i) for i in (1, 2, 4, 5)]
    requests = start(tiny, ids=chosen)
    given = [request.request_id for request in start(tiny, [[1], [2]], ONE)]
    assert given == [str(number + 3), str(number + 6)]
    assert run(tiny, requests) == expected
