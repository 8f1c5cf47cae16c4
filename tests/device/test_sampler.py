"""The sampler against plain numpy: what is cut, penalised and biased, which keys draw, what is drawn, and the
arithmetic underneath.
"""

import contextlib
import functools
import math

import jax
import numpy as np
import pytest

from jaxengine.config import VOCAB_BLOCK, EngineConfig
from jaxengine.device import sampler
from jaxengine.device.sampling_arrays import token_rules
from jaxengine.engine.batch import BatchBuilder
from jaxengine.host.sample import Request, Sample
from jaxengine.sampling_params import SamplingParams
from pallas_kernels import draw_reference, pinned_math
from pallas_kernels.draw_reference import draw_blocks, log_softmax

V = 384
ENGINE = EngineConfig(max_num_seqs=16, max_model_len=64)
truncate, fold_keys, process = jax.jit(sampler.truncate), jax.jit(sampler.fold_keys), jax.jit(sampler.process)
draw = jax.jit(lambda logprobs, keys: draw_blocks(logprobs, sampler.uniforms(keys)))


def some_logits(rows: int, seed: int = 0, width: float = 3.0) -> np.ndarray:
    return (width * np.random.default_rng(seed).standard_normal((rows, V))).astype(np.float32)


def same_bits(a, b) -> bool:
    return np.array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


# -- truncation --------------------------------------------------------------------------------------------------------


