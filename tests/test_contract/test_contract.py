"""The contract, C1 to C7: every axis may change, no bit does. Bits are compared as bytes, never with a tolerance.

Each model runs a mixed batch of 24 requests once, in one engine; every test runs the same requests in another way and
compares.
"""

import functools
import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from conftest import FAMILIES, FEW_TILES, ONE_TILE, bits, make_llm, random_model

from jaxengine import LLM, SamplingParams
from jaxengine.base.keys import sample_key
from jaxengine.command.bench import compilations
from jaxengine.device.needs import Needs
from jaxengine.engine import step_variants
from jaxengine.engine.step_variants import StepVariants, Variant
from jaxengine.ops.tiles import BASE, TILES, Tile

KEY = 7
LENGTHS = (1, 2, 5, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 80, 95, 96, 97, 110, 127, 128, 129, 160, 200)
DEFAULT = [
    ("Qwen3", "bfloat16", 1),
    ("Qwen2", "bfloat16", 4),
    ("Llama", "float32", 4),
    ("Qwen3Moe", "bfloat16", 2),
    ("calc", "bfloat16", 1),
]
ALL_TILES = DEFAULT[
    0
]  # the model on which every tile serves as soon as it fits; the others take FEW_TILES, unless the run is long
DEEP = DEFAULT[2]  # the model of four layers
FULL = [(f, d, n) for f in (*FAMILIES, "calc") for d in ("bfloat16", "float32") for n in (1, 4)]
FULL += [model for model in DEFAULT if model not in FULL]


def name(model: tuple) -> str:
    return "-".join(map(str, model))


def marked_long(model: tuple, by_default: list[tuple]):
    """A parameter that runs by default, or with `-m long`."""
    return pytest.param(model, id=name(model), marks=() if model in by_default else pytest.mark.long)


CASES = [marked_long(model, DEFAULT) for model in FULL]


class Case:
    """A model, its requests and the answers of the plain mixed batch."""

    def __init__(self, family: str, dtype: str, leaves: int, **engine) -> None:
        if family == "calc":
            loaded = LLM(
                "calc", dtype=dtype, reduction_leaves=leaves, progress=False, max_model_len=256, max_num_seqs=1
            )
            self.config, self.params = loaded.config, loaded.params
        else:
            depth = dict(num_hidden_layers=4) if (family, dtype, leaves) == DEEP else {}
            self.config, self.params = random_model(family, dtype=dtype, reduction_leaves=leaves, **depth)
        few = (family, dtype, leaves) in DEFAULT and (family, dtype, leaves) != ALL_TILES
        self.tiles = FEW_TILES if few else TILES
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(0, self.config.vocab_size, n).tolist() for n in LENGTHS]
        self.sampling = [self._sampling(i) for i in range(len(LENGTHS))]
        self.expected = bits(self.engine(**engine).generate(self.prompts, self.sampling, key=jax.random.key(KEY)))

    def engine(self, **changes) -> LLM:
        """An engine in which each of the case's tiles serves as soon as it fits."""
        with mock.patch.object(step_variants, "TILES", self.tiles):
            return make_llm(self.config, self.params, **dict(compile_patience=0) | changes)

    def _sampling(self, i: int) -> SamplingParams:
        """A mix: greedy, sampled, cut, penalised, biased, of differing lengths."""
        return SamplingParams(
            max_tokens=6 + i % 5 * 5,
            temperature=(1.0, 0.0, 0.7, 1.3)[i % 4],
            top_p=(1.0, 0.9)[i % 2],
            top_k=(0, 20, 0)[i % 3],
            min_p=0.02 if i % 5 == 0 else 0.0,
            repetition_penalty=1.2 if i % 6 == 1 else 1.0,
            frequency_penalty=0.5 if i % 7 == 2 else 0.0,
            logit_bias={3: 2.0} if i % 8 == 3 else None,
            min_tokens=4 if i % 3 == 1 else 0,
        )

    def keyed(self) -> list[SamplingParams]:
        """The same requests, each with its own key: they can run in any order, or alone."""
        return [p.replace(key=sample_key(jax.random.key(KEY), i, 0)) for i, p in enumerate(self.sampling)]


@functools.cache
def answered(*model) -> Case:
    """A model's case, answered once: its programs are large."""
    return Case(*model)


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return answered(*request.param)


def same(case: Case, llm: LLM) -> LLM:
    """Runs the case's batch in another engine, compares, and leaves the engine for a look."""
    assert bits(llm.generate(case.prompts, case.sampling, key=jax.random.key(KEY))) == case.expected
    llm.engine.scheduler.check_integrity()
    return llm


