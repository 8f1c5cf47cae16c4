"""The arithmetic problems, and the model that ships, which solves about half of them."""

import ast
import functools
import operator
import re
from collections import Counter

import jax
import numpy as np
import pytest
import transformers

import jaxengine
from checkpoints import model_folder
from jaxengine.models import loading, params
from jaxengine.rl.calc import arithmetic, model, train
from jaxengine.rl.calc.arithmetic import Problem, is_held_out, is_right, problems
from jaxengine.text.tokenizer import Tokenizer

FOLDER = model_folder.find_folder("calc")
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def value(node: ast.expr) -> int:
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](value(node.left), value(node.right))
    assert isinstance(node, ast.Constant)
    return node.value


@functools.cache
def calc():
    config = loading.read_model_config(FOLDER)
    return config, loading.load(FOLDER, config)


@functools.cache
def recorded() -> dict[str, float]:
    """Greedy accuracy by kind, from the table in the folder's README."""
    rows = re.findall(r"^\| (\w+) \| \d+ \| ([\d.]+) \| [\d.]+ \|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    return {kind: float(greedy) for kind, greedy in rows}


@pytest.mark.parametrize("split", arithmetic.SPLITS)
def test_answers_are_right_and_every_kind_occurs(split):
    drawn = problems(3, 2000, split)
    for problem in drawn:
        assert problem.prompt.endswith("=")
        assert str(value(ast.parse(problem.prompt[:-1], mode="eval").body)) == problem.answer
    kinds = Counter(problem.kind for problem in drawn)
    assert kinds.keys() == arithmetic.KINDS.keys() and min(kinds.values()) > 200
    assert any(problem.answer.startswith("-") for problem in drawn)


def test_kinds_are_read_off_the_prompt():
    kinds = {"12+30=": "sum", "3-10=": "difference", "7*8=": "product", "3+4*2=": "mixed", "(7-2)*3=": "mixed"}
    assert {prompt: Problem(prompt, "").kind for prompt in kinds} == kinds


def test_draws_follow_the_seed():
    assert problems(5, 50) == problems(5, 100)[:50] != problems(6, 50)
    assert problems(0, 2) == [Problem("3-(9+5)=", "-11"), Problem("8-49=", "-41")]  # in every process
    assert problems(0, 2, "held-out") == [Problem("0-8+9=", "1"), Problem("88*12=", "1056")]


def test_splits_are_disjoint():
    train = {problem.prompt for seed in range(4) for problem in problems(seed, 5000)}
    held_out = {problem.prompt for seed in range(4) for problem in problems(seed, 2000, "held-out")}
    assert train.isdisjoint(held_out) and len(held_out) > 2000
    assert all(map(is_held_out, held_out)) and not any(map(is_held_out, train))


def test_tables_of_one_digit_are_never_held_out():
    assert not any(is_held_out(f"{a}{sign}{b}=") for a in range(10) for b in range(10) for sign in "+-*")


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="split must be one of train, held-out, got 'test'"):
        problems(0, 1, "test")


@pytest.mark.parametrize("text", ["-7", " -7", "-7 ", "-7\n", "-7\n3-10=-7", "-7\r\n"])
def test_right_completions(text):
    assert is_right(Problem("3-10=", "-7"), text)


@pytest.mark.parametrize("text", ["", "7", "- 7", "-70", "-7.0", "-07", "\n-7", "-7 or so", "=-7", "-7<|im_end|>"])
def test_wrong_completions(text):
    assert not is_right(Problem("3-10=", "-7"), text)


def test_the_shipped_folder_is_small_and_whole():
    config, weights = calc()
    assert (
        config.architecture == "Qwen3ForCausalLM"
        and config.dtype == "bfloat16"
        and config.qk_norm
        and config.tie_word_embeddings
    )
    assert {str(array.dtype) for array in jax.tree.leaves(weights)} == {"bfloat16"}
    padding = config.padded_vocab_size - config.vocab_size
    assert 1e6 < sum(array.size for array in jax.tree.leaves(weights)) - padding * config.hidden_size < 4e6
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert files.keys() == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
    }
    assert sum(files.values()) < 8e6


