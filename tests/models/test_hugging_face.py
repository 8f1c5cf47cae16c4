"""config.json and tensor names of Hugging Face: what is read, what is refused, and that a model comes back from a
folder by bits.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import FAMILIES, random_model

from checkpoints.safetensors_files import open_folder, save_folder
from jaxengine.config import RopeConfig
from jaxengine.models import loading, registry
from jaxengine.ops.rope import inverse_frequencies

HF = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
ROPES = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
}


def write_configs(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


# -- refused -----------------------------------------------------------------------------------------------------------


SUPPORTED = r"\(supported: LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM\)"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architectures": ["MambaForCausalLM2"]}, f"'MambaForCausalLM2' is not supported {SUPPORTED}"),
        ({"architectures": ["LLamaForCausalLM"]}, f"{SUPPORTED}, did you mean 'LlamaForCausalLM'"),
        (
            {"architectures": []},
            "names no architecture; supported: LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeFor",
        ),
        ({"architectures": None}, "names no architecture"),
        ({"architectures": "LlamaForCausalLM"}, "names no architecture"),
        ({"architectures": [7]}, "names no architecture"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            r"rope type 'dynamic' is not supported \(supported: default, linear, llama3, yarn\)$",
        ),
        ({"rope_parameters": {"rope_type": "llama_3"}}, "did you mean 'llama3'"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}},
            "rope type 'longrope' is not supported",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            r"a rope of its own \(full_attention, sliding_attention\)",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": ROPES["yarn"]},
            "has rope_parameters=.* and rope_scaling=.*: keep one",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary_factor other than 1"),
        (
            {"use_sliding_window": True, "sliding_window": 128},
            "use_sliding_window=True: this decoder computes use_sliding_window=False only",
        ),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types with sliding_attention: this decoder computes full_att",
        ),
        ({"mlp_bias": True}, "mlp_bias=True: this decoder computes mlp_bias=False only"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': this decoder computes hidden_act='silu' only"),
        ({"dtype": "float64"}, "dtype must be one of float32, float16, bfloat16, got 'float64'"),
        ({"torch_dtype": "int8"}, "dtype must be one of float32, float16, bfloat16, got 'int8'"),
        ({"head_dim": 21}, "head_dim must be even for rotary embeddings, got 21"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
    ],
)
def test_what_this_decoder_does_not_compute_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        registry.configure(HF | change)


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ],
)
def test_a_missing_size_is_named(name):
    with pytest.raises(ValueError, match=f"lacks {name}"):
        registry.configure({key: value for key, value in HF.items() if key != name})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": "192"}, "hidden_size must be an integer, got '192'"),
        ({"hidden_size": None}, "hidden_size must be an integer, got None"),
        ({"num_attention_heads": 8.0}, "num_attention_heads must be an integer, got 8.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be an integer, got True"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"max_position_embeddings": "512"}, "max_position_embeddings must be an integer, got '512'"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads must be an integer, got '2'"),
        ({"head_dim": -20}, "head_dim must be at least 1, got -20"),
        ({"hidden_size": 3, "head_dim": None}, "head_dim must be at least 1, got 0"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be a finite number, got None"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a finite number, got '1e-6'"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be True or False, got 'false'"),
        ({"attention_bias": 1}, "attention_bias must be True or False, got 1"),
        ({"eos_token_id": "ab"}, "eos_token_id must be an integer, got 'ab'"),
        ({"eos_token_id": [2, None]}, "eos_token_id must be an integer, got None"),
        ({"eos_token_id": -1}, "eos_token_id must be at least 0, got -1"),
        ({"bos_token_id": [1]}, r"bos_token_id must be an integer, got \[1\]"),
        ({"dtype": ["float32"]}, r"dtype must be one of float32, float16, bfloat16, got \['float32'\]"),
        ({"layer_types": 5}, "layer_types must be a list of names, got 5"),
        ({"layer_types": [["full_attention"]]}, "this decoder computes full_attention only"),
        ({"rope_parameters": "x"}, "rope_parameters must be an object or null, got 'x'"),
        ({"rope_scaling": [1]}, r"rope_scaling must be an object or null, got \[1\]"),
        ({"rope_parameters": {"rope_type": 5}}, "rope type 5 is not supported"),
        ({"rope_theta": "1e6"}, "rope_theta must be a finite number, got '1e6'"),
        ({"rope_theta": 0}, "rope_theta must be greater than 0.0, got 0.0"),
        ({"rope_scaling": ROPES["llama3"] | {"factor": "8"}}, "factor must be a finite number, got '8'"),
        ({"rope_scaling": ROPES["yarn"] | {"mscale": "1"}}, "mscale must be a finite number, got '1'"),
        ({"rope_scaling": ROPES["yarn"] | {"truncate": "no"}}, "truncate must be True or False, got 'no'"),
        (
            {"rope_scaling": ROPES["yarn"] | {"original_max_position_embeddings": 128.5}},
            "original_max_position_embeddings must be an integer",
        ),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_file(tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"{tmp_path}/config\.json: .*{message}"):
        loading.read_model_config(write_configs(tmp_path, HF | change))


@pytest.mark.parametrize("eos, got", [("ab", "'ab'"), ([2, 2.5], "2.5"), (True, "True"), ({"id": 2}, "{'id': 2}")])
def test_a_wrong_end_token_of_the_generation_config_is_named_with_its_file(tmp_path, eos, got):
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/generation_config\.json: eos_token_id must be an integer, got {got}"
    ):
        loading.read_model_config(write_configs(tmp_path, HF, {"eos_token_id": eos}))


def test_null_is_what_is_left_out_and_integers_are_numbers():
    nulls = dict.fromkeys(
        (
            "head_dim",
            "num_key_value_heads",
            "tie_word_embeddings",
            "attention_bias",
            "eos_token_id",
            "bos_token_id",
            "rope_scaling",
            "rope_parameters",
            "layer_types",
            "dtype",
            "torch_dtype",
            "original_max_position_embeddings",
        )
    )
    assert registry.configure(HF | nulls) == registry.configure(
        {key: value for key, value in HF.items() if key not in nulls}
    )
    assert registry.configure(HF | {"rope_theta": 500_000, "rms_norm_eps": 0}).rope == RopeConfig(5e5)


@pytest.mark.parametrize(
    "dtype, name",
    [
        ("auto", "float32"),
        ("half", "float16"),
        ("float", "float32"),
        ("bfloat16", "bfloat16"),
        (jnp.bfloat16, "bfloat16"),
        (np.float16, "float16"),
        (np.dtype("float32"), "float32"),
    ],
    ids=str,
)
def test_dtypes_by_their_names_vllms_names_and_as_objects(tmp_path, dtype, name):
    assert loading.read_model_config(write_configs(tmp_path, HF), dtype=dtype).dtype == name


@pytest.mark.parametrize(
    "dtype", ["float8", "int8", "", None, 5, float, np.float64, np.dtype("float64"), ["float32"], {}], ids=repr
)
def test_other_dtypes_are_refused(tmp_path, dtype):
    with pytest.raises(
        ValueError, match=rf"dtype must be 'auto' or one of float32, float16, bfloat16, got {re.escape(repr(dtype))}"
    ):
        loading.read_model_config(write_configs(tmp_path, HF), dtype=dtype)


def test_the_callers_leaves_are_checked(tmp_path):
    folder = write_configs(tmp_path, HF)
    with pytest.raises(ValueError, match="reduction_leaves must be an integer, got '2'"):
        loading.read_model_config(folder, reduction_leaves="2")
    with pytest.raises(ValueError, match="reduction_leaves=8 does not divide num_key_value_heads=2"):
        loading.read_model_config(folder, reduction_leaves=8)
    with pytest.raises(ValueError, match="reduction_leaves must be a power of two, got 3"):
        loading.read_model_config(
            write_configs(tmp_path, HF | {"num_attention_heads": 6, "num_key_value_heads": 3}), reduction_leaves=3
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_another_configuration_are_refused(family, tmp_path):
    """Before a weight is read, every difference by its Hugging Face name."""
    config, params = random_model(family, num_hidden_layers=2, hidden_size=48, intermediate_size=64)
    loading.save(tmp_path, config, params)
    hf = json.loads((tmp_path / "config.json").read_text())
    deeper = loading.read_model_config(write_configs(tmp_path, hf | {"num_hidden_layers": 3}))
    with pytest.raises(
        ValueError, match=r"fit the model, \d+ differences:\n  missing 'model.layers.2.input_layernorm.weight' \(48,\)"
    ):
        loading.load(tmp_path, deeper)
    shallower = loading.read_model_config(write_configs(tmp_path, hf | {"num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"unexpected 'model.layers.1"):
        loading.load(tmp_path, shallower)
    wider = loading.read_model_config(write_configs(tmp_path, hf | {"vocab_size": 1001}))
    with pytest.raises(
        ValueError, match=r"shape of 'model.embed_tokens.weight': given \(1000, 48\), the model needs \(1001, 48\)"
    ):
        loading.load(tmp_path, wider)


# -- read --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", registry.FAMILIES)
@pytest.mark.parametrize("rope", ROPES)
def test_old_and_new_config_json_mean_the_same(architecture, rope):
    hf = HF | EXPERTS | {"architectures": [architecture]}
    if architecture != "Qwen3MoeForCausalLM":
        with pytest.raises(ValueError, match="num_experts=6: of this architecture no experts are computed"):
            registry.configure(hf)
        hf = HF | {"architectures": [architecture]}
    new = hf | {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"} | ROPES[rope]}
    old_scaling = {("type" if key == "rope_type" else key): value for key, value in ROPES[rope].items()}
    old = hf | {"torch_dtype": "bfloat16", "rope_theta": 5e5, "rope_scaling": old_scaling or None}
    assert registry.configure(old) == registry.configure(new)
    assert registry.configure(new).rope.kind == rope and registry.configure(new).rope.theta == 5e5
    assert registry.configure(new).dtype == "bfloat16"
    both = new | {"rope_scaling": new["rope_parameters"]}
    assert registry.configure(both) == registry.configure(new)


def test_experts_are_read_under_both_names_and_every_layer_has_some():
    hf = HF | EXPERTS | {"architectures": ["Qwen3MoeForCausalLM"]}
    config = registry.configure(hf)
    assert (config.num_experts, config.num_experts_per_tok, config.inner_size) == (6, 2, 40)
    assert config.norm_topk_prob is False and config.qk_norm
    others = {key: value for key, value in hf.items() if key != "num_experts"}
    assert registry.configure(others | {"num_local_experts": 6, "norm_topk_prob": True}).norm_topk_prob is True
    for change, message in (
        ({"num_experts": None}, "lacks num_experts$"),
        (
            {"decoder_sparse_step": 2},
            r"decoder_sparse_step=2 and mlp_only_layers=\[\]: this decoder computes experts in",
        ),
        ({"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]: this decoder computes experts in every layer only"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7 is more than num_experts=6"),
        ({"dtype": "float16"}, "experts takes dtype bfloat16 or float32, got float16"),
    ):
        with pytest.raises(ValueError, match=message):
            registry.configure(hf | change)
    with pytest.raises(ValueError, match="reduction_leaves=16 .*num_key_value_heads=2"):
        config.with_leaves(16)
    assert config.with_leaves().reduction_leaves == 2 and config.share(1) == config


def test_what_the_families_differ_in():
    configured = lambda name, **change: registry.configure(HF | {"architectures": [f"{name}ForCausalLM"]} | change)
    features = lambda config: (config.qk_norm, config.qkv_bias, config.out_bias)
    assert features(configured("Qwen3")) == (True, False, False)
    assert features(configured("Qwen3", attention_bias=True)) == (True, True, True)
    assert features(configured("Qwen2")) == features(configured("Qwen2", attention_bias=False)) == (False, True, False)
    assert features(configured("Llama")) == (False, False, False)
    assert features(configured("Llama", attention_bias=True)) == (False, True, True)


def test_what_a_config_json_leaves_out_is_as_in_transformers():
    short = {
        key: HF[key]
        for key in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        )
    }
    llama = registry.configure(short | {"architectures": ["LlamaForCausalLM"]})
    assert (llama.num_key_value_heads, llama.head_dim, llama.rms_norm_eps, llama.rope) == (4, 12, 1e-6, RopeConfig())
    assert (llama.tie_word_embeddings, llama.eos_token_ids, llama.bos_token_id, llama.dtype) == (
        False,
        (),
        None,
        "float32",
    )
    assert registry.configure(short | {"architectures": ["LlamaForCausalLM"], "head_dim": None}).head_dim == 12
    assert registry.configure(short | {"architectures": ["Qwen3ForCausalLM"]}).head_dim == 128


def test_the_original_context_of_a_stretched_rope():
    read = lambda **change: registry.configure(HF | change).rope
    without = {key: value for key, value in ROPES["yarn"].items() if key != "original_max_position_embeddings"}
    assert read(rope_parameters=ROPES["yarn"]).original_max_position_embeddings == 128
    assert read(rope_parameters=without).original_max_position_embeddings == 512  # max_position_embeddings
    assert read(rope_parameters=without, original_max_position_embeddings=64).original_max_position_embeddings == 64
    assert read(rope_parameters=ROPES["yarn"] | {"factor": None}).factor == 512 / 128
    assert read(rope_parameters={"rope_theta": 1e4, "factor": 9.0}).factor == 1.0  # no stretch without a kind


# -- rope --------------------------------------------------------------------------------------------------------------


def plain_frequencies(theta: float, width: int) -> np.ndarray:
    return np.array([theta ** (-2 * i / width) for i in range(width // 2)])


def llama3_frequencies(theta, width, factor, original, low, high) -> np.ndarray:
    """By wavelength, as Meta's reference code branches."""
    out = []
    for frequency in plain_frequencies(theta, width):
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            out.append(frequency)
        elif wavelength > original / low:
            out.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append((1 - smooth) * frequency / factor + smooth * frequency)
    return np.array(out)


