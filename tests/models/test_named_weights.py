"""Weights under Hugging Face names, as a folder, a dict or pairs: into parameters, a running engine, and out again."""

import json
import logging
import random
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import ENGINE, FAMILIES, bits, make_llm, random_model

from checkpoints.model_folder import find_folder
from jaxengine import LLM, SamplingParams
from jaxengine.models import loading
from jaxengine.models.hugging_face import EMBEDDING, HEAD
from jaxengine.models.named_weights import to_decoder
from jaxengine.models.params import initialise

SMALL: dict[str, Any] = dict(num_hidden_layers=2, vocab_size=203, hidden_size=48, intermediate_size=64)
NORM = "model.layers.1.input_layernorm.weight"
PROMPTS, PARAMS = [[5, 6, 7], [8, 9]], SamplingParams(max_tokens=6)


class ArrayLike:
    """Speaks `__array__` and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.array


class Capsule:
    """Speaks DLPack and nothing else."""

    def __init__(self, array: jax.Array) -> None:
        self.array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()


class Parameter(Capsule):
    """As PyTorch's: no array until it is detached."""

    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("Can't export tensors that require gradient, use tensor.detach()")

    def detach(self) -> Capsule:
        return Capsule(self.array)


FORMS = {
    "folder": lambda pairs, folder: folder,
    "path": lambda pairs, folder: str(folder),
    "dict": lambda pairs, folder: dict(pairs),
    "list": lambda pairs, folder: pairs,
    "shuffled": lambda pairs, folder: random.Random(0).sample(pairs, len(pairs)),
    "generator": lambda pairs, folder: ((name, array) for name, array in reversed(pairs)),
    "lists": lambda pairs, folder: iter([list(pair) for pair in pairs]),
    "jax": lambda pairs, folder: {name: jnp.asarray(array) for name, array in pairs},
    "__array__": lambda pairs, folder: [(name, ArrayLike(array)) for name, array in pairs],
    "dlpack": lambda pairs, folder: [(name, Capsule(jnp.asarray(array))) for name, array in pairs],
    "parameters": lambda pairs, folder: iter([(name, Parameter(jnp.asarray(array))) for name, array in pairs]),
    "not contiguous": lambda pairs, folder: [(name, np.asarray(array, order="F")) for name, array in pairs],
}


def assert_same_bits(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "family, leaves, dtype", [("Qwen3", 2, "bfloat16"), ("Qwen2", 8, "float32"), ("Llama", 1, "float16")]
)
def test_every_form_gives_the_parameters_by_bits(tmp_path, form, family, leaves, dtype):
    config, params = random_model(family, reduction_leaves=leaves, dtype=dtype, **SMALL)
    loading.save(tmp_path, config, params)
    pairs = list(loading.named_tensors(config, params))
    assert_same_bits(to_decoder(FORMS[form](pairs, tmp_path), config), params)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_arrays_are_copied(family):
    config, params = random_model(family, **SMALL)
    tensors = {name: np.array(array) for name, array in loading.named_tensors(config, params)}
    found = to_decoder(tensors, config)
    for array in tensors.values():
        array[:] = 7
    assert_same_bits(found, params)


def test_pairs_are_read_once_and_few_are_held():
    config, params = random_model("Llama", **SMALL)
    alive: set[int] = set()
    most = 0

    def fresh():
        nonlocal most
        for number, (name, array) in enumerate(loading.named_tensors(config, params)):
            own = np.array(array)
            alive.add(number)
            weakref.finalize(own, alive.remove, number)
            most = max(most, len(alive))
            yield name, own
            del own

    assert_same_bits(to_decoder(fresh(), config), params)
    assert most <= 4 and not alive  # three matrices make a leaf, and the next one is under way


def test_what_has_no_form_is_given_back():
    config, params = random_model(**SMALL)
    for given in (params, None, np.zeros(3), jax.tree.map(np.asarray, params)):
        assert to_decoder(given, config) is given


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[Any, dict[str, np.ndarray]]:
    """A tied float32 model, its tensors by name."""
    config, params = random_model("Qwen3", **SMALL)
    return config, dict(loading.named_tensors(config, params))


