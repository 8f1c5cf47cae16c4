"""The command line: what it parses, what it prints, and how it ends."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import bits, random_model

from jaxengine import LLM, SamplingParams
from jaxengine.command import commands, main
from jaxengine.command.options import NOT_TEXT, add_fields, given_fields, sampling_params
from jaxengine.command.parser import parser
from jaxengine.command.records import plain
from jaxengine.config import EngineConfig
from jaxengine.models import loading

ROOT = pathlib.Path(__file__).parent.parent.parent
ENGINE = dict(max_model_len=256, max_num_seqs=8, num_pages=100, compile_patience=1000)
OPTIONS = ["--no-progress", *(f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items())]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]
PROMPT_OPTIONS = [f"--prompt-token-ids={','.join(map(str, prompt))}" for prompt in PROMPTS]
# Every field of SamplingParams: arguments, and what they mean.
FIELDS = {
    "structured_outputs": (['--structured-outputs={"regex": "a+"}'], {"regex": "a+"}),
    "n": (["--n", "3"], 3),
    "temperature": (["--temperature", "0.5"], 0.5),
    "top_p": (["--top-p=0.9"], 0.9),
    "top_k": (["--top-k", "-1"], -1),
    "min_p": (["--min-p", "0.1"], 0.1),
    "repetition_penalty": (["--repetition-penalty", "1.1"], 1.1),
    "presence_penalty": (["--presence-penalty", "-0.5"], -0.5),
    "frequency_penalty": (["--frequency-penalty", "0.5"], 0.5),
    "logit_bias": (["--logit-bias", "5=-1.5", "--logit-bias", "6=2"], {5: -1.5, 6: 2.0}),
    "max_tokens": (["--max-tokens", "9"], 9),
    "truncate_prompt_tokens": (["--truncate-prompt-tokens", "-1"], -1),
    "allowed_token_ids": (["--allowed-token-ids", "4", "--allowed-token-ids", "5"], [4, 5]),
    "bad_words": (["--bad-words", "a", "--bad-words", "b c"], ["a", "b c"]),
    "bad_words_token_ids": (["--bad-words-token-ids", "4,5", "--bad-words-token-ids", "6"], [[4, 5], [6]]),
    "min_tokens": (["--min-tokens", "2"], 2),
    "stop": (["--stop", "a", "--stop", "b c"], ["a", "b c"]),
    "stop_token_ids": (["--stop-token-ids", "4", "--stop-token-ids", "5"], [4, 5]),
    "ignore_eos": (["--ignore-eos"], True),
    "include_stop_str_in_output": (["--include-stop-str-in-output"], True),
    "seed": (["--seed", "7"], 7),
    "logprobs": (["--logprobs", "2"], 2),
    "logprob_token_ids": (["--logprob-token-ids", "4", "--logprob-token-ids", "5"], [4, 5]),
    "prompt_logprobs": (["--prompt-logprobs", "0"], 0),
    "raw_logprobs": (["--raw-logprobs"], True),
    "entropy": (["--entropy"], True),
    "detokenize": (["--no-detokenize"], False),
    "skip_special_tokens": (["--no-skip-special-tokens"], False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    loading.save(path, *random_model(num_hidden_layers=1))
    return str(path)


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    return LLM(folder, progress=False, **ENGINE)


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SamplingParams)])
def test_every_sampling_field_is_an_option(field):
    if field == "key":
        arguments = parser().parse_args(["generate", "m", "--key", "1,4294967295"])
        assert jax.random.key_data(sampling_params(arguments).key).tolist() == [1, 2**32 - 1]
        return
    words, value = FIELDS[field]
    arguments = parser().parse_args(["generate", "m", *words])
    assert set(given_fields(arguments, SamplingParams)) == {field}
    assert sampling_params(arguments) == SamplingParams(**{field: value})


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(EngineConfig) if f.name not in NOT_TEXT])
@pytest.mark.parametrize("command", ["generate m", "serve m", "bench"])
def test_every_engine_field_is_an_option(command, field):
    name, kind = field.replace("_", "-"), type(getattr(EngineConfig(), field))
    words, value = [f"--{name}", "64"], "64" if kind is str else 64
    if kind is bool:
        words, value = [f"--no-{name}"], False
    arguments = parser().parse_args([*command.split(), *words])
    assert given_fields(arguments, EngineConfig) == {field: value}


def test_what_is_not_given_is_left_to_the_dataclass():
    assert sampling_params(parser().parse_args(["generate", "m"])) == SamplingParams()


def test_a_field_of_an_unknown_type_is_refused_by_name():
    parts = dataclasses.make_dataclass("Odd", [("shape", complex, 0j)])
    with pytest.raises(TypeError, match="no form for the field shape"):
        add_fields(parser(), parts)


def test_help_needs_no_jax():
    lines = (
        "import sys",
        "from jaxengine.command.main import main",
        "assert main(['bench', '--help']) == 0",
        "assert 'jax' not in sys.modules",
    )
    code = "; ".join(lines)
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "qwen3-0.6b-shape" in shown and "--max-num-seqs" in shown


# -- generate ---------------------------------------------------------------------------------------------------------


def test_json_has_the_bits_of_generate(folder, llm, capsys):
    words = ["--n=2", "--max-tokens=6", "--logprobs=2", "--top-k=9", "--json"]
    assert main.main(["generate", folder, *PROMPT_OPTIONS, *OPTIONS, *words]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = llm.generate(PROMPTS, SamplingParams(n=2, max_tokens=6, logprobs=2, top_k=9), key=jax.random.key(0))
    logprobs = [np.array(line["token_logprobs"], np.float32).tobytes() for line in lines]
    ends = [(line["finish_reason"], line["stop_reason"]) for line in lines]
    found = [(line["token_ids"], own, *end) for line, own, end in zip(lines, logprobs, ends, strict=True)]
    assert found == bits(expected)
    assert [(line["prompt_token_ids"], line["index"]) for line in lines] == [(p, i) for p in PROMPTS for i in range(2)]
    assert {line["digest"] for line in lines} == {expected[0].digest} != {""}
    assert len(lines[0]["logprobs"]) == 6 and all(len(entry) >= 2 for entry in lines[0]["logprobs"])


def test_json_has_null_for_what_json_cannot_say():
    assert plain({"a": np.array([-np.inf, 0.5], np.float32), "b": [np.nan]}) == {"a": [None, 0.5], "b": [None]}


def test_streaming_shows_the_same_tokens(folder, llm, capsys):
    words = ["--max-tokens=5", "--call-seed=3", "--stream"]
    assert main.main(["generate", folder, *PROMPT_OPTIONS, *OPTIONS, *words]) == 0
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=5), key=jax.random.key(3))
    expected = [" ".join(map(str, output.outputs[0].token_ids)) for output in outputs]
    assert capsys.readouterr().out.splitlines() == expected


def test_plain_output_shows_prompts_and_endings(folder, capsys):
    assert main.main(["generate", folder, *PROMPT_OPTIONS, *OPTIONS, "--max-tokens=3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "== [5, 6, 7]" and len(out) == 4 and "[length, 3 tokens, logprob -" in out[1]


def one_line(capsys) -> str:
    """The text on standard error, which must be one line."""
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("jaxengine: ")
    return captured.err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--temperature", "-1"], "temperature must be at least 0.0"),
        (["--top-k", "many"], "--top-k: invalid int value: 'many'"),
        (["--max-tokens", "-1"], "max_tokens must be at least 0, got -1"),
        (["--logit-bias", "5"], "'5' is no pair such as 42=-1.5"),
        (["--key", "1"], "'1' is no key"),
        (["--key", "1,5000000000"], "is no key"),
        (["--prompt-token-ids", "1,x"], "'1,x' is no list of token ids"),
        (["--dtype", "int8"], "'int8'"),
        (["--temprature", "1"], "--temprature"),
        (["--page-size", "7"], "page_size must be one of"),
        (["--max-model-len", "100000"], "max_model_len=100000 is more than"),
        (["--prompt", "text"], "no tokenizer"),
        (["--chat"], "--chat takes messages as text"),
        (["--stream", "--n", "2"], "n must be 1, got 2"),
        (["--stream", "--json"], "not allowed with"),
    ],
)
def test_a_wrong_value_ends_with_one_line(folder, capsys, words, message):
    room = ["--num-pages=100", "--max-num-seqs=8", "--max-model-len=256"]
    assert main.main(["generate", folder, PROMPT_OPTIONS[0], "--no-progress", *room, *words]) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize(
    "words, message",
    [
        (["generate", "no-such-model", "--prompt", "a"], "model 'no-such-model' was not found"),
        (["demo", "--model", "no-such-model"], "model 'no-such-model' was not found"),
        (["bench", "--model", "no-such-model"], "model 'no-such-model' was not found"),
        (["generate", "m"], "no prompt"),
        (["demo", "--samples", "0"], "--samples: must be a number of at least 1, got '0'"),
        (["bench", "--json", "/no/such/folder/x.json"], "/no/such/folder/x.json"),
        (["serv"], "'serv'"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_command_ends_with_one_line(capsys, words, message):
    assert main.main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("jaxengine:") == 1 and "Traceback" not in error


def test_a_traceback_is_shown_when_asked_for(folder):
    with pytest.raises(ValueError, match="top_p must be"):
        main.main(["generate", folder, *PROMPT_OPTIONS, "--top-p=2", "--traceback"])


def test_an_interrupt_ends_with_130(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_generate", interrupted)
    assert main.main(["generate", "m"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