def yarn_frequencies(theta, width, factor, original, fast=32.0, slow=1.0, truncate=True) -> np.ndarray:
    """The paper's ramp over the dimensions that turn `fast` to `slow` times within the original context."""
    dimension = lambda turns: width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
    low, high = dimension(fast), dimension(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    interpolated = np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
    plain = plain_frequencies(theta, width)
    return plain * (1 - interpolated) + plain / factor * interpolated


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("width", [20, 32, 40, 64, 128])
def test_inverse_frequencies_of_each_kind(theta, width):
    def same(rope: RopeConfig, expected: np.ndarray) -> None:
        found = inverse_frequencies(rope, width)
        assert found.dtype == np.float32 and found.shape == (width // 2,)
        np.testing.assert_allclose(found, expected, rtol=5e-7)

    same(RopeConfig(theta), plain_frequencies(theta, width))
    same(RopeConfig(theta, "linear", 4.0), plain_frequencies(theta, width) / 4)
    for original in (64, 8192):
        same(RopeConfig(theta, "llama3", 8.0, original), llama3_frequencies(theta, width, 8.0, original, 1.0, 4.0))
        same(
            RopeConfig(theta, "llama3", 32.0, original, low_freq_factor=1.5, high_freq_factor=9.0),
            llama3_frequencies(theta, width, 32.0, original, 1.5, 9.0),
        )
        same(RopeConfig(theta, "yarn", 4.0, original), yarn_frequencies(theta, width, 4.0, original))
        same(
            RopeConfig(theta, "yarn", 2.5, original, beta_fast=8.0, beta_slow=0.5, truncate=False),
            yarn_frequencies(theta, width, 2.5, original, 8.0, 0.5, False),
        )


def test_yarn_where_its_range_is_empty_or_turned_round():
    """transformers then divides by 0.001, or by a number below 0: nothing before `low` is stretched, or all is."""
    same = lambda rope, expected: np.testing.assert_allclose(inverse_frequencies(rope, 20), expected, rtol=5e-7)
    same(RopeConfig(1.5, "yarn", 4.0, 8192), plain_frequencies(1.5, 20) / 4)  # low 91, high 19
    same(
        RopeConfig(1e4, "yarn", 4.0, 6), plain_frequencies(1e4, 20) / np.where(np.arange(10) > 0, 4, 1)
    )  # low 0, high 0


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 0.75}, 0.75),
        ({"factor": 0.5}, 1.0),
        ({"mscale": 0.7}, 0.1 * math.log(4) + 1),
        ({"mscale": 0.7, "mscale_all_dim": 1.3}, (0.07 * math.log(4) + 1) / (0.13 * math.log(4) + 1)),
        ({"mscale": 0.7, "mscale_all_dim": 1.3, "attention_factor": 1.1}, 1.1),
    ],
)
def test_the_attention_factor_of_yarn(change, expected):
    assert registry.configure(HF | {"rope_parameters": ROPES["yarn"] | change}).rope.attention_factor == pytest.approx(
        expected, rel=1e-15
    )


