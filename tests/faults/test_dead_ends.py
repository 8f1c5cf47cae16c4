"""Dead ends: what rules out every token ends the request. Those of grammars: face/test_structured_outputs.py."""

import pytest
from conftest import make_llm, random_model
from neighbours import assert_idle, run, start

from jaxengine import LLM, SamplingParams
from jaxengine.engine.collect import DEAD_END

VOCAB = 24  # as many as a request can rule out: stop tokens, the model's own included, before min_tokens
PROMPTS = [[3], list(range(20)), [1, 2] * 20]
PARAMS = [
    SamplingParams(max_tokens=9),
    SamplingParams(max_tokens=7, n=2, top_p=0.9),
    SamplingParams(max_tokens=5, temperature=0),
]
ALL = SamplingParams(max_tokens=9, min_tokens=4, stop_token_ids=range(16))  # and 16 … 23 are the model's


@pytest.fixture(scope="module")
def small():
    return random_model(vocab_size=VOCAB, num_hidden_layers=1, eos_token_ids=tuple(range(16, VOCAB)))


@pytest.fixture(params=[False, True], ids=["plain", "overlapped"])
def llm(request, small) -> LLM:
    return make_llm(*small, overlap=request.param, decode_steps=2)


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(temperature=0), dict(top_k=3), dict(top_p=0.5, n=3), dict(min_p=0.1, logit_bias={3: 9.0})],
    ids=str,
)
def test_a_request_with_every_token_ruled_out_ends_in_error(llm, settings):
    alone = run(llm, start(llm, PROMPTS, PARAMS))
    llm.generate([[8] * 40], SamplingParams(max_tokens=1))
    params = ALL.replace(**settings)
    requests = start(llm, [*PROMPTS, [5, 6, 7], [8] * 40], [*PARAMS, params, params])
    found = run(llm, requests)
    assert found[:4] == alone
    assert found[4:] == [([], b"", "error", DEAD_END)] * (2 * params.n), "nothing is drawn"
    assert_idle(llm)
    assert len(llm.engine.scheduler.page_pool.match([*[8] * 40, 1], 0, "")) == 1, (
        "pages that it shared are sound and stay"
    )


@pytest.mark.parametrize("temperature", [0, 1])
def test_one_token_that_is_left_is_drawn_until_the_others_are_allowed(llm, temperature):
    """top_k cuts what is left, not what was there before; a bias can make a token unlikely but rules out none."""
    params = ALL.replace(stop_token_ids=range(15), temperature=temperature, top_k=2, max_tokens=20)
    output, _ = llm.generate([[5, 6, 7], [8] * 40], params)
    assert output.outputs[0].token_ids[:4] == [15] * 4 and output.outputs[0].finish_reason in ("stop", "length")
    even = [
        llm.generate(
            [[5, 6, 7], [8] * 40],
            SamplingParams(
                temperature=temperature,
                seed=1,
                max_tokens=9,
                ignore_eos=True,
                logit_bias=dict.fromkeys(range(VOCAB), bias),
            ),
        )
        for bias in (0.0, -1e4)
    ]
    assert even[0][0].outputs[0].finish_reason == even[1][0].outputs[0].finish_reason == "length"
