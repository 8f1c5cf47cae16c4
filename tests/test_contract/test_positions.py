"""No token is dropped and none is attended to twice: models built by hand say which positions their attention read.

`needle` names the one token that each position looked for, `counting` says how many tokens of each class a position
saw: at all lengths around blocks, pages and tiles and over thousands of positions, prefilled in chunks, decoded, and on
cached pages, in shuffled pages.
"""

import numpy as np
import pytest
from position_models import CLASSES, counting, counts, needle

from jaxengine import LLM, SamplingParams
from jaxengine.config import KV_TILE
from jaxengine.engine.batch import BatchBuilder
from jaxengine.host.page_pool import PagePool
from jaxengine.ops import xla

EDGES = (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 128, 129, 191, 192, 193, 511, 512, 513)
LONGEST, NEW = 3001, 50
SLOW = pytest.mark.long
SIZES = [pytest.param(16, 48, "float32", marks=SLOW), (32, 256, "bfloat16")]
LONG = [pytest.param(16_384, marks=SLOW), pytest.param(40_960, marks=SLOW)]
GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0)


def llm_of(config, params, page_size=32, chunk=256, longest=LONGEST, kernels="auto") -> LLM:
    """An engine whose free pages lie in random order. Equal sizes compile once, whatever the weights."""
    num_pages = sum(-(-(n + 2 * NEW) // page_size) for n in (*EDGES, longest)) + 16
    llm = LLM.from_params(
        config,
        params,
        max_model_len=longest + 2 * NEW,
        page_size=page_size,
        num_pages=num_pages,
        max_num_seqs=32,
        max_num_batched_tokens=chunk,
        compile_patience=10**6,
        kernels=kernels,
    )
    np.random.default_rng(0).shuffle(llm.engine.scheduler.page_pool._free)
    return llm


# -- needle: which token ----------------------------------------------------------------------------------------------


def needle_llm(targets: np.ndarray, longest: int, dtype: str, **sizes) -> LLM:
    """Tokens that no test uses look for themselves: models of one size compile once."""
    more = np.arange(len(targets), sum(EDGES) + longest)
    return llm_of(*needle(np.append(targets, more), longest + 2 * NEW, dtype), longest=longest, **sizes)


@pytest.mark.parametrize("page_size, chunk, dtype", SIZES)
def test_every_prefilled_position_finds_its_needle(page_size, chunk, dtype):
    """Each token looks for a random one that stands before it, or for itself."""
    lengths, rng = (*EDGES, LONGEST), np.random.default_rng(1)
    source = rng.permutation(LONGEST)
    targets = np.zeros(LONGEST, int)
    targets[source] = source[rng.integers(0, np.arange(LONGEST) + 1)]
    llm = needle_llm(targets, LONGEST, dtype, page_size=page_size, chunk=chunk)
    prompts = [source[:n].tolist() for n in lengths]
    for prompt, output in zip(
        prompts, llm.generate(prompts, GREEDY.replace(max_tokens=1, prompt_logprobs=1)), strict=True
    ):
        named = [likeliest(entry) for entry in output.prompt_logprobs[1:]] + output.outputs[0].token_ids
        assert named == targets[prompt].tolist(), f"prompt of {len(prompt)} tokens"


def likeliest(entry: dict) -> int:
    return min(entry, key=lambda token: entry[token].rank)


@pytest.mark.parametrize("page_size, chunk, dtype", SIZES)
def test_every_decoded_position_finds_its_needle(page_size, chunk, dtype):
    walk_cycles(LONGEST, dtype, page_size=page_size, chunk=chunk)


@pytest.mark.parametrize("longest", LONG)
def test_needles_in_long_contexts(longest):
    walk_cycles(longest, "bfloat16", page_size=64)


def walk_cycles(longest: int, dtype: str, **sizes) -> None:
    """A prompt is a cycle in random order: each token looks for its successor, so completions walk the cycle.

    A second turn walks on over the first one's pages, which decoding wrote.
    """
    lengths, rng = (*EDGES, longest), np.random.default_rng(2)
    cycles = np.split(rng.permutation(sum(lengths)), np.cumsum(lengths)[:-1])
    targets = np.zeros(sum(lengths), int)
    for cycle in cycles:
        targets[cycle] = np.roll(cycle, -1)
    llm = needle_llm(targets, longest, dtype, **sizes)
    first = llm.generate([rng.permutation(cycle).tolist() for cycle in cycles], GREEDY)
    second = llm.generate([o.prompt_token_ids + o.outputs[0].token_ids for o in first], GREEDY)
    size = llm.engine_config.page_size
    assert [o.num_cached_tokens for o in second] == [(n + NEW - 1) // size * size for n in lengths]
    for output in (*first, *second):
        token = output.prompt_token_ids[-1]
        walk = [token := int(targets[token]) for _ in range(NEW)]
        assert output.outputs[0].token_ids == walk, f"prompt of {len(output.prompt_token_ids)} tokens"


# -- counting: how many -----------------------------------------------------------------------------------------------


def counted(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> None:
    """Every position that the outputs tell of has seen each token before it once, and none after it."""
    for output in llm.generate(prompts, params):
        n, sample = len(output.prompt_token_ids), output.outputs[0]
        expected = np.cumsum(np.eye(CLASSES + 2)[output.prompt_token_ids + sample.token_ids], 0)[:, :CLASSES]
        before = enumerate(output.prompt_logprobs or [])
        entries = [(i, entry) for i, entry in before if i] + [(n + i, entry) for i, entry in enumerate(sample.logprobs)]
        found = np.array([counts(entry, i) for i, entry in entries])
        off = np.abs(found - expected[[i - 1 for i, _ in entries]]).max(1)
        assert (off < 0.25).all(), (
            f"prompt of {n} tokens: after {entries[off.argmax()][0]} tokens a count is off by {off.max():.2f}"
        )


def marked(lengths, seed: int = 3) -> list[list[int]]:
    return [np.random.default_rng(seed + n).integers(0, CLASSES, n).tolist() for n in lengths]


EVERYTHING = SamplingParams(max_tokens=NEW, prompt_logprobs=CLASSES + 2, logprobs=CLASSES + 2)


def counting_llm(longest: int = LONGEST, **sizes) -> LLM:
    return llm_of(*counting(longest + 2 * NEW), longest=longest, **sizes)


@pytest.mark.parametrize("page_size, chunk", [(32, 256), pytest.param(16, 48, marks=SLOW)])
def test_every_token_counts_once(page_size, chunk):
    counted(counting_llm(page_size=page_size, chunk=chunk), marked((*EDGES, LONGEST)), EVERYTHING)


@pytest.mark.parametrize("longest", LONG)
def test_every_token_of_long_contexts_counts_once(longest):
    counted(counting_llm(longest, page_size=64), marked((*EDGES, longest)), EVERYTHING)


def test_every_token_of_cached_pages_counts_once():
    """After cached beginnings of a prompt that end anywhere, in groups whose samples share pages, and in chunks."""
    (whole,), llm = marked([1500]), counting_llm()
    counted(llm, [whole], EVERYTHING)
    params = EVERYTHING.replace(prompt_logprobs=None, n=2)
    counted(llm, [whole[:n] + [3, 5] for n in (*EDGES, 1024, 1499)], params)
    with llm.engine.adjusted(max_num_batched_tokens=48):
        counted(llm, [whole[:n] + [7] * NEW for n in (*EDGES, 1024, 1499)], params.replace(max_tokens=8))


# -- the checks can fail ----------------------------------------------------------------------------------------------


def attention(change):
    """paged_attention with other tables or positions."""
    return lambda real: lambda q, k, v, tables, positions, **how: real(q, k, v, *change(tables, positions), **how)


def page_twice(real):
    """table_changes that give the second page of a table the first one's place in the pool."""

    def changes(self, samples):
        for slots, places, pages in map(np.copy, real(self, samples)):
            firsts = {slot: page for slot, place, page in zip(slots, places, pages, strict=True) if place == 0}
            pages[places == 1] = [firsts.get(slot, 0) for slot in slots[places == 1]]
            yield np.stack([slots, places, pages])

    return changes


PAGES = KV_TILE // 32
PLANTS = {
    "the token itself is not seen": (
        xla,
        "paged_attention",
        attention(lambda tables, positions: (tables, positions - 1)),
    ),
    "a token after it is seen": (xla, "paged_attention", attention(lambda tables, positions: (tables, positions + 1))),
    "a tile is dropped": (
        xla,
        "paged_attention",
        attention(lambda t, positions: (t.at[:, PAGES : 2 * PAGES].set(0), positions)),
    ),
    "a tile is read twice": (
        xla,
        "paged_attention",
        attention(lambda t, p: (t.at[:, PAGES : 2 * PAGES].set(t[:, :PAGES]), p)),
    ),
    "a page is in a table twice": (BatchBuilder, "table_changes", page_twice),
    "a cached page in place of others": (
        PagePool,
        "match",
        lambda real: lambda self, *request: real(self, *request)[:1] * 5,
    ),
}


FAST = ("a tile is read twice", "a page is in a table twice", "a cached page in place of others")


@pytest.mark.parametrize("plant", [pytest.param(plant, marks=() if plant in FAST else SLOW) for plant in PLANTS])
def test_a_planted_mistake_is_seen(plant, monkeypatch):
    owner, name, change = PLANTS[plant]
    monkeypatch.setattr(owner, name, change(getattr(owner, name)))
    # What is planted into a step needs a model of its own, so that jit traces it again.
    own = dict(longest=300 + list(PLANTS).index(plant), kernels="xla") if owner is xla else {}
    llm = counting_llm(**own)
    (prompt,) = marked([200])
    with pytest.raises(AssertionError, match="a count is off"):
        counted(llm, [prompt], EVERYTHING)
        counted(llm, [prompt[:190]], EVERYTHING.replace(prompt_logprobs=None))


@SLOW
def test_a_dropped_tile_loses_needles(monkeypatch):
    change = PLANTS["a tile is dropped"][2]
    monkeypatch.setattr(xla, "paged_attention", change(xla.paged_attention))
    with pytest.raises(AssertionError, match="prompt of 127 tokens|prompt of 65 tokens|prompt of 128 tokens"):
        walk_cycles(700, "bfloat16", kernels="xla")
