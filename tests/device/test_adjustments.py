"""Rules and penalties against plain loops and transformers; and how much of the history a step reads for them."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.base import machine
from jaxengine.config import EngineConfig
from jaxengine.device import adjustments, sampler
from jaxengine.device.sampling_arrays import token_rules
from jaxengine.engine.batch import BatchBuilder, history_uploads
from jaxengine.host.sample import Drawn, Request, Sample
from jaxengine.ops.tiles import HISTORY_BLOCK, HISTORY_ROWS
from jaxengine.sampling_params import SamplingParams

V = 384
ROWS = 8
LONG = 2048
Row = tuple[SamplingParams, list[int], list[int]]  # parameters, prompt, completion
process, distribution = jax.jit(sampler.process), jax.jit(sampler.distribution)


def some_logits(seed: int = 0) -> np.ndarray:
    """Multiples of 1/8 below 16: penalties by powers of two are exact."""
    return (np.random.default_rng(seed).integers(-128, 128, (ROWS, V)) / 8).astype(np.float32)


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, V, count).tolist()


def same_bits(a, b) -> bool:
    return np.array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


def arrays_of(rows: list[Row], max_model_len: int = LONG):
    """(sampling of each row, context) as the engine's admission makes them; slots hold another's tokens before it."""
    rows = rows + [(SamplingParams(), [1], [])] * (ROWS - len(rows))
    batch = BatchBuilder(EngineConfig(max_num_seqs=ROWS, max_model_len=max_model_len))
    history = np.full((ROWS + 1, max_model_len), 7, np.int32)
    slots, positions = np.arange(ROWS, dtype=np.int32), np.zeros(ROWS, np.int32)
    for slot, (params, prompt, completion) in enumerate(rows):
        request = Request(str(slot), prompt, params, (0, 0), slot, frozenset(params.stop_token_ids), max_model_len)
        batch.admit(Sample(request, 0, slot, Drawn(token_ids=completion), slot=slot))
        positions[slot] = len(prompt) + len(completion)
        history[slot, : positions[slot]] = prompt + completion
    sampling, request = batch.host_slots.sampling, batch.host_slots.request
    rules = token_rules([params for params, *_ in rows], V)
    context = sampler.Context(history, slots, positions, request.prompt_length[slots], request.first_stop[slots], rules)
    return jax.tree.map(lambda x: x[slots], sampling), context


def adjusted(logits: np.ndarray, rows: list[Row]) -> np.ndarray:
    return np.asarray(process(logits, *arrays_of(rows))[0])


# -- the plain loop ----------------------------------------------------------------------------------------------------


def plain(logits: np.ndarray, params: SamplingParams, prompt: list[int], completion: list[int]) -> np.ndarray:
    """One row in float32, in vLLM's order."""
    out, one = logits.copy(), np.float32
    for token in range(V):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            out[token] = -np.inf
    for *begin, last in params.bad_words_token_ids:
        if completion[len(completion) - len(begin) :] == begin and len(begin) <= len(completion):
            out[last] = -np.inf
    for token, value in params.biases:
        out[token] += one(value)
    if len(completion) < params.min_tokens:
        out[list(params.stop_token_ids)] = -np.inf
    for token in {*prompt, *completion}:
        out[token] = (
            out[token] / one(params.repetition_penalty)
            if out[token] > 0
            else out[token] * one(params.repetition_penalty)
        )
    for token in set(completion):
        out[token] -= one(params.frequency_penalty) * one(completion.count(token))
        out[token] -= one(params.presence_penalty)
    return out