def cut(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The ids kept, by sorting: top-k, then the shortest run of the likeliest with mass top_p, then min-p.

    Ties go to the lower id.
    """
    ids = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    ids = ids[:top_k] if top_k else ids
    p = np.exp(logits[ids].astype(np.float64) - logits[ids[0]])
    p /= p.sum()
    if top_p < 1:
        ids = ids[: int(np.searchsorted(np.cumsum(p), top_p)) + 1]
    return {i for i, each in zip(ids, p, strict=False) if each >= min_p * p[0]}


def kept(logits, top_k=0, top_p=1.0, min_p=0.0) -> list[set[int]]:
    rows = len(logits)
    full = lambda value, dtype: np.full(rows, value, dtype)
    out = np.asarray(truncate(logits, full(top_k, np.int32), full(top_p, np.float32), full(min_p, np.float32)))
    assert same_bits(np.where(out == -np.inf, out, logits), out), "what is kept keeps its bits"
    return [set(np.flatnonzero(row > -np.inf).tolist()) for row in out]


@pytest.mark.parametrize(
    "settings",
    [
        dict(top_k=1),
        dict(top_k=7),
        dict(top_k=V - 1),
        dict(top_k=V),
        dict(top_p=0.01),
        dict(top_p=0.5),
        dict(top_p=0.95),
        dict(top_p=0.9999),
        dict(min_p=0.001),
        dict(min_p=0.3),
        dict(min_p=1.0),
        dict(top_k=40, top_p=0.8),
        dict(top_k=3, min_p=0.2),
        dict(top_p=0.9, min_p=0.05),
        dict(top_k=20, top_p=0.7, min_p=0.1),
    ],
    ids=str,
)
def test_truncate_keeps_what_sorting_keeps(settings):
    logits = np.concatenate(
        [some_logits(4), some_logits(4, 1, width=0.1), np.round(some_logits(4, 2))]
    )  # the last have many ties
    assert kept(logits, **settings) == [cut(row, **dict(top_k=0, top_p=1.0, min_p=0.0) | settings) for row in logits]


def test_truncate_takes_top_p_of_what_top_k_left():
    """Of 0.4, 0.3, 0.2, 0.1 the first two are 0.7 of all, but 0.78 of the first three."""
    logits = np.full((2, V), -np.inf, np.float32)
    logits[:, :4] = np.log([0.4, 0.3, 0.2, 0.1])
    assert kept(logits, top_p=0.75) == [{0, 1, 2}] * 2
    assert kept(logits, top_k=3, top_p=0.75) == [{0, 1}] * 2


def test_truncate_breaks_ties_by_token_id():
    logits = np.full((2, V), -5.0, np.float32)
    logits[:, [300, 7, 200, 100]] = 2.0
    assert kept(logits, top_k=2) == [{7, 100}] * 2
    assert kept(logits, top_k=5) == [{0, 7, 100, 200, 300}] * 2
    assert kept(logits - 3.0, top_p=0.4) == [{7, 100}] * 2
    logits[:, [7, 8]] = -0.0, 0.0  # one number, so a tie
    assert kept(logits, top_k=4) == [{7, 100, 200, 300}] * 2


@pytest.mark.parametrize("top_p", [1e-30, 1e-44, 0.0])
def test_truncate_keeps_the_likeliest_however_small_top_p(top_p):
    logits = some_logits(4)
    assert kept(logits, top_p=top_p) == [{i} for i in logits.argmax(1).tolist()]


@pytest.mark.parametrize("top_k", [0, V, V + 1, 2**31 - 1])
def test_disabled_settings_leave_logits_as_they_are(top_k):
    logits = some_logits(4)
    logits[:, 5] = -np.inf
    settings = np.full(4, top_k, np.int32), np.ones(4, np.float32), np.zeros(4, np.float32)
    assert same_bits(truncate(logits, *settings), logits)


# -- bias and penalties ------------------------------------------------------------------------------------------------


def processed(
    logits: np.ndarray, rows: list[tuple[SamplingParams, list[int], list[int]]], stops: frozenset[int] = frozenset()
):
    """sampler.process over rows of (params, prompt, generated), through the slots that the engine fills."""
    batch, history = (
        BatchBuilder(ENGINE),
        np.full((ENGINE.max_num_seqs + 1, ENGINE.max_model_len), 7, np.int32),
    )  # 7: an earlier request's
    count, size = len(rows), ENGINE.max_num_seqs
    rows, logits = [*rows, *[(SamplingParams(), [1], [])] * (size - count)], np.resize(logits, (size, V))
    slots, positions = np.arange(size, dtype=np.int32), np.zeros(size, np.int32)
    for slot, (params, prompt, generated) in enumerate(rows):
        request = Request(
            str(slot), prompt, params, (0, 0), slot, stops | set(params.stop_token_ids), ENGINE.max_model_len
        )
        batch.admit(Sample(request, 0, slot, slot=slot))
        positions[slot] = len(prompt) + len(generated)
        history[slot, : positions[slot]] = prompt + generated
    sampling, request = batch.host_slots.sampling, batch.host_slots.request
    row = jax.tree.map(lambda x: x[slots], sampling)
    rules = token_rules([params for params, *_ in rows], V)
    context = sampler.Context(history, slots, positions, request.prompt_length[slots], request.first_stop[slots], rules)
    return tuple(np.asarray(x)[:count] for x in process(logits, row, context))


def penalised(logits: np.ndarray, params: SamplingParams, prompt: list[int], generated: list[int]) -> np.ndarray:
    """vLLM's order: bias, then the repetition penalty of Hugging Face (prompt and completion), then OpenAI's two
    (completion alone).
    """
    out = logits.astype(np.float64)
    for token, value in params.logit_bias or ():
        out[token] += value
    for token in {*prompt, *generated}:
        out[token] = (
            out[token] / params.repetition_penalty if out[token] > 0 else out[token] * params.repetition_penalty
        )
    for token in set(generated):
        out[token] -= params.frequency_penalty * generated.count(token) + params.presence_penalty
    return out


ROWS = [
    (SamplingParams(), [1, 2, 3], [4, 4, 5]),
    (SamplingParams(repetition_penalty=1.3), [1, 2, 3], [4, 4, 5]),
    (SamplingParams(repetition_penalty=0.7), [1], []),
    (SamplingParams(presence_penalty=0.9), [1, 2, 3], [4, 4, 5]),
    (SamplingParams(frequency_penalty=0.6), [4, 4, 4], [4, 4, 5]),
    (SamplingParams(frequency_penalty=-1.5, presence_penalty=-0.5), [1], [4] * 10),
    (SamplingParams(logit_bias={9: 5.0, 383: -2.5, 0: -10_000.0}), [1], [2]),
    (
        SamplingParams(
            repetition_penalty=1.1, presence_penalty=0.3, frequency_penalty=0.2, logit_bias={4: 3.0}, temperature=0.7
        ),
        [4, 8],
        [4, 9, 9],
    ),
]


def test_bias_and_penalties_match_their_definitions():
    logits = some_logits(len(ROWS))
    found, scaled = processed(logits, ROWS)
    for i, (params, prompt, generated) in enumerate(ROWS):
        expected = penalised(logits[i], params, prompt, generated)
        np.testing.assert_allclose(found[i], expected, rtol=1e-6, atol=1e-6, err_msg=f"row {i}")
        np.testing.assert_allclose(scaled[i], expected / params.temperature, rtol=1e-6, atol=1e-6, err_msg=f"row {i}")
        assert (params == SamplingParams()) == same_bits(found[i], logits[i])


def test_a_row_that_asks_for_nothing_keeps_its_bits_beside_rows_that_do():
    logits = some_logits(len(ROWS))
    logits[:, 300] = -0.0
    plain, prompt, generated = ROWS[0]
    everything = SamplingParams(
        temperature=0.3,
        top_k=3,
        top_p=0.5,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=1.0,
        logit_bias={3: 1.0},
        min_tokens=9,
        stop_token_ids=[5],
    )
    for beside in ([(plain, prompt, generated)], ROWS[1:], [(everything, prompt, generated)]):
        rows = [(plain, prompt, generated), *beside * len(ROWS)][: len(ROWS)]
        for out in processed(logits, rows):
            assert same_bits(out[0], logits[0])


def test_stop_tokens_are_ruled_out_before_min_tokens():
    params = SamplingParams(min_tokens=2, stop_token_ids=[5])
    rows = [(params, [1, 2], [9] * count) for count in range(4)] + [(SamplingParams(stop_token_ids=[5]), [1, 2], [])]
    logits = some_logits(len(rows))
    found, _ = processed(logits, rows, frozenset([17]))
    for i, out in enumerate(found):
        ruled_out = {5, 17} if i < 2 else set()
        assert set(np.flatnonzero(out == -np.inf).tolist()) == ruled_out
        assert same_bits(np.where(out == -np.inf, logits[i], out), logits[i])


def test_temperature_zero_is_not_cut():
    """The logprob of a greedy token is that of the model's own distribution."""
    logits = some_logits(2)
    rows = [
        (SamplingParams(temperature=0.0, top_k=2, top_p=0.1), [1], []),
        (SamplingParams(temperature=0.5, top_k=2), [1], []),
    ]
    found, scaled = processed(logits, rows)
    assert same_bits(found, logits)
    assert (scaled[1] > -np.inf).sum() == 2


def test_the_extremes_that_are_allowed_stay_finite():
    """Whatever SamplingParams accepts, float32 can hold."""
    extremes = [
        dict(repetition_penalty=1e6),
        dict(repetition_penalty=1e-6),
        dict(temperature=1e6),
        dict(temperature=1.01e-5),
        dict(repetition_penalty=1e6, temperature=1.01e-5, logit_bias={1: 1e4, 2: -1e4}),
        dict(top_p=1e-300),
        dict(min_p=1e-300),
        dict(top_k=10**12),
        dict(min_tokens=10**12, stop_token_ids=[1]),
    ]
    logits = some_logits(len(extremes), width=20.0)
    _, scaled = processed(logits, [(SamplingParams(**settings), [1, 2, 3], [4]) for settings in extremes])
    logprobs = np.asarray(jax.jit(log_softmax)(scaled))
    assert not np.isnan(logprobs).any()
    np.testing.assert_allclose(np.exp(logprobs.astype(np.float64)).sum(-1), 1.0, rtol=1e-5)


# -- keys --------------------------------------------------------------------------------------------------------------


def test_fold_keys_are_chains_of_fold_in():
    folds = [(0, 0), (3, 0), (0, 3), (2**31 - 1, 16_383), (-1, 5), (5, -1), (-1, -1)]
    positions = np.array([1, 1, 2, 5, 7, 100_000, 0], np.int32)
    keys = [jax.random.key(i) for i in (0, 1, 2, 3, 2**32 - 1, 5, 6)]
    data = np.stack([np.asarray(jax.random.key_data(key)) for key in keys])
    found = jax.random.key_data(fold_keys(data, np.array(folds, np.int32), positions))
    for i, key in enumerate(keys):
        chain = [index for index in folds[i] if index >= 0] + [int(positions[i])]
        assert jax.random.key_data(functools.reduce(jax.random.fold_in, chain, key)).tolist() == found[i].tolist()


def test_keys_of_samples_positions_and_prompts_differ():
    folds = np.array([(p, s) for p in range(8) for s in range(8) for _ in range(8)], np.int32)
    positions = np.tile(np.arange(8, dtype=np.int32), 64)
    data = np.tile(np.asarray(jax.random.key_data(jax.random.key(0))), (512, 1))
    assert len({tuple(key) for key in jax.random.key_data(fold_keys(data, folds, positions)).tolist()}) == 512


# -- the draw ----------------------------------------------------------------------------------------------------------


def some_distribution(seed: int = 0) -> np.ndarray:
    """Logprobs with gaps, a whole block and the last ids among them."""
    logits = some_logits(1, seed, width=1.5)
    logits[:, [0, 3, 50, *range(128, 256), *range(370, V)]] = -np.inf
    return np.asarray(jax.jit(log_softmax)(np.repeat(logits, 2, 0)))[0]


def keys_of(count: int, seed: int = 0):
    return jax.random.split(jax.random.key(seed), count)


def test_draws_follow_the_probabilities():
    """Pearson's chi-square over tokens expected at least ten times, the rest together: within six deviations of its
    mean.
    """
    count, logprobs = 40_000, some_distribution()
    tokens = np.asarray(draw(np.tile(logprobs, (count, 1)), keys_of(count)))
    expected, found = count * np.exp(logprobs.astype(np.float64)), np.bincount(tokens, minlength=V)
    assert not found[logprobs == -np.inf].any(), "a token of probability zero was drawn"
    often = expected >= 10
    expected = np.append(expected[often], expected[~often].sum())
    found = np.append(found[often], found[~often].sum())
    freedom = len(expected) - 1
    assert freedom > 100
    assert abs(((found - expected) ** 2 / expected).sum() - freedom) < 6 * math.sqrt(2 * freedom)


def test_the_draw_is_the_documented_function():
    """Two uniforms of the key: one picks the block, one the id within it, each by inverse CDF."""
    count = 500
    logprobs = np.stack([some_distribution(seed) for seed in range(count)])
    tokens = np.asarray(draw(logprobs, keys_of(count)))
    first = lambda weights, u: int(np.searchsorted(np.cumsum(weights), u * weights.sum(), side="right"))
    uniforms = np.asarray(jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_of(count)))
    for row, (u, v), token in zip(np.exp(logprobs.astype(np.float64)), uniforms, tokens, strict=True):
        blocks = row.reshape(-1, VOCAB_BLOCK)
        block = first(blocks.sum(1), u)
        assert token == block * VOCAB_BLOCK + first(blocks[block], v)


