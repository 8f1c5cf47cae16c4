"""The contract under Pallas kernels, which a CPU interprets: the same axes; how kernels are chosen."""

import dataclasses
import functools
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CPU_BODIES, NATIVE, bits, make_llm, random_model

import jaxengine
from jaxengine import LLM, SamplingParams
from jaxengine.base.keys import sample_key
from jaxengine.config import EngineConfig
from jaxengine.device import checksums
from jaxengine.device.kv_cache import Cache
from jaxengine.device.needs import Needs
from jaxengine.engine.step_variants import Variant
from jaxengine.ops.kernels import OF_PLATFORM, XLA, choose_kernels, cpu_kernels, kernels_of
from jaxengine.ops.tiles import Tile
from jaxengine.rl.rollout import Rollout
from pallas_kernels.implementations import Implementation

SMALL = dict(vocab_size=250, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
LENGTHS = (3, 17, 40, 30, 30)
INTERPRETED, CHAIN = "pallas_interpret", "pallas_gpu_interpret"


class Case:
    """A model, its requests, each with its own key, and the answers of the batch."""

    def __init__(self, family: str, dtype: str, leaves: int, layers: int, **engine) -> None:
        self.config, self.params = random_model(
            family, dtype=dtype, reduction_leaves=leaves, num_hidden_layers=layers, **SMALL
        )
        sizes = dict(max_model_len=128, max_num_seqs=8, num_pages=40, max_num_batched_tokens=32, kernels=INTERPRETED)
        self.kernels = engine.get("kernels", INTERPRETED)
        self.llm = make_llm(self.config, self.params, **sizes | engine)
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(0, 250, n).tolist() for n in LENGTHS]
        cut = (
            dict(),
            dict(temperature=0.7, top_k=20),
            dict(temperature=0.0),
            dict(top_p=0.9, repetition_penalty=1.2),
            dict(min_p=0.02),
        )
        self.sampling = [
            SamplingParams(max_tokens=6, ignore_eos=True, key=sample_key(jax.random.key(7), i, 0), **each)
            for i, each in enumerate(cut)
        ]
        self.outputs = self.llm.generate(self.prompts, self.sampling)
        self.expected = bits(self.outputs)
        self.rollout = Rollout.from_outputs(self.outputs)

    def again(self, **adjusted) -> list[tuple]:
        self.llm.engine.scheduler.page_pool.clear_cache()
        with self.llm.engine.adjusted(**adjusted):
            return bits(self.llm.generate(self.prompts, self.sampling))

    def score(self, params, kernels: str | None = None):
        how = dict(config=self.config, kernels=kernels or self.kernels)
        return jaxengine.score(params, self.rollout.tokens, self.rollout.mask, self.sampling, **how)

    @functools.cached_property
    def with_gradient(self):
        return self.scored_with_gradient(self.kernels)

    def scored_with_gradient(self, kernels: str):
        """(logprobs as they are inside value_and_grad, gradient of their sum)"""

        def loss(params):
            logprobs = self.score(params, kernels)
            return logprobs.sum(), logprobs

        (_, logprobs), gradient = jax.value_and_grad(loss, has_aux=True)(self.params)
        return logprobs, gradient


CASES = [
    pytest.param(("Qwen3", "float32", 1, 1, dict(compile_patience=1_000_000)), id="Qwen3-float32-1-1"),
    pytest.param(
        ("Qwen2", "bfloat16", 2, 1, dict(compile_patience=0)), marks=pytest.mark.long, id="Qwen2-bfloat16-2-1"
    ),
    pytest.param(
        ("Qwen3", "bfloat16", 2, 2, dict(compile_patience=0, kernels="cpu")), marks=NATIVE, id="cpu-Qwen3-bfloat16-2-2"
    ),
    pytest.param(
        ("Qwen2", "float16", 1, 1, dict(compile_patience=0, kernels="cpu")),
        marks=[NATIVE, pytest.mark.slow],
        id="cpu-Qwen2-float16-1-1",
    ),
    pytest.param(
        ("Qwen3", "float32", 2, 1, dict(compile_patience=1_000_000, kernels=CHAIN)),
        marks=pytest.mark.slow,
        id="chain-Qwen3-float32-2-1",
    ),
    *(
        pytest.param(
            ("Qwen3Moe", "float32", 2, 1, dict(compile_patience=1_000_000, kernels=kernels)),
            marks=pytest.mark.slow,
            id=f"{kernels}-Qwen3Moe-float32-2-1",
        )
        for kernels in (INTERPRETED, CHAIN)
    ),
    pytest.param(
        ("Qwen2", "bfloat16", 1, 1, dict(compile_patience=0, kernels=CHAIN)),
        marks=pytest.mark.long,
        id="chain-Qwen2-bfloat16-1-1",
    ),
]


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    *model, engine = request.param
    return Case(*model, **engine)