PENALTIES = SamplingParams(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
EVERYTHING = PENALTIES.replace(
    allowed_token_ids=range(0, V, 2),
    bad_words_token_ids=[[4], [8, 6], [8, 8, 10], [6, 8, 8, 12], [5, 14]],
    logit_bias={16: 2.5, 18: -4.0},
    min_tokens=50,
    stop_token_ids=[20, 21],
)
TAIL = [6, 8, 8]
EDGES = [1, 2, HISTORY_BLOCK - 1, HISTORY_BLOCK, HISTORY_BLOCK + 1, 2 * HISTORY_BLOCK, LONG - 5, LONG - 4]


@pytest.mark.parametrize("params", [PENALTIES, EVERYTHING], ids=["penalties", "everything"])
def test_every_length_gives_the_plain_loops_bits(params):
    """Of prompts around the blocks that are counted, in one tile, and each beside rows that ask for nothing."""
    logits = some_logits()
    rows = [(params, some_tokens(length, seed), TAIL) for seed, length in enumerate(EDGES)]
    expected = [plain(logits[i], *row) for i, row in enumerate(rows)]
    assert same_bits(adjusted(logits, rows), expected)
    for i in (0, 4, 7):
        alone = [(SamplingParams(), prompt, completion) for _, prompt, completion in rows]
        alone[i] = rows[i]
        found = adjusted(logits, alone)
        assert same_bits(found[i], expected[i])
        assert same_bits(np.delete(found, i, 0), np.delete(logits, i, 0))


def test_completions_around_a_block_are_counted_apart_from_the_prompt():
    logits = some_logits(1)
    lengths = [
        (1, 0),
        (1, HISTORY_BLOCK),
        (HISTORY_BLOCK, 1),
        (HISTORY_BLOCK - 1, 2),
        (300, 700),
        (700, 300),
        (5, 1900),
    ]
    rows = [(PENALTIES, some_tokens(a, a), (some_tokens(b, b) + [9] * 3)[:b]) for a, b in lengths]
    expected = [plain(logits[i], *row) for i, row in enumerate(rows)]
    assert same_bits(adjusted(logits, rows)[: len(rows)], expected)


INEXACT = SamplingParams(repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.3)
REPEATED = [token for token in range(64) for _ in range(token % 12)]


def with_inexact_penalties(process) -> bool:
    """Whether a row has the bits of the plain loop, which rounds every product.

    Of negative logits, because XLA divides positive ones by multiplying.
    """
    logits = -np.abs(np.random.default_rng(2).normal(size=(ROWS, V))).astype(np.float32)
    found = process(logits, *arrays_of([(INEXACT, [1, 2, 3], REPEATED)]))[0]
    return same_bits(found[0], plain(logits[0], INEXACT, [1, 2, 3], REPEATED))


def test_products_in_penalties_are_rounded():
    assert with_inexact_penalties(process)


@pytest.mark.skipif("fma" not in machine.device()["features"], reason="nothing fuses a product into a sum here")
def test_products_that_are_not_would_be_seen(monkeypatch):
    monkeypatch.setattr(adjustments, "rounded", lambda x, nothing: x)
    assert not with_inexact_penalties(jax.jit(lambda *given: sampler.process(*given)))


def test_bad_words_are_of_the_completion():
    """As in vLLM: the tokens that a bad word begins with count where they were generated, in the word's order."""
    words = [[3, 4, 5], [9], [7, 8]]
    params, logits = SamplingParams(bad_words_token_ids=words), some_logits()
    cases = [  # (prompt, completion, what is ruled out)
        ([1], [3, 4], {5, 9}),
        ([3], [4], {9}),  # it would begin in the prompt
        ([3, 4], [], {9}),
        ([1], [4, 3], {9}),
        ([1], [3, 4, 1], {9}),
        ([1], [3, 3, 4], {5, 9}),
        ([1], [7], {8, 9}),
        ([7], [7] * 300, {8, 9}),
    ]
    found = adjusted(logits, [(params, prompt, completion) for prompt, completion, _ in cases])
    assert [set(np.flatnonzero(row == -np.inf).tolist()) for row in found] == [ruled_out for *_, ruled_out in cases]


def test_each_row_has_rules_of_its_own():
    logits = some_logits()
    rules = [dict(allowed_token_ids=[i, 31, 32, V - 1]) for i in range(4)] + [
        dict(bad_words_token_ids=[[i]]) for i in range(2)
    ]
    rows = [(SamplingParams(**each), [1], [2]) for each in rules] + [(SamplingParams(logit_bias={7: 1.5}), [1], [])]
    assert same_bits(adjusted(logits, rows), [plain(logits[i], *row) for i, row in enumerate(rows)] + [logits[-1]])


@pytest.mark.reference
def test_transformers_processors_agree():
    """Where the meaning is one: its bad words may begin in the prompt, so these begin in the completion."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    logits = some_logits()
    rows = [(SamplingParams(repetition_penalty=1.3), some_tokens(20 + i, i), TAIL) for i in range(ROWS)]
    words = [[4], [8, 6], [8, 8, 10], [6, 8, 8, 12], [5, 14]]
    repetition = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    no_bad_words = transformers.NoBadWordsLogitsProcessor(words, eos_token_id=V - 1)
    found = adjusted(logits, rows)
    ruled_out = adjusted(logits, [(SamplingParams(bad_words_token_ids=words), *rest) for _, *rest in rows])
    for i, (_, prompt, completion) in enumerate(rows):
        ids, scores = torch.tensor([prompt + completion]), torch.tensor(logits[i : i + 1])
        np.testing.assert_allclose(found[i], repetition(ids, scores)[0].numpy(), rtol=1e-6)
        assert same_bits(ruled_out[i], no_bad_words(ids, scores)[0].numpy())


# -- what a step reads -------------------------------------------------------------------------------------------------


def trips(monkeypatch, run, *arguments) -> list[int]:
    """How often the loops of a step run, found by running it as Python."""
    found, original = [], jax.lax.fori_loop

    def recorded(lower, upper, *rest, **how):
        found.append(int(upper))
        return original(lower, upper, *rest, **how)

    with jax.disable_jit(), monkeypatch.context() as patched:
        patched.setattr(jax.lax, "fori_loop", recorded)
        run(*jax.tree.map(jnp.asarray, arguments))
    return found


def test_the_history_is_read_up_to_the_longest_row_that_asks(monkeypatch):
    logits, plain_row = some_logits(), SamplingParams()
    long, short = some_tokens(3 * HISTORY_BLOCK + 1), some_tokens(HISTORY_BLOCK)
    for penalty in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        asks = SamplingParams(**{penalty: 1.5})
        for rows, expected in (
            ([(asks, long, []), (asks, short, [])], [4]),
            ([(plain_row, long, []), (asks, short, [])], [1]),
            ([(plain_row, long, []), (asks, short, [3])], [2]),
            ([(plain_row, long, []), (plain_row, short, [])], []),
        ):
            assert trips(monkeypatch, sampler.process, logits, *arrays_of(rows, 8192)) == expected
    for rules in (dict(allowed_token_ids=[5]), dict(bad_words_token_ids=[[3, 5]]), dict(logit_bias={3: 1.0})):
        rows = [(SamplingParams(min_tokens=9, stop_token_ids=[1], **rules), long, [])]
        assert trips(monkeypatch, sampler.process, logits, *arrays_of(rows, 8192)) == []


def test_rows_that_are_scored_as_they_are_read_nothing(monkeypatch):
    asks, logits = EVERYTHING.replace(top_p=0.5, top_k=5), some_logits()
    row, context = arrays_of([(asks, some_tokens(1000), [1])] * ROWS)
    assert trips(monkeypatch, sampler.distribution, logits, row, context, np.ones(ROWS, bool)) == []
    raw = np.arange(ROWS) != 2
    penalised, processed = distribution(logits, row, context, raw)
    assert same_bits(np.asarray(processed)[raw], logits[raw])
    only_one = process(logits, row, context)
    assert same_bits(penalised[2], only_one[0][2]) and same_bits(processed[2], only_one[1][2])


def results(jaxpr):
    """The shapes of all that a program computes, inside loops and branches too."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from results(inner)


@pytest.mark.parametrize("params", [EVERYTHING.replace(top_p=0.9, top_k=40, min_p=0.01)])
def test_nothing_as_long_as_the_context_is_computed(params):
    length = 1024 * 257
    jaxpr = jax.make_jaxpr(sampler.process)(some_logits(), *arrays_of([(params, [1], [2])], length))
    shapes = set(results(jaxpr.jaxpr))
    assert any(HISTORY_BLOCK in shape for shape in shapes), "the loop's body is among them"
    assert max(max(shape, default=0) for shape in shapes) < length // 8


def test_an_upload_is_as_long_as_the_tokens():
    lengths = [1, 2, HISTORY_BLOCK - 1, HISTORY_BLOCK, HISTORY_BLOCK + 1, 5000]
    sequences = [(slot, some_tokens(length, slot)) for slot, length in enumerate(lengths)]
    uploads = history_uploads(9, sequences)
    assert len(uploads) == 1 and uploads[0][2].shape == (HISTORY_ROWS, HISTORY_BLOCK)
    found = {slot: [0] * 4 * LONG for slot, _ in sequences}
    for slots, blocks, tokens in uploads:
        for slot, block, row in zip(slots.tolist(), blocks.tolist(), tokens.tolist(), strict=True):
            if slot < 9:
                found[slot][block * HISTORY_BLOCK : (block + 1) * HISTORY_BLOCK] = row
    for slot, tokens in sequences:
        assert found[slot][: len(tokens)] == tokens
