"""The contract and the drift bound at long contexts, and rope at and past the trained length.

One batch of a few tokens beside the longest context, in as many ways as time allows, by bits. 4k runs by default, 16k
and 40k with `-m long`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import bits, make_llm, random_model

from benchmarks.drift import LIMIT, drift, small_llm
from jaxengine import Rollout, SamplingParams
from jaxengine.base.keys import sample_key
from jaxengine.config import RopeConfig
from jaxengine.models import plain

LENGTHS = [4096, pytest.param(16_384, marks=pytest.mark.long), pytest.param(40_960, marks=pytest.mark.long)]
NEW = 12


class Long:
    """A mixed batch around one long context, and its answers from the plain batch."""

    def __init__(self, longest: int) -> None:
        self.llm = small_llm(longest)
        lengths, rng = (3, longest, 300, longest // 4 + 1, 65), np.random.default_rng(0)
        whole = rng.integers(0, self.llm.config.vocab_size, longest).tolist()
        self.prompts = [whole[-n:] for n in lengths]
        self.prompts[3] = whole[: lengths[3]] + [
            5,
            6,
        ]  # what it shares with the longest can be found in the prefix cache
        self.sampling = [
            SamplingParams(max_tokens=NEW, temperature=t, top_p=p, key=sample_key(jax.random.key(1), i, 0))
            for i, (t, p) in enumerate([(1.0, 1.0), (1.0, 1.0), (0.0, 1.0), (0.7, 0.9), (1.3, 0.95)])
        ]
        with self.llm.engine.adjusted(enable_prefix_caching=False):
            self.outputs = self.run()
        self.expected = bits(self.outputs)

    def run(self, rows=slice(None)):
        return self.llm.generate(self.prompts[rows], self.sampling[rows])


@pytest.fixture(scope="module", params=LENGTHS)
def long(request) -> Long:
    return Long(request.param)


def test_c2_alone(long):
    """The longest without company, then the others without the longest."""
    with long.llm.engine.adjusted(enable_prefix_caching=False):
        assert bits(long.run(slice(1, 2))) == long.expected[1:2]
        assert bits(long.run(slice(2, None))) == long.expected[2:]


def test_c3_other_chunks(long):
    with long.llm.engine.adjusted(enable_prefix_caching=False, max_num_batched_tokens=112):
        assert bits(long.run()) == long.expected


def test_c4_hits(long):
    """A first run finds one prompt's pages in another's, a second one finds all."""
    long.llm.engine.scheduler.page_pool.clear_cache()
    assert bits(long.run()) == long.expected
    again = long.run()
    assert bits(again) == long.expected
    assert [o.num_cached_tokens for o in again] == [(len(p) - 1) // 64 * 64 for p in long.prompts]


def test_c7_overlapped(long):
    with long.llm.engine.adjusted(overlap=True, enable_prefix_caching=False):
        assert bits(long.run()) == long.expected


def test_c11_score(long):
    rollout = Rollout.from_outputs(long.outputs)
    found = long.llm.score(rollout.tokens, rollout.mask, long.sampling)
    assert (found.view(np.uint32) == rollout.logprobs.view(np.uint32)).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_drift_is_small(length):
    found = drift(length)
    assert found.kl < LIMIT and found.mean < 0.03, found
    assert found.mean > 1e-5, "bfloat16 is no float32: the comparison sees the difference"


# -- rope -------------------------------------------------------------------------------------------------------------

TRAINED = 256
ROPES = {
    "default": RopeConfig(1e4),
    "linear": RopeConfig(1e4, "linear", 4.0),
    "llama3": RopeConfig(5e5, "llama3", 8.0, TRAINED),
    "yarn": RopeConfig(1e4, "yarn", 4.0, TRAINED, attention_factor=0.1 * np.log(4.0) + 1),
}


def rope_model(kind: str, **changes):
    """`default` has no stretch: the length that it was trained for is where it ends."""
    length = TRAINED if kind == "default" else 4 * TRAINED
    return random_model(
        "Llama", rope=ROPES[kind], num_hidden_layers=1, vocab_size=300, max_position_embeddings=length, **changes
    )


@pytest.mark.parametrize(
    "kind", ["yarn", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("default", "linear", "llama3"))]
)
def test_rope_below_at_and_past_the_trained_length(kind):
    """Prompts that end around it, and tokens drawn there, against plain float32; chunks and scores by bits."""
    config, params = rope_model(kind)
    most, rng = config.max_position_embeddings, np.random.default_rng(0)
    lengths = [n for n in (TRAINED - 5, TRAINED - 1, TRAINED, TRAINED + 1, 3 * TRAINED, most - 8) if n < most]
    prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in lengths]
    llm = make_llm(config, params, max_model_len=most, max_num_batched_tokens=256)
    each = [SamplingParams(max_tokens=20, prompt_logprobs=0, key=jax.random.key(n)) for n in lengths]
    outputs = llm.generate(prompts, each)
    reference = jax.jit(lambda tokens: jax.nn.log_softmax(plain.logits(config, params, tokens)))
    for output in outputs:
        prompt, sample = output.prompt_token_ids, output.outputs[0]
        tokens = prompt + sample.token_ids
        expected = np.asarray(reference(jnp.array(tokens + [0] * (most - len(tokens)))))[
            np.arange(len(tokens) - 1), tokens[1:]
        ]
        found = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
        np.testing.assert_allclose([*found, *sample.token_logprobs], expected, rtol=0, atol=2e-4)
        assert len(tokens) == min(len(prompt) + 20, most)
    with llm.engine.adjusted(max_num_batched_tokens=48):
        assert bits(llm.generate(prompts[-2:], each[-2:])) == bits(outputs)[-2:]
    rollout = Rollout.from_outputs(outputs)
    assert (llm.score(rollout.tokens, rollout.mask, each).view(np.uint32) == rollout.logprobs.view(np.uint32)).all()


def test_rope_of_another_kind_is_seen():
    """The control: past the trained length the kinds differ by far more than the tolerance."""
    tokens, found = jnp.arange(2 * TRAINED) % 300, {}
    for kind in ROPES:
        config, params = rope_model(kind)
        found[kind] = np.asarray(jax.jit(lambda p, config=config: plain.logits(config, p, tokens)[-1])(params))
    assert all(np.abs(found[a] - found[b]).max() > 0.1 for a in found for b in found if a != b)


def test_no_further_than_the_model_goes():
    config, params = rope_model("default")
    with pytest.raises(ValueError, match=f"max_model_len={TRAINED + 1} is more than"):
        make_llm(config, params, max_model_len=TRAINED + 1)