@pytest.mark.parametrize("leaves", [2, 4])
def test_the_shipped_model_divides_into_leaves(leaves):
    config = loading.read_model_config(FOLDER, reduction_leaves=leaves)
    loaded, expected = loading.load(FOLDER, config), params.abstract(config)
    assert jax.tree.structure(loaded) == jax.tree.structure(expected)
    for array, abstract in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        assert (array.shape, array.dtype) == (abstract.shape, abstract.dtype)


def test_the_tokenizer_is_the_one_trained_with_and_encodes_every_text():
    tokenizer = Tokenizer.load(FOLDER)
    trained_with = model.build_tokenizer()
    texts = [problem.prompt for problem in problems(0, 500)] + [
        "".join(map(chr, range(128))),
        " a  b ",
        "naïve ☃ 数",
        "",
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == trained_with.encode(text).ids and len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == calc()[0].vocab_size


def test_completions_end_with_the_end_token():
    tokenizer = Tokenizer.load(FOLDER)
    assert calc()[0].eos_token_ids == (tokenizer.eos_token_id,)
    assert model_folder.read_config(FOLDER)["eos_token_id"] == tokenizer.eos_token_id
    assert model_folder.read_generation_config(FOLDER)["eos_token_id"] == tokenizer.eos_token_id
    assert tokenizer.token_text(tokenizer.eos_token_id) == model.END


def test_transformers_reads_the_tokenizer_and_its_chat_template():
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDER)
    message = [{"role": "user", "content": "12+30="}]
    assert tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == model.chat_prompt(
        "12+30="
    )
    for text in ("( 7 - 2 ) * 3 = , don't", "12+30=42", " naïve"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("42<|im_end|>"), skip_special_tokens=True) == "42"
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (model.END, model.PAD, None)


def test_chats_are_what_the_model_was_trained_on():
    ids = Tokenizer.load(FOLDER).encode_chat([{"role": "user", "content": "7*8="}])
    assert ids == model.build_tokenizer().encode(model.chat_prompt("7*8=")).ids


def test_rows_hold_whole_examples_once():
    tokenizer = model.build_tokenizer()
    drawn = problems(0, 300)
    pairs = list(train.examples(drawn))
    tokens, mask = (
        np.concatenate(parts) for parts in zip(*train.batches(train.packed_rows(tokenizer, pairs)), strict=True)
    )
    assert tokens.shape == mask.shape and tokens.shape[1] == train.LENGTH and tokens.shape[0] % train.ROWS == 0
    text = tokenizer.decode(tokens[tokens >= 0].tolist(), skip_special_tokens=False)
    assert text == "".join(prompt + completion for prompt, completion in pairs)
    assert tokenizer.decode(tokens[mask].tolist(), skip_special_tokens=False) == "".join(
        p.answer + model.END for p in drawn
    )


def test_the_shipped_model_is_as_good_as_recorded_and_no_better():
    config, weights = calc()
    right, probability = train.grade(config, weights, model.build_tokenizer(), problems(1234, 200, "held-out"))
    assert recorded().keys() == {*arithmetic.KINDS, "all"}
    assert 0.35 < right.mean() < 0.75
    assert abs(right.mean() - recorded()["all"]) < 4 * (0.25 / 200) ** 0.5
    assert 0.3 < probability.mean() < 0.6
    assert max(recorded().values()) < 0.9 and min(recorded().values()) > 0.1  # every kind can improve


def test_grading_is_the_trainers_logprobs():
    config, weights = calc()
    tokenizer, drawn = model.build_tokenizer(), problems(7, train.ROWS, "held-out")
    pairs = [(problem.prompt, problem.answer + model.END) for problem in drawn]
    ((tokens, mask),) = train.batches(train.packed_rows(tokenizer, pairs, per_row=1))
    logprobs = np.asarray(jaxengine.score(weights, tokens, mask, config=config, kernels="xla"))
    right, probability = train.grade(config, weights, tokenizer, drawn)
    np.testing.assert_allclose(np.exp(logprobs.sum(-1)), probability, rtol=1e-4)
    assert right[probability > 0.5].all() and not right[logprobs.min(-1) < np.log(0.001)].any()


@pytest.mark.slow
def test_training_repeats_by_bits():
    tokenizer = model.build_tokenizer()
    once, again, other = (train.train(tokenizer, seed=seed, steps=5) for seed in (0, 0, 1))
    equal = lambda a, b: all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    assert equal(once, again) and not equal(once, other)
