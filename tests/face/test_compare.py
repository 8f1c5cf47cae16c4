"""Comparing samples sees every bit."""

import dataclasses

import numpy as np

from jaxengine import CompletionOutput
from jaxengine.contract.compare import compare


def samples(count: int = 4, tokens: int = 4) -> list[CompletionOutput]:
    rng = np.random.RandomState(0)
    return [
        CompletionOutput(
            i, "", rng.randint(0, 9, tokens).tolist(), -rng.rand(tokens).astype(np.float32), "length", None, []
        )
        for i in range(count)
    ]


def test_comparing_sees_every_bit():
    drawn = samples()
    assert compare("again", drawn, samples()).holds
    logprobs, token_ids = drawn[2].token_logprobs.copy(), drawn[2].token_ids
    logprobs.view(np.uint32)[3] ^= 1
    for change in (
        dict(token_logprobs=logprobs),
        dict(token_ids=[*token_ids[:3], 9]),
        dict(token_ids=token_ids[:3], token_logprobs=drawn[2].token_logprobs[:3]),
    ):
        found = compare("again", drawn, [*drawn[:2], dataclasses.replace(drawn[2], **change), drawn[3]])
        assert not found.holds and str(found).startswith("3 of 4 samples again; first difference: sample 2, ")
    assert not compare("again", drawn, drawn[:3]).holds and not compare("again", drawn[:3], drawn).holds


def test_comparing_tells_the_sign_of_zero():
    zero, minus = (dataclasses.replace(samples()[0], token_logprobs=np.array([x] * 4, np.float32)) for x in (0.0, -0.0))
    assert not compare("again", [zero], [minus]).holds