@pytest.mark.parametrize(
    "setting",
    [contextlib.nullcontext, lambda: jax.threefry_partitionable(False), lambda: jax.enable_x64(True)],
    ids=["default", "original", "x64"],
)
def test_uniforms_are_jaxs_whatever_the_settings_of_the_process(setting):
    keys = jax.vmap(jax.random.key)(np.arange(10_000, dtype=np.uint32))
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    folded = jax.vmap(lambda key, i: jax.random.fold_in(jax.random.fold_in(key, 3), i))(keys, np.arange(10_000))
    words, folds = np.asarray(jax.random.key_data(keys)), np.tile(np.int32([3, -1]), (10_000, 1))
    with setting():
        assert same_bits(jax.jit(sampler.uniforms)(keys), uniforms)
        found = jax.jit(sampler.fold_keys)(words, folds, np.arange(10_000, dtype=np.int32))
    assert same_bits(jax.random.key_data(found), jax.random.key_data(folded))


def test_the_same_key_draws_the_same_token_in_any_row_of_any_batch():
    count = 128
    logprobs, keys = np.stack([some_distribution(seed) for seed in range(count)]), keys_of(count)
    tokens = np.asarray(draw(logprobs, keys))
    for size in (2, 8, 32):
        for start in (0, 17, 96):
            rows = np.random.default_rng(size + start).permutation(count)[:size]
            assert np.array_equal(draw(logprobs[rows], keys[rows]), tokens[rows])


