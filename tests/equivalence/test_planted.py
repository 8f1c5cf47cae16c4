"""The control of the equivalence suite: each mistake, planted into the engine, is seen by the same comparison."""

import collections
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Batch, Case
from naive import LENGTH
from test_equivalence import check, few_flips

from jaxengine import SamplingParams
from jaxengine.config import KV_TILE, EngineConfig, ModelConfig
from jaxengine.device import sampler, scoring
from jaxengine.ops import heads, xla
from jaxengine.ops.rope import cos_sin
from pallas_kernels import truncation_reference

MODEL = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=300,
    hidden_size=44,
    intermediate_size=60,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=20,
    max_position_embeddings=LENGTH,
)
ENGINE = EngineConfig(
    max_model_len=LENGTH,
    page_size=32,
    num_pages=30,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    compile_patience=99,
    kernels="xla",  # in whose code mistakes are planted
)
PROMPTS = tuple(tuple(np.random.default_rng(n).integers(0, MODEL.vocab_size, n).tolist()) for n in (3, 40, 64, 90))
SAMPLING = (
    SamplingParams(max_tokens=16),
    SamplingParams(max_tokens=16, top_k=5),
    SamplingParams(max_tokens=16, temperature=0.0),
    SamplingParams(max_tokens=16, presence_penalty=1.5),
)


def planted(number: int, seed: int = 0) -> Case:
    """The same case under a number of its own, so that jit traces it again."""
    batch = Batch(PROMPTS, SAMPLING, key=seed, chunk=64, caching=True, overlap=False, held_pages=0, held_slots=0)
    return Case(dataclasses.replace(MODEL, max_position_embeddings=LENGTH + number), ENGINE, (batch,))


def edge_left_out(real):
    """Top-k and top-p lose the last token that they should keep."""
    return lambda order, edge, missing: order > edge


def prompt_is_penalised(real):
    """Frequency and presence penalties count the prompt's tokens too."""

    def process(logits, row, context, *rest):
        return real(logits, row, context._replace(prompt_length=0 * context.prompt_length), *rest)

    return process


def keys_of_the_next_position(real):
    return lambda key, folds, positions: real(key, folds, positions + 1)


def queries_one_ahead(real):
    """Queries are rotated by one position more than keys; told apart by their number of heads."""
    one = cos_sin(jnp.ones(1, jnp.int32), MODEL.rope, MODEL.head_dim)
    return lambda x, cos, sin: (
        real(real(x, cos, sin), *one) if x.shape[1] == MODEL.num_attention_heads else real(x, cos, sin)
    )


def first_tile_for_the_second(real):
    """Keys of the second tile are never read, those of the first twice."""
    pages = KV_TILE // ENGINE.page_size

    def attention(q, keys, values, tables, positions, **how):
        return real(q, keys, values, tables.at[:, pages : 2 * pages].set(tables[:, :pages]), positions, **how)

    return attention


def softmax_of_xlas_own(real):
    """The trainer's distribution with the right numbers and other bits."""

    def other(logits, row, context, raw, kept=None):
        processed = real.process(logits, row, context)[1]
        return logits, jax.nn.log_softmax(jnp.where((row.temperature == 0)[:, None], logits, processed))

    return types.SimpleNamespace(**vars(real) | dict(distribution=other))


SLOW = pytest.mark.long  # each compiles a model
PLANTS = [
    pytest.param(1, truncation_reference, "_above", edge_left_out),
    pytest.param(2, scoring, "sampler", softmax_of_xlas_own, marks=SLOW),
    pytest.param(3, xla, "paged_attention", first_tile_for_the_second, marks=SLOW),
    pytest.param(4, sampler, "process", prompt_is_penalised, marks=SLOW),
    pytest.param(5, sampler, "fold_keys", keys_of_the_next_position, marks=SLOW),
    pytest.param(6, heads, "rotate", queries_one_ahead, marks=SLOW),
]


@SLOW
def test_nothing_planted():
    tally = collections.Counter()
    check(planted(0), tally)
    assert tally["tokens"] == 64 and few_flips(tally)


@pytest.mark.parametrize("number, owner, name, plant", PLANTS)
def test_a_planted_mistake_is_seen(number, owner, name, plant, monkeypatch):
    monkeypatch.setattr(owner, name, plant(getattr(owner, name)))
    with pytest.raises(AssertionError, match="no rounding explains it|differ in bits"):
        check(planted(number), collections.Counter())