def test_answers_are_no_constants(case):
    assert len({tokens[0] for tokens, *_ in case.expected}) > 3
    assert {len(tokens) for tokens, *_ in case.expected} >= {6, 11, 16, 21, 26} or case.config.eos_token_ids


def test_c1_again(case):
    same(case, case.engine())


def test_c2_alone(case):
    llm = case.engine(enable_prefix_caching=False)
    for i, (prompt, params) in enumerate(zip(case.prompts, case.keyed(), strict=True)):
        assert bits(llm.generate([prompt], params)) == [case.expected[i]], f"request {i} alone"


def test_c2_shuffled(case):
    order, keyed = np.random.default_rng(1).permutation(len(case.prompts)), case.keyed()
    found = bits(case.engine().generate([case.prompts[i] for i in order], [keyed[i] for i in order]))
    assert [found[list(order).index(i)] for i in range(len(order))] == case.expected


@pytest.mark.parametrize("chunk", [16, 64])
def test_c3_chunks(case, chunk):
    llm = case.engine()
    # The step keeps its size and gets a smaller share: the same programs, other chunks.
    with llm.engine.adjusted(enable_prefix_caching=False, max_num_batched_tokens=chunk):
        same(case, llm)


def test_c4_cache_hits_of_prompt_pages(case):
    llm = same(case, case.engine())
    again = llm.generate(case.prompts, case.sampling, key=jax.random.key(KEY))
    assert bits(again) == case.expected
    assert [o.num_cached_tokens for o in again] == [(n - 1) // 32 * 32 for n in LENGTHS]


def test_c4_partial_hits(case):
    """Prompts whose first 70 tokens are cached, and which go on otherwise in the middle of a page."""
    llm, cold = case.engine(), case.engine(enable_prefix_caching=False)
    llm.generate(case.prompts, case.sampling, key=jax.random.key(KEY))
    prompts = [p[:70] + [5, 6, 7] for p in case.prompts[-8:]]
    warm = llm.generate(prompts, SamplingParams(max_tokens=8), key=jax.random.key(1))
    assert all(o.num_cached_tokens == 64 for o in warm)
    assert bits(warm) == bits(cold.generate(prompts, SamplingParams(max_tokens=8), key=jax.random.key(1)))


def test_c4_hits_of_generated_pages(case):
    """A second turn: prompt and completion of the first, whose pages decoding wrote."""
    llm, cold = case.engine(), case.engine(enable_prefix_caching=False)
    params = SamplingParams(max_tokens=70, ignore_eos=True)
    first = llm.generate(case.prompts[:6], params, key=jax.random.key(2))
    turns = [o.prompt_token_ids + o.outputs[0].token_ids + [9, 8] for o in first]
    warm = llm.generate(turns, SamplingParams(max_tokens=6), key=jax.random.key(3))
    assert all(o.num_cached_tokens >= 64 for o in warm)
    assert bits(warm) == bits(cold.generate(turns, SamplingParams(max_tokens=6), key=jax.random.key(3)))


def test_c5_preempted(case):
    """A pool so small that requests lose their pages and are recomputed."""
    llm = case.engine()
    long = [p.replace(max_tokens=40, ignore_eos=True) for p in case.sampling]
    run = lambda llm: bits(llm.generate(case.prompts, long, key=jax.random.key(4)))
    with llm.engine.adjusted(enable_prefix_caching=False, held_pages=llm.engine_config.num_pages - 1 - 12):
        found = run(llm)
    assert llm.engine.scheduler.num_preemptions > 0
    assert found == run(case.engine())
    llm.engine.scheduler.check_integrity()


def test_c6_slots(case):
    """The five last slots; the others are taken, as by other requests."""
    llm = case.engine()
    llm.engine.scheduler._free_slots = llm.engine.scheduler._free_slots[:5]
    assert bits(llm.generate(case.prompts, case.sampling, key=jax.random.key(KEY))) == case.expected


def test_c7_overlapped(case):
    same(case, case.engine(overlap=True))


def test_group_equals_singles(case):
    llm = case.engine()
    params, prompt = SamplingParams(n=8, max_tokens=10), case.prompts[-2]
    group = bits(llm.generate([prompt], params, key=jax.random.key(5)))
    singles = [
        bits(llm.generate([prompt], params.replace(n=1, key=sample_key(jax.random.key(5), 0, i))))[0] for i in range(8)
    ]
    assert group == singles and len({tuple(tokens) for tokens, *_ in group}) > 1


# -- axes that change the shapes of the programs, and so compile: one model each by default ---------------------------

FIRST_TILES = dict(compile_patience=1_000_000)
SMALL = dict(page_size=16, num_pages=21, **FIRST_TILES)
CHANGES = [
    dict(page_size=64, max_num_seqs=40, num_pages=300, max_model_len=300),
    dict(max_num_seqs=3, max_num_batched_tokens=48),
    dict(decode_steps=3, overlap=True, num_pages=17),
]
SHAPES = [marked_long(model, DEFAULT[:1]) for model in FULL if model[2] == 1]


@pytest.fixture(scope="module", params=SHAPES)
def shaped(request) -> Case:
    return answered(*request.param)


def test_c5_c6_small_pages(shaped):
    same(shaped, shaped.engine(**SMALL))


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_c5_c6_c7_sizes(changes):
    case = answered(*DEFAULT[0])
    same(case, case.engine(**FIRST_TILES | changes))


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from test_contract import Case, digest
print(digest(Case(*{model!r}, compile_patience=1_000_000)))
"""


def digest(case: Case) -> str:
    return hashlib.sha256(repr(case.expected).encode()).hexdigest()


def test_c1_new_process():
    """It compiles everything again: nothing comes from the compilation cache."""
    here = Path(__file__).parent
    script = SCRIPT.format(paths=[str(here), str(here.parent)], model=DEFAULT[0])
    compiling = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    found = subprocess.run(
        [sys.executable, "-c", script], env=compiling, capture_output=True, text=True, check=True, timeout=600
    )
    assert found.stdout.split()[-1] == digest(answered(*DEFAULT[0]))


# -- the checks can fail ----------------------------------------------------------------------------------------------


def test_a_tile_of_other_bits_is_refused(monkeypatch):
    """A decode step on single rows takes another path through XLA: the probe sees it and the base tile serves."""
    single = Tile(1, 1)
    monkeypatch.setattr(step_variants, "TILES", ONE_TILE | {"decode": (single, BASE)})
    config, params = random_model("Qwen3", dtype="float32")
    llm = make_llm(config, params, compile_patience=0, kernels="xla")
    outputs = bits(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=8, temperature=0)))
    assert llm.engine.step_variants.refused == [Variant("decode", single, Needs.PLAIN)]
    monkeypatch.undo()
    assert outputs == bits(
        make_llm(config, params, kernels="xla").generate([[1, 2, 3]], SamplingParams(max_tokens=8, temperature=0))
    )


def unproven(self, variant, params, cache):
    """In the place of StepVariants._prove."""
    self._proven[variant] = True
    return cache


def test_without_the_proof_bits_move(monkeypatch):
    """The control: single-row steps serve unproven, and a request alone has not the bits that it has in a batch."""
    monkeypatch.setattr(step_variants, "TILES", ONE_TILE | {"decode": (Tile(1, 1), BASE)})
    monkeypatch.setattr(StepVariants, "_prove", unproven)
    config, params = random_model("Qwen3", dtype="float32")
    llm = make_llm(config, params, compile_patience=0, kernels="xla")
    prompts = [list(range(1, 20)), list(range(5, 40))]
    greedy = SamplingParams(max_tokens=12, temperature=0)
    assert bits(llm.generate(prompts[:1], greedy)) != bits(llm.generate(prompts, greedy))[:1]


def test_each_step_is_compiled_once_and_nothing_after_warm_up(monkeypatch):
    """Whatever runs: other lengths, batch sizes and sampling parameters, hits, preemptions, a new cache for a lost one.

    One test, because compiled code may be dropped between tests (conftest.py). What comes from the compilation cache
    counts as compiled. The model is one that no other test of this process has compiled.
    """
    monkeypatch.setattr(step_variants, "TILES", FEW_TILES)
    case, llm = answered(*DEFAULT[0]), make_llm(*random_model(num_hidden_layers=1, vocab_size=300), compile_patience=0)
    prompts = [[token % 300 for token in prompt] for prompt in case.prompts]
    with compilations() as names:
        llm.warm_up()
    assert Counter(name for name in names if "_step" in name) == {
        f"jit({kind}_step)": len(tiles) for kind, tiles in FEW_TILES.items()
    }
    run = lambda: bits(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3), key=jax.random.key(KEY)))
    expected = run()
    with compilations() as names:
        llm.generate(prompts, case.sampling, key=jax.random.key(KEY))
        for count in (1, 3, 24):
            llm.generate(
                prompts[:count], SamplingParams(n=2, max_tokens=9, logprobs=3, prompt_logprobs=2, entropy=True)
            )
        assert not names
        for array in jax.tree.leaves(llm.engine.cache):
            array.delete()
        llm.engine._recover()
        assert run() == expected and not [name for name in names if "_step" in name]
