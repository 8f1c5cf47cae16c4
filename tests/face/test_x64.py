"""jax_enable_x64, which many a trainer sets for its own sums: no bit of the engine's changes."""

import jax
import numpy as np
from conftest import bits, make_llm

import jaxengine
from jaxengine import SamplingParams

PARAMS = [
    SamplingParams(n=2, max_tokens=5, top_k=20, top_p=0.9, min_p=0.01, logprobs=2, ignore_eos=True),
    SamplingParams(
        max_tokens=4, temperature=0, logit_bias={3: 1.0}, min_tokens=2, stop_token_ids=[7], prompt_logprobs=1
    ),
    SamplingParams(max_tokens=6, repetition_penalty=1.2, presence_penalty=0.5, seed=2**40 + 5, raw_logprobs=True),
]


def test_no_bit_changes_under_x64(tiny):
    generate = lambda llm: llm.generate([[1, 2, 3] * 12, list(range(50)), [9] * 4], PARAMS, key=jax.random.key(5))
    expected = generate(tiny)
    rollout = jaxengine.Rollout.from_outputs(expected)
    each = [PARAMS[i] for i in rollout.group]
    with jax.enable_x64(True):
        llm = make_llm(tiny.config, tiny.params, decode_steps=2, page_checksums=True, overlap=True)
        found = generate(llm)
        logprobs = jaxengine.score(llm.params, rollout.tokens, rollout.mask, each, config=tiny.config)
    assert (
        bits(found) == bits(expected) and found[0].digest == expected[0].digest and not llm.engine.step_variants.refused
    )
    assert np.asarray(logprobs).tobytes() == rollout.logprobs.tobytes()