def test_rounding_at_the_edge_never_picks_what_has_no_mass():
    weights = np.zeros((4, V), np.float32)
    weights[:, 5], weights[0, 9], weights[1, 380] = 0.1, 1e-30, 0.2
    weights[2] = 1 / 3
    for u in (0.0, 0.5, np.nextafter(np.float32(1), np.float32(0)), 1.0):  # 1 stands for a product that was rounded up
        found = np.asarray(draw_reference._inverse_cdf(weights, np.full(4, u, np.float32)))
        assert (weights[np.arange(4), found] > 0).all(), f"u = {u}"
    assert found.tolist() == [9, 380, V - 1, 5], "the last one of positive weight"


def test_a_certain_token_is_always_drawn():
    logprobs = np.full((64, V), -np.inf, np.float32)
    logprobs[np.arange(64), np.arange(64) * 6] = 0.0
    assert np.asarray(draw(logprobs, keys_of(64))).tolist() == [i * 6 for i in range(64)]


# -- logprob and entropy -----------------------------------------------------------------------------------------------


def test_logprobs_are_renormalised_over_what_is_kept():
    logits = some_logits(len(ROWS))
    rows = [(SamplingParams(top_k=4, temperature=0.8), prompt, generated) for _, prompt, generated in ROWS]
    _, scaled = processed(logits, rows)
    logprobs = np.asarray(jax.jit(log_softmax)(scaled))
    for i, row in enumerate(logprobs):
        ids = np.argsort(-logits[i], kind="stable")[:4]
        p = np.exp(logits[i, ids].astype(np.float64) / 0.8)
        np.testing.assert_allclose(row[ids], np.log(p / p.sum()), rtol=1e-5)
        assert set(np.flatnonzero(row > -np.inf).tolist()) == set(ids.tolist())


