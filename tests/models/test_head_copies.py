"""More leaves than key-value heads: several leaves hold a copy of each, and files, names and plans know it.

Equal bits on several devices are test_contract/test_degrees.py, training is rl/test_copied_heads.py.
"""

import dataclasses
import logging
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_llm, random_model

from checkpoints.safetensors_files import open_folder
from jaxengine import LLM, SamplingParams
from jaxengine.config import ModelConfig
from jaxengine.engine.settings import sharing_devices
from jaxengine.models import loading, plain
from jaxengine.models.named_weights import to_decoder
from jaxengine.models.params import Decoder
from sharding.mesh import make_mesh

HEADS: dict[str, Any] = dict(num_attention_heads=8, num_key_value_heads=2, head_dim=16)
SMALL: dict[str, Any] = HEADS | dict(num_hidden_layers=2, vocab_size=203, hidden_size=48, intermediate_size=64)
FAMILIES = ("Qwen2", "Qwen3")  # one has biases, the other has norms on heads


def held_once(family: str, dtype: str = "float32", seed: int = 0) -> tuple[ModelConfig, Decoder]:
    config, params = random_model(family, reduction_leaves=2, dtype=dtype, **SMALL)
    return config, jax.tree.map(lambda x: x * (1 + seed), params)


def with_eight_leaves(config: ModelConfig, params: Decoder) -> tuple[ModelConfig, Decoder]:
    """The same model, each head held four times."""
    wide = config.with_leaves(8)
    return wide, to_decoder(dict(loading.named_tensors(config, params)), wide)