def without(tensors: dict[str, np.ndarray], *names: str) -> dict[str, np.ndarray]:
    return {name: array for name, array in tensors.items() if name not in names}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: without(t, NORM), rf"1 differences:\n  missing '{NORM}' \(48,\)"),
        (lambda t: t | {"extra": t[NORM]}, r"unexpected 'extra' \(48,\)"),
        (lambda t: t | {NORM: t[NORM][1:]}, rf"shape of '{NORM}': given \(47,\), the model needs \(48,\)"),
        (lambda t: t | {EMBEDDING: t[EMBEDDING].T}, r"given \(48, 203\), the model needs \(203, 48\)"),
        (lambda t: [*t.items(), (NORM, t[NORM])], f"'{NORM}' is given twice"),
        (lambda t: {f"module.{name}": array for name, array in t.items()}, "The names begin with 'module.'"),
        (
            lambda t: t | {NORM: t[NORM].astype(ml_dtypes.bfloat16)},
            f"'{NORM}' has dtype bfloat16, .*float32: cast=True",
        ),
        (lambda t: t | {HEAD: t[EMBEDDING] * 2}, "'lm_head.weight' differs .*tie_word_embeddings"),
        (lambda t: [(HEAD, t[EMBEDDING] * 2), *t.items()], "'lm_head.weight' differs .*tie_word_embeddings"),
        (lambda t: {}, "24 differences(.|\n)*and 14 more"),
        (lambda t: {"embed": t[EMBEDDING]}, "missing 'model.embed_tokens.weight'"),
    ],
)
def test_what_does_not_fit_is_named(small, change, message):
    config, tensors = small
    with pytest.raises(ValueError, match=message):
        to_decoder(change(tensors), config)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: list(t), "pairs of a name and an array, number 0 is str"),
        (lambda t: [(NORM, t[NORM]), (7, t[NORM])], "number 1 is tuple"),
        (lambda t: {7: t[NORM]}, "number 0 is tuple"),
        (lambda t: t | {NORM: object()}, f"'{NORM}' cannot be read as an array .object."),
        (lambda t: t | {NORM: None}, f"'{NORM}' cannot be read as an array .NoneType."),
    ],
)
def test_what_is_no_array_is_a_type_error(small, change, message):
    config, tensors = small
    with pytest.raises(TypeError, match=message):
        to_decoder(change(tensors), config)


def test_an_untied_model_wants_its_head(small):
    config, params = random_model("Qwen3", tie_word_embeddings=False, **SMALL)
    with pytest.raises(ValueError, match="missing 'lm_head.weight'"):
        to_decoder(small[1], config)
    head = small[1] | {HEAD: small[1][EMBEDDING]}
    assert np.array_equal(to_decoder(head, config).head, to_decoder(head, config).embed)
    assert to_decoder(head, small[0]).head is None


def test_cast_rounds_and_widens_and_takes_no_integers(small):
    config, tensors = small
    narrow = to_decoder({name: array.astype(np.float16) for name, array in tensors.items()}, config, cast=True)
    assert np.array_equal(narrow.norm, tensors["model.norm.weight"].astype(np.float16).astype(np.float32))
    tied = {name: array.astype(np.float64) / 3 for name, array in tensors.items()}
    assert to_decoder(tied | {HEAD: tied[EMBEDDING]}, config, cast=True).head is None  # rounded alike
    double = {name: array.astype(np.float64) for name, array in tensors.items()}
    assert_same_bits(to_decoder(double, config, cast=True), to_decoder(tensors, config))
    with pytest.raises(ValueError, match=f"'{NORM}' has dtype int32.*only floating dtypes are cast"):
        to_decoder(tensors | {NORM: tensors[NORM].astype(np.int32)}, config, cast=True)


def test_a_folder_that_computes_something_else_is_said(tmp_path, caplog):
    config, params = random_model("Llama", **SMALL)
    loading.save(tmp_path, config, params)
    hf = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hf | {"rms_norm_eps": 0.5}))
    with caplog.at_level(logging.WARNING, "jaxengine"):
        assert_same_bits(to_decoder(tmp_path, config), params)
    (message,) = caplog.messages
    assert "rms_norm_eps=0.5" in message and "1e-06" in message


# -- a running engine -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running() -> LLM:
    return make_llm(*random_model(tie_word_embeddings=False))