def test_a_request_alone(case):
    with case.llm.engine.adjusted(enable_prefix_caching=False):
        for prompt, params, expected in zip(case.prompts, case.sampling, case.expected, strict=True):
            assert bits(case.llm.generate([prompt], params)) == [expected]


def test_chunks(case):
    assert case.again(max_num_batched_tokens=16, enable_prefix_caching=False) == case.expected


def test_cached_pages(case):
    case.again()
    outputs = case.llm.generate(case.prompts, case.sampling)
    assert bits(outputs) == case.expected and sum(output.num_cached_tokens for output in outputs) > 0


def test_preempted(case):
    before = case.llm.engine.scheduler.num_preemptions
    assert case.again(held_pages=case.llm.engine_config.num_pages - 1 - 3, enable_prefix_caching=False) == case.expected
    assert case.llm.engine.scheduler.num_preemptions > before


def test_overlapped_and_few_slots(case):
    assert case.again(overlap=True, held_slots=5) == case.expected


def same_bits(found, rollout: Rollout) -> bool:
    return np.array_equal(np.asarray(found).view(np.uint32), rollout.logprobs.view(np.uint32))


def test_scored(case):
    assert case.rollout.mask.sum() == 6 * len(LENGTHS) and same_bits(case.score(case.params), case.rollout)


def test_scored_inside_value_and_grad(case):
    assert same_bits(case.with_gradient[0], case.rollout)


# Attention of bfloat16 pages rounds queries and weights, which plain XLA does not.
NEAR = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 2e-2}


def test_near_plain_xla(case):
    off = np.abs(np.asarray(case.score(case.params, "xla")) - case.rollout.logprobs).max()
    assert 0 < off < NEAR[case.config.dtype], "0: was it the same code?"


def test_the_gradient_is_near_plain_xlas(case):
    gradient, (_, plain_gradient) = case.with_gradient[1], case.scored_with_gradient("xla")
    norm = lambda x: float(jnp.sqrt(sum((leaf.astype(jnp.float32) ** 2).sum() for leaf in jax.tree.leaves(x))))
    off = jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), gradient, plain_gradient)
    assert norm(off) < NEAR[case.config.dtype] * norm(plain_gradient)


def test_the_contract_names_the_kernels(case):
    plain = make_llm(case.config, case.params, max_model_len=128, num_pages=40, kernels="xla")
    assert case.llm.contract().digest != plain.contract().digest
    assert any(line.startswith("kernels.name:") for line in case.llm.contract().differences(plain.contract()))


def test_every_step_serves(case):
    assert case.llm.engine.step_variants.refused == []


@pytest.mark.long
@pytest.mark.parametrize("case", CASES[1:], indirect=True)
def test_verify(case):
    """Every axis that the engine itself can run."""
    found = case.llm.verify(quick=True, samples=8)
    assert found and not found.refused, str(found)


@pytest.mark.long
def test_a_wide_decode_step(case):
    """More sequences at once than any tile of plain XLA holds."""
    llm = make_llm(
        case.config,
        case.params,
        max_model_len=64,
        max_num_seqs=128,
        num_pages=200,
        kernels=case.kernels,
        compile_patience=0,
    )
    requests = [(prompt[:8], params) for prompt, params in zip(case.prompts, case.sampling, strict=True)]
    expected = [bits(case.llm.generate([prompt], params))[0] for prompt, params in requests]
    assert (
        bits(llm.generate([prompt for prompt, _ in requests * 8], [params for _, params in requests * 8]))
        == expected * 8
    )
    assert llm.engine.step_variants._proven[Variant("decode", Tile(1, 128), Needs.ALL)]


# -- the choice -------------------------------------------------------------------------------------------------------

MODEL = random_model(**SMALL)[0]
LEAVES = "reduction_leaves", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size"


def on_a(monkeypatch, platform: str, kind: str) -> None:
    monkeypatch.setattr(jax, "devices", lambda *_: [types.SimpleNamespace(platform=platform, device_kind=kind)])


