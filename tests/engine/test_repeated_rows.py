"""Forks of one prompt share a row of the head, and padding has none: with the bits of a head that computes all rows."""

import dataclasses

import numpy as np
from conftest import NATIVE, bits, make_llm, random_model

from jaxengine import SamplingParams
from jaxengine.device import head_and_draw
from jaxengine.engine import engine
from jaxengine.engine.batch import rows_of
from jaxengine.ops.kernels import choose_kernels


def test_which_rows_are_fresh():
    """A group's first, and nothing in the padding. Of row 0 the head knows that it is."""
    rows = rows_of(8, [0, 7, 7, 7, 5], range(5), [0, 7, 7, 7, 5], [False] * 5)
    assert np.asarray(head_and_draw._fresh(rows)).tolist()[1:] == [True, False, False, True, False, False, False]


@NATIVE
def test_groups_have_the_bits_of_a_head_that_computes_all_rows(monkeypatch):
    """A group that goes over a tile's edge, one beside it, scored prompts, and a decode step that is half empty."""
    config, params = random_model(num_hidden_layers=1)
    prompts = [[1, 2, 3], [4] * 20, [5, 6, 7, 8, 9]]
    sampling = [
        SamplingParams(n=3, seed=1, max_tokens=4),
        SamplingParams(n=20, seed=2, max_tokens=5, prompt_logprobs=1),
        SamplingParams(n=6, seed=3, max_tokens=3, top_k=20),
    ]
    run = lambda: bits(make_llm(config, params, kernels="cpu").generate(prompts, sampling))
    found = run()

    def computing_all(*which):
        kernels = choose_kernels(*which)
        assert kernels.skips_repeated
        return dataclasses.replace(kernels, skips_repeated=False)

    monkeypatch.setattr(engine, "choose_kernels", computing_all)
    assert run() == found and len({tuple(tokens) for tokens, *_ in found[3:23]}) > 10
