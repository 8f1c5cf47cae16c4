"""Each family against what transformers computed in float32 (make_golden.py): every position's logits, through the
model and the engine.

Run with -s to see the differences.
"""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from model_logits import largest_difference, model_logits

from checkpoints.safetensors_files import open_folder
from jaxengine import LLM, SamplingParams
from jaxengine.models import loading

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(folder.name for folder in GOLDEN.iterdir())
TOLERANCE = 1e-4
QUICK = {("qwen2-tied-group-7", 2), ("llama-llama3-untied-group-3", 2), ("qwen3moe-3-of-6", 2)}
ENGINE_LOGPROBS = 20  # of the likeliest tokens at each prompt position


@functools.cache
def expected(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name / "expected.npz") as arrays:
        return dict(arrays)


def leaves_of(name: str) -> list[int]:
    """All that the heads allow, copies of them too, up to 4."""
    config = loading.read_model_config(GOLDEN / name)
    queries, heads = config.num_attention_heads, config.num_key_value_heads
    return [n for n in (1, 2, 4) if heads % n == 0 or (n % heads == 0 and queries % n == 0)]


def test_the_cases_cover_what_the_families_differ_in():
    configs = [loading.read_model_config(GOLDEN / name) for name in CASES]
    by_family = {
        architecture: [c for c in configs if c.architecture == architecture]
        for architecture in ("Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM")
    }
    for family in by_family.values():
        assert {c.tie_word_embeddings for c in family} == {True, False}
        assert len({c.group_size for c in family}) >= 4
        assert any(c.rope.kind == "yarn" for c in family)
    assert all(c.qk_norm for c in by_family["Qwen3ForCausalLM"]) and all(
        c.qkv_bias for c in by_family["Qwen2ForCausalLM"]
    )
    experts = [c for c in configs if c.num_experts]
    assert {c.norm_topk_prob for c in experts} == {True, False} and {c.num_experts_per_tok for c in experts} == {1, 3}
    assert (
        {c.out_bias for c in by_family["Qwen3ForCausalLM"]}
        == {c.out_bias for c in by_family["LlamaForCausalLM"]}
        == {True, False}
    )
    assert {c.rope.kind for c in by_family["LlamaForCausalLM"]} == {"default", "linear", "llama3", "yarn"}
    assert {c.group_size for c in configs} == {1, 2, 3, 4, 7}
    assert {c.head_dim for c in configs} >= {20, 24, 32, 40}
    assert {n for name in CASES for n in leaves_of(name)} == {1, 2, 4}
    assert {c.dtype for c in configs} == {"float32", "bfloat16"}
    for name, config in zip(CASES, configs, strict=True):
        if config.rope.kind in ("llama3", "yarn"):
            assert expected(name)["tokens"].shape[1] > config.rope.original_max_position_embeddings


@pytest.mark.parametrize("name", CASES)
def test_logits_of_every_position(name, record_property):
    """In float32, with every number of leaves that the heads allow."""
    for leaves in leaves_of(name):
        config = loading.read_model_config(GOLDEN / name, dtype="float32", reduction_leaves=leaves)
        params = loading.load(GOLDEN / name, config)
        difference = largest_difference(
            model_logits(config, params, expected(name)["tokens"]), expected(name)["logits"]
        )
        record_property(f"largest_difference_leaves_{leaves}", difference)
        print(f"\n{name}, {leaves} leaves: logits differ by {difference:.1e}", end="")
        assert difference < TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_what_is_loaded_is_saved_again_by_bits(name, tmp_path):
    for leaves in leaves_of(name):
        config = loading.read_model_config(GOLDEN / name, reduction_leaves=leaves)
        loading.save(tmp_path / f"{leaves}", config, loading.load(GOLDEN / name, config))
        assert loading.read_model_config(tmp_path / f"{leaves}", reduction_leaves=leaves) == config
        with open_folder(GOLDEN / name) as theirs, open_folder(tmp_path / f"{leaves}") as ours:
            assert sorted(ours.names) == sorted(theirs.names)
            for tensor in theirs.names:
                assert (
                    ours.dtype(tensor) == theirs.dtype(tensor)
                    and ours.read(tensor).tobytes() == theirs.read(tensor).tobytes()
                )


def engine_cases():
    """All, with one leaf and two; those outside QUICK are long, since an engine compiles for seconds."""
    for name in CASES:
        for leaves in (n for n in leaves_of(name) if n <= 2):
            marks = () if (name, leaves) in QUICK else pytest.mark.long
            yield pytest.param(name, leaves, id=f"{name}-leaves-{leaves}", marks=marks)


@pytest.mark.parametrize("name, leaves", engine_cases())
def test_the_engine_gives_the_same_logprobs_and_greedy_tokens(name, leaves, record_property):
    golden = expected(name)
    llm = LLM(
        model=GOLDEN / name,
        dtype="float32",
        reduction_leaves=leaves,
        max_model_len=128,
        max_num_seqs=4,
        num_pages=32,
        max_num_batched_tokens=32,
        max_logprobs=ENGINE_LOGPROBS,
        compile_patience=1000,
        progress=False,
    )
    params = SamplingParams(temperature=0, max_tokens=golden["generated"].shape[1], prompt_logprobs=ENGINE_LOGPROBS)
    outputs = llm.generate([{"prompt_token_ids": row.tolist()} for row in golden["tokens"]], params)
    assert [output.outputs[0].token_ids for output in outputs] == golden["generated"].tolist()

    reference = np.asarray(jax.nn.log_softmax(golden["logits"]))
    worst = 0.0
    for row, (output, tokens) in enumerate(zip(outputs, golden["tokens"], strict=True)):
        assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(tokens)
        for position in range(1, len(tokens)):
            entry, logprobs = output.prompt_logprobs[position], reference[row, position - 1]
            given = int(tokens[position])
            assert given in entry and len(entry) >= ENGINE_LOGPROBS
            found = np.array([entry[token].logprob for token in entry])
            scale = np.abs(golden["logits"][row, position - 1]).max()
            worst = max(worst, float(np.abs(found - logprobs[list(entry)]).max() / scale))
            by_rank = np.sort(logprobs)[::-1][[entry[token].rank - 1 for token in entry]]
            assert (
                np.abs(by_rank - logprobs[list(entry)]).max() < TOLERANCE * scale
            )  # the rank is the token's own, or that of a near tie
    record_property("largest_difference", worst)
    print(f"\n{name}, {leaves} leaves: the engine's logprobs differ by {worst:.1e} of the largest logit", end="")
    assert worst < TOLERANCE