@pytest.mark.parametrize(
    ("platform", "kind", "chosen"),
    [
        pytest.param("cpu", "cpu", cpu_kernels(), marks=NATIVE),
        ("tpu", "TPU v6 lite", kernels_of(Implementation("pallas_tpu", "TPU v6e"))),
        ("gpu", "NVIDIA H100 80GB HBM3", kernels_of(Implementation("pallas_gpu", "Hopper"))),
    ],
)
def test_auto_is_the_devices_own(platform, kind, chosen, monkeypatch):
    on_a(monkeypatch, platform, kind)
    assert choose_kernels.__wrapped__("auto", MODEL) == chosen


@pytest.mark.parametrize(
    ("platform", "kind", "model", "why"),
    [
        ("gpu", "NVIDIA A100-SXM4-80GB", MODEL, "no block sizes for device 'NVIDIA A100-SXM4-80GB'"),
        (
            "tpu",
            "TPU v5e",
            dataclasses.replace(MODEL, dtype="float16"),
            "take weights in bfloat16 or float32, got float16",
        ),
        ("gpu", "NVIDIA H200", dataclasses.replace(MODEL, head_dim=320), "heads of at most 256, got head_dim=320"),
        pytest.param(
            "cpu", "cpu", dataclasses.replace(MODEL, head_dim=320), "at most 256, got head_dim=320", marks=NATIVE
        ),
        pytest.param(
            "cpu",
            "cpu",
            dataclasses.replace(MODEL, **dict.fromkeys(LEAVES, 256)),
            "got reduction_leaves=256",
            marks=NATIVE,
        ),
    ],
)
def test_where_they_do_not_fit_auto_says_so_and_a_name_is_refused(platform, kind, model, why, monkeypatch, caplog):
    on_a(monkeypatch, platform, kind)
    with caplog.at_level(logging.WARNING):
        assert choose_kernels.__wrapped__("auto", model) is XLA
    assert f"kernels: 'xla' in the place of '{OF_PLATFORM[platform]}'" in caplog.text and why in caplog.text
    with pytest.raises(ValueError, match=why):
        choose_kernels.__wrapped__(OF_PLATFORM[platform], model)


def test_names_that_are_refused():
    for make in (
        lambda: EngineConfig(kernels="palas_gpu"),
        lambda: LLM.from_params(MODEL, None, kernels="palas_gpu"),
        lambda: choose_kernels("palas_gpu", MODEL),
    ):
        with pytest.raises(
            ValueError, match="kernels must be one of auto, xla, .*, cpu, got 'palas_gpu', did you mean 'pallas_gpu'"
        ):
            make()
    with pytest.raises(ValueError, match="no block sizes for device 'cpu'"):
        LLM.from_params(MODEL, None, kernels="pallas_tpu")


def test_a_page_size_that_the_tile_has_not_is_refused():
    with pytest.raises(ValueError, match="take 32 keys of this model at a time.*page_size must divide that, got 64"):
        LLM.from_params(MODEL, None, kernels=INTERPRETED, page_size=64)


@pytest.mark.parametrize("side", ["keys", "values"])
def test_the_canary_sees_each_word(side):
    kernels = choose_kernels(INTERPRETED, dataclasses.replace(MODEL, dtype="bfloat16"))
    pools = [
        jnp.ones(pool.shape, pool.dtype)
        for pool in kernels.attention.pools(dataclasses.replace(MODEL, dtype="bfloat16"), 3, 32)
    ]
    cache = Cache((pools[0],), (pools[1],), jnp.zeros((1, 1), jnp.int32), ())
    sums = lambda cache: np.asarray(checksums.token_sums(cache, jnp.array([1, 2]), kernels=kernels))
    for head, word in ((0, 0), (1, 31)):
        changed = dataclasses.replace(cache, **{side: (getattr(cache, side)[0].at[2, head, 5, word].set(-1),)})
        assert np.argwhere(sums(changed) != sums(cache)).tolist() == [[1, 5]]


def test_what_runs_is_shown():
    for name in ("xla", "pallas_interpret"):
        assert LLM.from_params(MODEL, None, num_pages=40, kernels=name).engine_config.kernels == name
    assert LLM.from_params(MODEL, None, num_pages=40).engine_config.kernels == ("cpu" if CPU_BODIES else "xla")
