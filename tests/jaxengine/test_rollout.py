"""Rollout: the layout that a trainer takes."""
import dataclasses

import jax
import numpy as np
import pytest

from jaxengine import Rollout
from jaxengine.outputs import CompletionOutput, RequestOutput, VersionSpan


def sample(tokens: list[int], versions: list[VersionSpan], entropies=None) -> CompletionOutput:
    logprobs = -np.arange(1, len(tokens) + 1, dtype=np.float32)
    return CompletionOutput(0, "", tokens, logprobs, "length", None, versions, entropies=entropies)


def outputs() -> list[RequestOutput]:
    long = sample([7, 8, 9], [VersionSpan(0, 0, 1), VersionSpan(2, 1, 3)])
    short = sample([4], [VersionSpan(1, 0, 1)])
    return [RequestOutput("a", None, [1, 2], [long, sample([], [])], True), RequestOutput("b", None, [3], [short], True)]


def test_the_layout():
    found = Rollout.from_outputs(outputs())
    np.testing.assert_array_equal(found.tokens, [[1, 2, 7, 8, 9], [1, 2, 0, 0, 0], [3, 4, 0, 0, 0]])
    np.testing.assert_array_equal(found.mask, [[0, 0, 1, 1, 1], [0] * 5, [0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(found.logprobs, [[0, 0, -1, -2, -3], [0] * 5, [0, -1, 0, 0, 0]])
    np.testing.assert_array_equal(found.weight_versions, [[-1, -1, 0, 2, 2], [-1] * 5, [-1, 1, -1, -1, -1]])
    np.testing.assert_array_equal(found.lengths, [5, 2, 2])
    np.testing.assert_array_equal(found.group, [0, 0, 1])
    assert found.entropies is None and found.tokens.dtype == np.int32 and found.logprobs.dtype == np.float32


def test_a_length_pads_and_refuses():
    assert Rollout.from_outputs(outputs(), length=9).tokens.shape == (3, 9)
    with pytest.raises(ValueError, match="sample 0 has 5 tokens, more than length=4"):
        Rollout.from_outputs(outputs(), length=4)
    with pytest.raises(ValueError, match="no outputs"):
        Rollout.from_outputs([])


def test_entropies_come_from_all_or_none():
    some = outputs()
    some[1] = dataclasses.replace(some[1], outputs=[sample([4], [VersionSpan(1, 0, 1)], np.array([0.5], np.float32))])
    with pytest.raises(ValueError, match="only some samples have entropies"):
        Rollout.from_outputs(some)
    assert Rollout.from_outputs(some[1:]).entropies.tolist() == [[0, 0.5]]


def test_it_is_a_pytree_of_arrays():
    rollout = Rollout.from_outputs(outputs())
    moved = jax.tree.map(lambda x: x[:2], rollout)
    assert isinstance(moved, Rollout) and moved.tokens.shape == (2, 5) and moved.group.shape == (2,)
