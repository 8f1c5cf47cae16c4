"""Rollout: its layout, and its file."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxengine
from checkpoints.tensor_file import write_tensors
from jaxengine import Rollout, SamplingParams
from jaxengine.outputs import CompletionOutput, RequestOutput, VersionSpan


def sample(tokens: list[int], versions: list[VersionSpan], entropies=None) -> CompletionOutput:
    logprobs = -np.arange(1, len(tokens) + 1, dtype=np.float32)
    return CompletionOutput(0, "", tokens, logprobs, "length", None, versions, entropies=entropies)


def outputs() -> list[RequestOutput]:
    long = sample([7, 8, 9], [VersionSpan(0, 0, 1), VersionSpan(2, 1, 3)])
    short = sample([4], [VersionSpan(1, 0, 1)])
    return [
        RequestOutput("a", None, [1, 2], [long, sample([], [])], True),
        RequestOutput("b", None, [3], [short], True),
    ]


def test_the_layout():
    rollout = Rollout.from_outputs(outputs())
    np.testing.assert_array_equal(rollout.tokens, [[1, 2, 7, 8, 9], [1, 2, 0, 0, 0], [3, 4, 0, 0, 0]])
    np.testing.assert_array_equal(rollout.mask, [[0, 0, 1, 1, 1], [0] * 5, [0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(rollout.logprobs, [[0, 0, -1, -2, -3], [0] * 5, [0, -1, 0, 0, 0]])
    np.testing.assert_array_equal(rollout.weight_versions, [[-1, -1, 0, 2, 2], [-1] * 5, [-1, 1, -1, -1, -1]])
    np.testing.assert_array_equal(rollout.lengths, [5, 2, 2])
    np.testing.assert_array_equal(rollout.group, [0, 0, 1])
    assert rollout.entropies is None and rollout.tokens.dtype == np.int32 and rollout.logprobs.dtype == np.float32


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


def of_prompts(*prompts: list[int], n: int = 1) -> list[RequestOutput]:
    spans = [VersionSpan(0, 0, 1)]
    return [RequestOutput(str(i), None, prompt, [sample([9], spans)] * n, True) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize(
    "outputs, groups, expected",
    [
        (of_prompts([1], [1], [2], [2]), None, [0, 0, 1, 1]),  # each prompt repeated
        (of_prompts([1], [2], [1], [2]), None, [0, 1, 0, 1]),  # the list of prompts repeated
        (of_prompts([1], [2], [3]), None, [0, 1, 2]),
        (of_prompts([1], [1], n=2), None, [0, 0, 1, 1]),  # n=2 has said what a group is
        (of_prompts([1], n=2) + of_prompts([1], [1]), None, [0, 0, 1, 1]),
        (of_prompts([1], [1], [1], [1]), [7, 7, 3, 3], [0, 0, 1, 1]),  # two problems that begin alike
        (of_prompts([1], [2], [3]), ["a", "b", "a"], [0, 1, 0]),
        (of_prompts([1], [2], n=2), np.array([5, 5]), [0, 0, 0, 0]),
    ],
)
def test_groups(outputs, groups, expected):
    assert Rollout.from_outputs(outputs, groups=groups).group.tolist() == expected


def test_groups_are_one_for_each_prompt():
    with pytest.raises(ValueError, match="3 groups for 2 outputs"):
        Rollout.from_outputs(of_prompts([1], [2]), groups=[0, 0, 1])


def test_finish_reasons():
    whole = outputs()
    for output, reason in zip(whole, ("stop", None), strict=True):
        output.outputs[0] = dataclasses.replace(output.outputs[0], finish_reason=reason)
    rollout = Rollout.from_outputs(whole, length=9)
    assert rollout.finish_reasons.tolist() == [0, 1, -1]
    assert rollout.ended_by("length").tolist() == [False, True, False]
    joined = jax.tree.map(lambda *parts: np.concatenate(parts), rollout, rollout)
    assert joined.ended_by("stop").tolist() == [True, False, False] * 2
    with pytest.raises(ValueError, match="stop, length, abort, error, got 'eos'"):
        rollout.ended_by("eos")
    with pytest.raises(ValueError, match="has no finish_reasons"):
        dataclasses.replace(rollout, finish_reasons=None).ended_by("stop")


def test_it_is_a_pytree_of_arrays():
    rollout = Rollout.from_outputs(outputs())
    moved = jax.tree.map(lambda x: x[:2], rollout)
    assert isinstance(moved, Rollout) and moved.tokens.shape == (2, 5) and moved.group.shape == (2,)


# -- on disk -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tiny) -> Rollout:
    params = [
        SamplingParams(n=2, max_tokens=9, temperature=0.7, top_p=0.9, entropy=True, logit_bias={5: 1.5}),
        SamplingParams(max_tokens=5, repetition_penalty=1.2, entropy=True),
    ]
    rollout = Rollout.from_outputs(tiny.generate([[3] * 20, [4, 5]], params, key=jax.random.key(2)), length=40)
    kept = jaxengine.sampling_mask(
        tiny.params, rollout.tokens, rollout.mask, rollout.sampling_params, config=tiny.config
    )
    return dataclasses.replace(rollout, sampling_mask=kept)


def test_a_saved_rollout_is_scored_and_replayed_by_bits(drawn, tiny, tmp_path):
    drawn.save(tmp_path / "new folder" / "rollout.safetensors")
    loaded = Rollout.load(tmp_path / "new folder" / "rollout.safetensors")
    assert jax.tree.structure(loaded) == jax.tree.structure(drawn) and drawn.sampling_mask is not None
    for (path, before), after in zip(jax.tree.leaves_with_path(drawn), jax.tree.leaves(loaded), strict=True):
        assert before.dtype == after.dtype and before.tobytes() == after.tobytes(), path
    scored = tiny.score(loaded.tokens, loaded.mask, loaded.sampling_params)
    assert scored.tobytes() == loaded.logprobs.tobytes() and np.abs(scored).max() > 0
    assert [tiny.replay(coordinate).holds for coordinate in loaded.coordinates] == [True] * 3
    assert [c.to_json() for c in loaded.coordinates] == [c.to_json() for c in drawn.coordinates]


def test_a_rollout_without_coordinates_is_saved_too(drawn, tmp_path):
    moved = jax.tree.map(lambda x: x[1:], drawn)
    assert moved.coordinates is None
    moved.save(tmp_path / "some.safetensors")
    assert Rollout.load(tmp_path / "some.safetensors").coordinates is None
    with pytest.raises(ValueError, match="this rollout has no coordinates"):
        print(moved.sampling_params)


def test_files_that_are_no_rollouts_are_refused_by_name(drawn, tmp_path):
    file = tmp_path / "rollout.safetensors"
    drawn.save(file)
    with pytest.raises(FileExistsError, match="rollout.safetensors exists"):
        drawn.save(file)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text", whole[:20] + b"\0" * 20 + whole[40:]):
        (tmp_path / "broken").write_bytes(content)
        with pytest.raises(ValueError, match="broken is truncated or corrupt, or no safetensors file"):
            Rollout.load(tmp_path / "broken")
    with pytest.raises(FileNotFoundError, match="missing is not a file"):
        Rollout.load(tmp_path / "missing")
    write_tensors(tmp_path / "other", {"weights": np.ones(3)}, {})
    with pytest.raises(ValueError, match="other is no rollout that Rollout.save wrote: it holds weights"):
        Rollout.load(tmp_path / "other")
    assert not [entry for entry in tmp_path.iterdir() if entry.name.startswith(".unfinished")]