def answers(llm: LLM) -> list[tuple]:
    return bits(llm.generate(PROMPTS, PARAMS, key=jax.random.key(0)))


@pytest.mark.parametrize("form", ["folder", "dict", "generator"])
def test_an_engine_runs_what_it_is_given(running, tmp_path, form):
    other = initialise(running.config, jax.random.key(len(form)), scale=0.1)
    loading.save(tmp_path, running.config, other)
    version = running.weights_version
    given = FORMS[form](list(loading.named_tensors(running.config, other)), tmp_path)
    assert running.update_params(given) == version + 1
    assert_same_bits(running.params, other)
    found = answers(running)
    running.update_params(other)
    assert answers(running) == found


def test_weights_that_do_not_fit_leave_the_old_ones(running):
    before, params, version = answers(running), running.params, running.weights_version
    tensors = dict(loading.named_tensors(running.config, params))
    zeros = {name: np.zeros_like(array) for name, array in tensors.items()}
    for wrong in (without(zeros, HEAD), iter(list(zeros.items())[:-1]), zeros | {NORM: tensors[NORM] * np.nan}):
        with pytest.raises(ValueError, match="missing 'lm_head|hold NaN"):
            running.update_params(wrong)
    with pytest.raises(FileNotFoundError, match="params '/no/such/folder' was not found"):
        running.update_params("/no/such/folder")
    assert running.params is params and running.weights_version == version and answers(running) == before


def test_a_saved_llm_is_the_same_llm(tmp_path):
    """calc, with other weights than its folder has: a dtype, a tokenizer and a chat template come along."""
    config, text = loading.read_model_config(find_folder("calc")), ["12+30="]
    llm = LLM("calc", progress=False, **ENGINE)
    llm.update_params(jax.tree.map(lambda x: x * jnp.asarray(1.5, x.dtype), llm.params))
    llm.save(tmp_path / "out")
    again = LLM(tmp_path / "out", progress=False, **ENGINE)
    assert again.config == llm.config == config
    assert_same_bits(again.params, llm.params)
    key = jax.random.key(3)
    assert bits(again.generate(text, PARAMS, key=key)) == bits(llm.generate(text, PARAMS, key=key))
    ours, theirs = find_folder("calc"), tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (theirs / name).read_bytes() == (ours / name).read_bytes()
    with pytest.raises(FileExistsError, match="already holds model.safetensors"):
        llm.save(tmp_path / "out")


def test_a_save_that_fails_leaves_no_folder_that_opens(tmp_path, monkeypatch):
    config, params = random_model(**SMALL)
    monkeypatch.setattr(loading, "copy_files", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        loading.save(tmp_path, config, params, tokenizer_from=find_folder("calc"))
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        loading.read_model_config(tmp_path)


def test_an_llm_without_a_folder_saves_weights_and_config(running, tmp_path):
    running.save(tmp_path)
    assert {path.name for path in Path(tmp_path).iterdir()} == {"config.json", "model.safetensors"}
    config = loading.read_model_config(tmp_path, reduction_leaves=running.config.reduction_leaves)
    assert_same_bits(loading.load(tmp_path, config), running.params)


def test_experts_in_one_tensor_as_a_module_holds_them():
    config, params = random_model("Qwen3Moe", **SMALL, reduction_leaves=2)
    named = dict(loading.named_tensors(config, params))
    fused = {name: array for name, array in named.items() if ".experts." not in name}
    for layer in range(config.num_hidden_layers):
        stem = f"model.layers.{layer}.mlp.experts"
        each = [[named[f"{stem}.{e}.{part}_proj.weight"] for e in range(6)] for part in ("gate", "up", "down")]
        gates, ups, downs = map(np.stack, each)
        fused |= {f"{stem}.gate_up_proj": np.concatenate([gates, ups], axis=1), f"{stem}.down_proj": downs}
    for a, b in zip(jax.tree.leaves(to_decoder(fused, config)), jax.tree.leaves(params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    few = fused | {"model.layers.0.mlp.experts.down_proj": downs[:5]}
    with pytest.raises(ValueError, match="missing .model.layers.0.mlp.experts.5.down_proj.weight"):
        to_decoder(few, config)