def same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_leaf_has_the_heads_that_its_queries_attend_to(family):
    config, params = held_once(family)
    tensors = dict(loading.named_tensors(config, params))
    attention = with_eight_leaves(config, params)[1].layers[1].attention
    for kind, packed in (("weight", attention.qkv), ("bias", attention.qkv_bias)):
        if packed is None:
            continue
        q, k, v = (tensors[f"model.layers.1.self_attn.{p}_proj.{kind}"] for p in "qkv")
        for leaf in range(8):
            query, head = slice(16 * leaf, 16 * leaf + 16), slice(16 * (leaf // 4), 16 * (leaf // 4) + 16)
            assert same([packed[leaf]], [np.concatenate([q[query], k[head], v[head]])])


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_model_without_copies(family):
    """Sums have another order, so logprobs are near; in float32 no rounding decides a token of these."""
    one, eight = held_once(family), with_eight_leaves(*held_once(family))
    prompt, params = [5, 6, 7] * 9, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    expected, found = (make_llm(*model).generate([prompt], params)[0].outputs[0] for model in (one, eight))
    assert found.token_ids == expected.token_ids
    np.testing.assert_allclose(found.token_logprobs, expected.token_logprobs, atol=1e-4)
    tokens = jnp.asarray([*prompt, *found.token_ids])
    by_plain = jax.nn.log_softmax(plain.logits(*eight, tokens))[len(prompt) - 1 : -1]
    drawn = np.take_along_axis(np.asarray(by_plain), np.asarray(found.token_ids)[:, None], axis=1)[:, 0]
    np.testing.assert_allclose(found.token_logprobs, drawn, atol=1e-4)
    np.testing.assert_allclose(plain.logits(*eight, tokens), plain.logits(*one, tokens), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_takes_each_head_once_and_saves_it_once(dtype, tmp_path):
    config, params = held_once("Qwen2", dtype)
    llm = make_llm(*with_eight_leaves(config, params))
    other = held_once("Qwen2", dtype, seed=1)
    named = dict(loading.named_tensors(*other))
    llm.update_params(named)
    assert same(llm.params, with_eight_leaves(*other)[1])
    llm.save(tmp_path / "names")
    with open_folder(tmp_path / "names") as files:
        assert set(files.names) == set(named) and all(same([files.read(name)], [named[name]]) for name in named)
    assert loading.read_model_config(tmp_path / "names") == config
    llm.update_params(with_eight_leaves(config, params)[1])
    llm.save(tmp_path / "tree")
    assert same(loading.load(tmp_path / "tree", config), params)


def test_copies_that_differ_are_not_saved(tmp_path):
    config, params = with_eight_leaves(*held_once("Qwen2"))
    attention = params.layers[1].attention
    assert attention.qkv_bias is not None
    for field, packed in (("qkv", attention.qkv), ("qkv_bias", attention.qkv_bias)):
        other = dataclasses.replace(attention, **{field: packed.at[3, 20].add(1.0)})  # a key of the first head
        layers = params.layers[0], dataclasses.replace(params.layers[1], attention=other)
        with pytest.raises(
            ValueError, match=rf"layers.1.attention.{field}: the 4 copies .* differ .*leaves=8.*heads=2"
        ):
            loading.save(tmp_path / field, config, dataclasses.replace(params, layers=layers))


def test_pages_and_plans_count_the_copies():
    one, eight = (make_llm(*model) for model in (held_once("Qwen2"), with_eight_leaves(*held_once("Qwen2"))))
    plan, cache = eight.memory_plan(), eight.engine.cache
    assert plan.cache == sum(x.nbytes for x in jax.tree.leaves(cache))
    assert plan.weights == sum(x.nbytes for x in jax.tree.leaves(eight.params))
    assert plan.page_bytes == 4 * one.memory_plan().page_bytes
    added = 4 * 3 * 2 * 2 * 16  # float32, three more copies of two heads' keys and values of width 16
    vocabulary = 4 * 48 * (eight.config.padded_vocab_size - one.config.padded_vocab_size) * 2
    assert plan.weights - one.memory_plan().weights == 2 * added * (48 + 1) + vocabulary  # two layers, with biases


# -- how many leaves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            dict(num_attention_heads=24, num_key_value_heads=3),
            "num_key_value_heads=3, .* num_attention_heads=24; .* 1$",
        ),
        (dict(num_attention_heads=14), "num_key_value_heads=2, .* num_attention_heads=14; this model can have 1, 2$"),
        (dict(intermediate_size=60), "does not divide intermediate_size=60; this model can have 1, 2, 4$"),
    ],
)
def test_leaves_that_the_heads_do_not_allow_are_refused(sizes, message):
    config, _ = held_once("Qwen3")
    with pytest.raises(ValueError, match=f"^reduction_leaves=8 .*{message}"):
        dataclasses.replace(config, reduction_leaves=8, **{"intermediate_size": 64} | sizes)


def test_devices_that_share_a_model_give_it_leaves(tmp_path, caplog):
    loading.save(tmp_path, *held_once("Qwen3"))
    read = lambda **how: loading.read_model_config(tmp_path, **how).reduction_leaves
    with caplog.at_level(logging.WARNING, "jaxengine"):
        assert [read(), read(devices=2), read(devices=8, reduction_leaves=4)] == [2, 2, 4] and not caplog.records
        assert read(devices=8) == 8
    assert "8 devices share the model, so it has reduction_leaves=8" in caplog.text
    with pytest.raises(
        ValueError, match="^16 devices cannot share the model, .*=16 .* this model can have 1, 2, 4, 8$"
    ):
        read(devices=16)


def test_an_llm_counts_the_devices_that_it_is_given(tmp_path):
    loading.save(tmp_path, *held_once("Qwen3"))
    assert [sharing_devices(given) for given in ({}, {"mesh": make_mesh()}, {"tensor_parallel_size": 1})] == [1, 1, 1]
    with mock.patch("jaxengine.llm.sharing_devices", return_value=8) as counted:
        llm = LLM(tmp_path, max_model_len=64, max_num_seqs=4, num_pages=20, progress=False, tensor_parallel_size=1)
    assert counted.call_args.args[0]["tensor_parallel_size"] == 1 and llm.config.reduction_leaves == 8
