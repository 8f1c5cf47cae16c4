"""Random configurations of each family against transformers itself, there and back.

Needs torch; run with -m reference, and with -s to see the differences.
"""

import copy
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from model_logits import largest_difference, model_logits

torch = pytest.importorskip("torch", reason="needs torch, which computes the reference")
import transformers  # noqa: E402
from make_golden import FAMILIES, build, logits  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from jaxengine.models import loading  # noqa: E402
from jaxengine.models.named_weights import to_decoder  # noqa: E402
from jaxengine.ops.rope import inverse_frequencies  # noqa: E402

pytestmark = pytest.mark.reference
TOLERANCE = 1e-4
SEEDS = range(12)  # three of each dense family, then three with experts
LAST = 120  # positions of a case at most: past the stretched ropes' original context, and past a key tile


def draw(seed: int) -> tuple[str, dict[str, Any], np.ndarray, int]:
    """(family, settings, tokens [B, T], reduction leaves), a function of the seed."""
    rng = np.random.default_rng(seed)
    pick = lambda *values: values[rng.integers(len(values))]
    family, kv, group = list(FAMILIES)[seed % 3 if seed < 9 else 3], pick(1, 2, 3, 4), pick(1, 2, 3, 5, 7)
    heads, vocab = kv * group, int(rng.integers(150, 400))
    settings = dict(
        num_key_value_heads=kv,
        num_attention_heads=heads,
        head_dim=pick(12, 20, 24, 32, 40, 64),
        num_hidden_layers=pick(2, 3),
        hidden_size=heads * -(-int(rng.integers(48, 81)) // heads),  # transformers' Llama wants a multiple of the heads
        intermediate_size=4 * int(rng.integers(10, 30)),
        vocab_size=vocab,
        max_position_embeddings=256,
        rms_norm_eps=pick(1e-6, 1e-5),
        tie_word_embeddings=bool(rng.integers(2)),
        rope_parameters=draw_rope(seed // 3, rng),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    if family == "qwen3moe":
        count = int(rng.integers(2, 9))
        settings |= dict(num_experts=count, num_experts_per_tok=int(rng.integers(1, count + 1)))
        inner, hidden = (
            8 * int(rng.integers(3, 8)),
            8 * int(rng.integers(6, 11)),
        )  # torch groups products of these alone
        settings |= dict(moe_intermediate_size=inner, hidden_size=hidden, norm_topk_prob=bool(rng.integers(2)))
    if family != "qwen2":
        settings["attention_bias"] = bool(rng.integers(2))
    tokens = rng.integers(0, vocab, (pick(1, 2, 3), int(rng.integers(70, LAST))))
    return family, settings, tokens, pick(*(n for n in (1, 2, 4) if kv % n == 0))


def draw_rope(index: int, rng: np.random.Generator) -> dict[str, Any]:
    theta = {"rope_theta": float(rng.choice([1e4, 5e5, 1e6]))}
    original = {"original_max_position_embeddings": int(rng.integers(24, 65)), "factor": float(rng.uniform(1.5, 8))}
    if index % 3 == 0:
        return theta | ({"rope_type": "linear", "factor": 2.5} if rng.integers(2) else {"rope_type": "default"})
    if index % 3 == 1:
        return (
            theta
            | original
            | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": float(rng.uniform(2, 6))}
        )
    yarn = (
        theta
        | original
        | {"rope_type": "yarn", "truncate": bool(rng.integers(2)), "beta_fast": float(rng.uniform(4, 32))}
    )
    more = ({}, {"attention_factor": float(rng.uniform(0.7, 1.3))}, {"mscale": 0.8, "mscale_all_dim": 1.1})
    return yarn | more[rng.integers(3)]


@pytest.fixture(scope="module", params=SEEDS, ids=lambda seed: f"{draw(seed)[0]}-seed-{seed}")
def case(request, tmp_path_factory) -> tuple[Any, Path, np.ndarray, int]:
    """(model of transformers, its folder, tokens, leaves)"""
    family, settings, tokens, leaves = draw(request.param)
    model, folder = build(family, settings, 1000 + request.param), tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder, tokens, leaves


def opened(folder: Path) -> Any:
    """The folder as transformers opens it, nothing missing and nothing left over."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    return model.eval()


def assert_equal_tensors(found: Any, expected: Any) -> None:
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_logits_of_every_position(case, record_property):
    model, folder, tokens, leaves = case
    config = loading.read_model_config(folder, reduction_leaves=leaves)
    difference = largest_difference(model_logits(config, loading.load(folder, config), tokens), logits(model, tokens))
    record_property("largest_difference", difference)
    print(
        f"\n{config.architecture}, {config.rope.kind}, group {config.group_size}, head width {config.head_dim}, "
        f"{leaves} leaves: logits differ by {difference:.1e}",
        end="",
    )
    assert difference < TOLERANCE


def test_rope_frequencies(case):
    model, folder, _, _ = case
    config, rope = loading.read_model_config(folder), model.model.rotary_emb
    np.testing.assert_allclose(inverse_frequencies(config.rope, config.head_dim), rope.inv_freq.numpy(), rtol=1e-6)
    assert config.rope.attention_factor == rope.attention_scaling


def test_transformers_opens_what_we_save_and_computes_the_same(case, tmp_path):
    model, folder, tokens, leaves = case
    config = loading.read_model_config(folder, reduction_leaves=leaves)
    loading.save(tmp_path, config, loading.load(folder, config))
    back = opened(tmp_path)
    assert_equal_tensors(back, model)
    assert largest_difference(logits(back, tokens), logits(model, tokens)) < 1e-6
    assert loading.read_model_config(tmp_path, reduction_leaves=leaves) == config


@pytest.mark.parametrize("case", SEEDS[3:6], indirect=True)
def test_bfloat16_keeps_its_bits_and_is_rounded_as_torch_rounds(case, tmp_path):
    model, folder, _, leaves = case
    config = loading.read_model_config(folder, reduction_leaves=leaves)
    loading.save(tmp_path / "rounded", config, loading.load(folder, config), dtype="bfloat16")
    rounded = opened(tmp_path / "rounded")
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    theirs = opened(tmp_path / "theirs")
    assert_equal_tensors(rounded, theirs)

    config = loading.read_model_config(tmp_path / "theirs", reduction_leaves=leaves)
    assert config.dtype == "bfloat16"
    loading.save(tmp_path / "ours", config, loading.load(tmp_path / "theirs", config))
    assert_equal_tensors(opened(tmp_path / "ours"), theirs)


# -- folders that say one thing and hold another, and weights as torch has them ---------------------------------------


def changed_config(folder: Path, **change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))


def both(folder: Path, **overrides: Any) -> tuple[np.ndarray, np.ndarray]:
    """Our logits and transformers' of the folder, both with the overrides, past the original context of any rope."""
    config = transformers.AutoConfig.from_pretrained(folder, **overrides)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    tokens = np.random.default_rng(7).integers(0, config.vocab_size, (2, LAST))
    model_config = loading.read_model_config(folder, dtype="float32", hf_overrides=overrides)
    return model_logits(model_config, loading.load(folder, model_config), tokens), logits(model, tokens)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40, "beta_fast": 8, "truncate": False},
        {
            "rope_type": "yarn",
            "factor": 3.0,
            "original_max_position_embeddings": 40,
            "mscale": 0.7,
            "mscale_all_dim": 1.2,
        },
        {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 40, "attention_factor": 0.8},
        {"rope_type": "linear", "factor": 3.5},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 40,
        },
    ],
    ids=lambda rope: "-".join(map(str, rope.values())),
)
@pytest.mark.parametrize("case", SEEDS[:1], indirect=True)
def test_an_override_stretches_the_rope_as_transformers_does(case, rope, tmp_path):
    model, *_ = case
    model.save_pretrained(tmp_path)
    theta = json.loads((tmp_path / "config.json").read_text())["rope_parameters"]["rope_theta"]
    plain, _ = both(tmp_path)
    found, expected = both(tmp_path, rope_parameters=rope | {"rope_theta": theta})
    assert largest_difference(found, expected) < TOLERANCE < largest_difference(found, plain)