def test_only_yarn_has_an_attention_factor():
    for kind in ("default", "linear", "llama3"):
        assert (
            registry.configure(HF | {"rope_parameters": ROPES[kind] | {"attention_factor": 2.0}}).rope.attention_factor
            == 1.0
        )


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leaves", [1, 4, 8])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family, dtype", [("Qwen3", "bfloat16"), ("Qwen2", "float32"), ("Llama", "float16")])
def test_a_saved_model_comes_back_by_bits(family, dtype, tied, leaves, tmp_path):
    config, params = random_model(
        family,
        dtype=dtype,
        tie_word_embeddings=tied,
        reduction_leaves=leaves,
        num_hidden_layers=2,
        vocab_size=203,
        hidden_size=48,
        intermediate_size=64,
        eos_token_ids=(5, 7),
        bos_token_id=3,
    )
    loading.save(tmp_path, config, params)
    assert loading.read_model_config(tmp_path, reduction_leaves=leaves) == config
    back = loading.load(tmp_path, config)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for (path, found), expected in zip(jax.tree_util.tree_leaves_with_path(back), jax.tree.leaves(params), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), path
        assert np.asarray(found).tobytes() == np.asarray(expected).tobytes(), path
    with open_folder(tmp_path) as files:
        assert ("lm_head.weight" in files.names) is not tied


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_does_not_show_how_many_leaves_wrote_it(family, tmp_path):
    config, params = random_model(family, num_hidden_layers=1, hidden_size=48)
    loading.save(tmp_path / "1", config, params)
    for leaves in (2, 4, 8):
        cut = loading.read_model_config(tmp_path / "1", reduction_leaves=leaves)
        loading.save(tmp_path / f"{leaves}", cut, loading.load(tmp_path / "1", cut))
        for name in ("config.json", "model.safetensors"):
            assert (tmp_path / f"{leaves}" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


def test_biases_of_all_four_projections_come_back(tmp_path):
    config, params = random_model(
        "Qwen3", qkv_bias=True, out_bias=True, num_hidden_layers=1, hidden_size=48, reduction_leaves=2
    )
    loading.save(tmp_path, config, params)
    assert loading.read_model_config(tmp_path, reduction_leaves=2) == config
    with open_folder(tmp_path) as files:
        query = files.read("model.layers.0.self_attn.q_proj.bias")
        assert np.array_equal(
            query[: query.size // 2], np.asarray(params.layers[0].attention.qkv_bias)[0, : query.size // 2]
        )
        assert np.array_equal(
            files.read("model.layers.0.self_attn.o_proj.bias"), np.asarray(params.layers[0].attention.out_bias)
        )
    for found, expected in zip(jax.tree.leaves(loading.load(tmp_path, config)), jax.tree.leaves(params), strict=True):
        assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_a_float32_model_is_rounded_to_bfloat16_on_the_way_out_and_in(tmp_path):
    config, params = random_model("Llama", num_hidden_layers=1, hidden_size=48)
    loading.save(tmp_path / "float32", config, params)
    loading.save(tmp_path / "bfloat16", config, params, dtype="bfloat16")
    with open_folder(tmp_path / "float32") as wide, open_folder(tmp_path / "bfloat16") as narrow:
        for name in wide.names:
            assert narrow.read(name).tobytes() == wide.read(name).astype(ml_dtypes.bfloat16).tobytes()
    out, on_the_way_in = (
        loading.load(tmp_path / name, loading.read_model_config(tmp_path / name, dtype="bfloat16"))
        for name in ("bfloat16", "float32")
    )
    assert loading.read_model_config(tmp_path / "bfloat16").dtype == "bfloat16"
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(on_the_way_in), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(5e5, "linear", 2.5),
        RopeConfig(1e6, "llama3", 8.0, 64, low_freq_factor=1.5, high_freq_factor=5.0),
        RopeConfig(1e4, "yarn", 3.5, 48, beta_fast=16.0, beta_slow=2.0, attention_factor=0.9, truncate=False),
    ],
)
def test_every_rope_comes_back(rope, tmp_path):
    config, params = random_model("Llama", num_hidden_layers=1, hidden_size=48, rope=rope)
    loading.save(tmp_path, config, params)
    assert loading.read_model_config(tmp_path) == config.with_leaves()


def test_keys_that_may_stand_unused(tmp_path):
    """A tied model's head that is its embedding, and the frequencies that old files carry."""
    config, params = random_model("Qwen3", num_hidden_layers=1, hidden_size=48)
    loading.save(tmp_path / "plain", config, params)
    with open_folder(tmp_path / "plain") as files:
        tensors = {name: np.array(files.read(name)) for name in files.names}
    more = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(16, np.float32),
    }
    save_folder(tmp_path / "more", (tensors | more).items())
    for found, expected in zip(
        jax.tree.leaves(loading.load(tmp_path / "more", config)), jax.tree.leaves(params), strict=True
    ):
        assert np.array_equal(np.asarray(found), np.asarray(expected))
    untied, _ = random_model("Qwen3", num_hidden_layers=1, hidden_size=48, tie_word_embeddings=False)
    with pytest.raises(ValueError, match="missing 'lm_head.weight'"):
        loading.load(tmp_path / "plain", untied)