def test_entropy_counts_only_what_is_possible():
    logprobs = np.stack(
        [some_distribution(seed) for seed in range(3)] + [np.where(np.arange(V) == 3, 0.0, -np.inf).astype(np.float32)]
    )
    p = np.exp(logprobs.astype(np.float64))
    expected = -np.sum(p * np.where(p > 0, logprobs, 0.0), -1)
    np.testing.assert_allclose(jax.jit(sampler.entropy)(logprobs), expected, rtol=1e-5, atol=1e-7)


# -- pinned arithmetic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, low, high", [("exp", -87.0, 88.0), ("exp2", -125.9, 127.0)])
def test_exponentials_are_right_to_the_last_bit_or_so(name, low, high):
    x = np.linspace(low, high, 400_001).astype(np.float32)
    right = getattr(np, name)(x.astype(np.float64))
    assert np.abs(np.asarray(jax.jit(getattr(pinned_math, name))(x)).astype(np.float64) / right - 1).max() < 1e-7


def test_exponentials_at_their_edges():
    exp, exp2 = (
        pinned_math.exp(np.array([0, -0.0, -87.1, -np.inf, np.nan], np.float32)),
        pinned_math.exp2(np.arange(-126, 128.0)),
    )
    assert np.asarray(exp)[:4].tolist() == [1, 1, 0, 0] and math.isnan(exp[4])
    assert np.asarray(exp2).tolist() == [2.0**n for n in range(-126, 128)], "whole numbers give exact powers"
    assert np.asarray(pinned_math.exp2(np.array([-126.5, -np.inf], np.float32))).tolist() == [0, 0]


@pytest.mark.parametrize("name", ["exp", "exp2", "silu"])
def test_elementary_functions_have_the_same_bits_in_arrays_of_any_size(name):
    function = jax.jit(getattr(pinned_math, name))
    x = np.random.default_rng(0).uniform(-60, 20, 4096).astype(np.float32)
    whole = np.asarray(function(x))
    for size in (1, 2, 3, 8, 33):
        assert same_bits(
            np.concatenate([function(x[i : i + size]) for i in range(0, 33 * size, size)]), whole[: 33 * size]
        )


@pytest.mark.parametrize("name", ["row_sum", "row_cumsum"])
@pytest.mark.parametrize("width", [5, 96, 128, 1000])
def test_sums_along_rows_do_not_depend_on_the_number_of_rows(name, width):
    """On a CPU jnp.sum differs between these sizes, which is why it is not used."""
    function = jax.jit(getattr(pinned_math, name))
    x = np.random.default_rng(0).standard_normal((128, width)).astype(np.float32)
    whole = np.asarray(function(x))
    for rows in (2, 8, 32):
        assert same_bits(function(x[:rows]), whole[:rows])
        assert same_bits(function(x[-rows:]), whole[-rows:])
    right = x.astype(np.float64).sum(-1) if name == "row_sum" else np.cumsum(x.astype(np.float64), -1)
    np.testing.assert_allclose(whole, right, rtol=1e-5, atol=1e-4)


def test_log_softmax_leaves_impossible_tokens_impossible():
    logits = some_logits(2)
    logits[:, :100] = -np.inf
    found = np.asarray(jax.jit(log_softmax)(logits))
    right = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    assert (found[:, :100] == -np.inf).all()
    np.testing.assert_allclose(found[:, 100:], right[:, 100:], rtol=1e-6, atol=1e-6)