@pytest.mark.parametrize("case", SEEDS[:3], indirect=True)
@pytest.mark.parametrize("head", ["another", "the embedding", "none"])
def test_a_tied_flag_beside_each_head(case, head, tmp_path):
    model, *_ = case
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    if head != "none":
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.flip(0).contiguous() if head == "another" else embedding.clone()
    model.config.save_pretrained(tmp_path)
    changed_config(tmp_path, tie_word_embeddings=True)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert loading.read_model_config(tmp_path).tie_word_embeddings == (head != "another")
    found, expected = both(tmp_path)
    assert largest_difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_torch_tensors_under_their_names(case, dtype):
    """A trainer's state_dict, a tied model's second name for its embedding included."""
    model, folder, _, leaves = case
    if dtype == torch.float16 and loading.read_model_config(folder).num_experts:
        pytest.skip("experts take bfloat16 and float32")
    config = loading.read_model_config(folder, reduction_leaves=leaves, dtype=str(dtype).removeprefix("torch."))
    tensors = copy.deepcopy(model).to(dtype).state_dict()
    expected = loading.load(folder, config)
    for given in (tensors, iter(list(tensors.items()))):
        found = to_decoder(given, config)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("case", SEEDS[:1], indirect=True)
def test_parameters_of_torch_are_taken_out_of_their_graph(case):
    model, folder, _, leaves = case
    config = loading.read_model_config(folder, reduction_leaves=leaves)
    for a, b in zip(
        jax.tree.leaves(to_decoder(model.named_parameters(), config)),
        jax.tree.leaves(loading.load(folder, config)),
        strict=True,
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("case", SEEDS[:1], indirect=True)
def test_a_tensor_that_torch_does_not_hand_out_is_named(case):
    model, folder, _, leaves = case
    config = loading.read_model_config(folder, reduction_leaves=leaves)
    nowhere = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    with pytest.raises(TypeError, match="'model.embed_tokens.weight' cannot be read as an array .Tensor.*"):
        to_decoder(nowhere, config)


@pytest.mark.parametrize("case", SEEDS[:3], indirect=True)
def test_transformers_takes_our_tensors_by_name(case):
    model, folder, _, leaves = case
    config = loading.read_model_config(folder, reduction_leaves=leaves)
    tensors = loading.named_tensors(config, loading.load(folder, config))
    back = copy.deepcopy(model)
    state = {name: torch.from_numpy(np.array(array)) for name, array in tensors}
    missing, unexpected = back.load_state_dict(state, strict=False)
    assert unexpected == [] and missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    assert_equal_tensors(back, model)
