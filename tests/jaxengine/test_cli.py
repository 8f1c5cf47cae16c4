"""The command line: what it parses, what it prints, and how it ends. Models are tiny; peers are stand-ins that speak the peers' lines."""
import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import bits, random_model

from jaxengine import LLM, SamplingParams, bench, cli, demo
from jaxengine.config import EngineConfig
from jaxengine.models import loading
from jaxengine.options import add_fields, given_fields, sampling_params
from jaxengine.workloads import PEERS

ROOT = pathlib.Path(__file__).parent.parent.parent
ENGINE = dict(max_model_len=256, max_num_seqs=8, num_pages=100, compile_patience=1000)
OPTIONS = ["--no-progress", *(f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items())]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]
PROMPT_OPTIONS = [f"--prompt-token-ids={','.join(map(str, prompt))}" for prompt in PROMPTS]
# Every field of SamplingParams: arguments, and what they mean.
FIELDS = {
    "n": (["--n", "3"], 3), "temperature": (["--temperature", "0.5"], 0.5), "top_p": (["--top-p=0.9"], 0.9), "top_k": (["--top-k", "-1"], -1),
    "min_p": (["--min-p", "0.1"], 0.1), "repetition_penalty": (["--repetition-penalty", "1.1"], 1.1),
    "presence_penalty": (["--presence-penalty", "-0.5"], -0.5), "frequency_penalty": (["--frequency-penalty", "0.5"], 0.5),
    "logit_bias": (["--logit-bias", "5=-1.5", "--logit-bias", "6=2"], {5: -1.5, 6: 2.0}), "max_tokens": (["--max-tokens", "9"], 9),
    "min_tokens": (["--min-tokens", "2"], 2), "stop": (["--stop", "a", "--stop", "b c"], ["a", "b c"]),
    "stop_token_ids": (["--stop-token-ids", "4", "--stop-token-ids", "5"], [4, 5]), "ignore_eos": (["--ignore-eos"], True),
    "include_stop_str_in_output": (["--include-stop-str-in-output"], True), "seed": (["--seed", "7"], 7),
    "logprobs": (["--logprobs", "2"], 2), "prompt_logprobs": (["--prompt-logprobs", "0"], 0), "raw_logprobs": (["--raw-logprobs"], True),
    "entropy": (["--entropy"], True), "detokenize": (["--no-detokenize"], False), "skip_special_tokens": (["--no-skip-special-tokens"], False),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    loading.save(path, *random_model(num_hidden_layers=1))
    return str(path)


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    return LLM(folder, progress=False, **ENGINE)


# -- options -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SamplingParams)])
def test_every_sampling_field_is_an_option(field):
    if field == "key":
        arguments = cli._parser().parse_args(["generate", "m", "--key", "1,4294967295"])
        assert jax.random.key_data(sampling_params(arguments).key).tolist() == [1, 2**32 - 1]
        return
    words, value = FIELDS[field]
    arguments = cli._parser().parse_args(["generate", "m", *words])
    assert set(given_fields(arguments, SamplingParams)) == {field}
    assert sampling_params(arguments) == SamplingParams(**{field: value})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EngineConfig)])
@pytest.mark.parametrize("command", ["generate m", "bench"])
def test_every_engine_field_is_an_option(command, field):
    name, flag = field.replace("_", "-"), isinstance(getattr(EngineConfig(), field), bool)
    arguments = cli._parser().parse_args([*command.split(), *([f"--no-{name}"] if flag else [f"--{name}", "64"])])
    assert given_fields(arguments, EngineConfig) == {field: False if flag else 64}


def test_what_is_not_given_is_left_to_the_dataclass():
    assert sampling_params(cli._parser().parse_args(["generate", "m"])) == SamplingParams()


def test_a_field_of_an_unknown_type_is_refused_by_name():
    parts = dataclasses.make_dataclass("Odd", [("shape", complex, 0j)])
    with pytest.raises(TypeError, match="no form for the field shape"):
        add_fields(cli._parser(), parts)


def test_help_needs_no_jax():
    code = "import sys; from jaxengine.cli import main; assert main(['bench', '--help']) == 0; assert 'jax' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "qwen3-0.6b-shape" in found.stdout and "--max-num-seqs" in found.stdout


# -- generate ------------------------------------------------------------------------------------------------------------------

def test_json_has_the_bits_of_generate(folder, llm, capsys):
    assert cli.main(["generate", folder, *PROMPT_OPTIONS, *OPTIONS, "--n=2", "--max-tokens=6", "--logprobs=2", "--top-k=9", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = llm.generate(PROMPTS, SamplingParams(n=2, max_tokens=6, logprobs=2, top_k=9), key=jax.random.key(0))
    found = [(line["token_ids"], np.array(line["token_logprobs"], np.float32).tobytes(), line["finish_reason"], line["stop_reason"])
             for line in lines]
    assert found == bits(expected)
    assert [(line["prompt_token_ids"], line["index"]) for line in lines] == [(p, i) for p in PROMPTS for i in range(2)]
    assert {line["digest"] for line in lines} == {expected[0].digest} != {""}
    assert len(lines[0]["logprobs"]) == 6 and all(len(entry) >= 2 for entry in lines[0]["logprobs"])


def test_json_has_null_for_what_json_cannot_say():
    assert cli._plain({"a": np.array([-np.inf, 0.5], np.float32), "b": [np.nan]}) == {"a": [None, 0.5], "b": [None]}


def test_streaming_shows_the_same_tokens(folder, llm, capsys):
    assert cli.main(["generate", folder, *PROMPT_OPTIONS, *OPTIONS, "--max-tokens=5", "--call-seed=3", "--stream"]) == 0
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=5), key=jax.random.key(3))
    assert capsys.readouterr().out.splitlines() == [" ".join(map(str, output.outputs[0].token_ids)) for output in outputs]


def test_plain_output_shows_prompts_and_endings(folder, capsys):
    assert cli.main(["generate", folder, *PROMPT_OPTIONS, *OPTIONS, "--max-tokens=3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "== [5, 6, 7]" and len(out) == 4 and "[length, 3 tokens, logprob -" in out[1]


def one_line(capsys) -> str:
    """What stands on standard error, which must be one line."""
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("jaxengine: ")
    return captured.err


@pytest.mark.parametrize("words, message", [
    (["--temperature", "-1"], "temperature must be at least 0.0"),
    (["--top-k", "many"], "--top-k: invalid int value: 'many'"),
    (["--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
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
])
def test_a_wrong_value_ends_with_one_line(folder, capsys, words, message):
    assert cli.main(["generate", folder, PROMPT_OPTIONS[0], "--no-progress", "--num-pages=100", "--max-num-seqs=8", "--max-model-len=256",
                     *words]) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize("words, message", [
    (["generate", "no-such-model", "--prompt", "a"], "model 'no-such-model' was not found"),
    (["demo", "--model", "no-such-model"], "model 'no-such-model' was not found"),
    (["bench", "--model", "no-such-model"], "model 'no-such-model' was not found"),
    (["generate", "m"], "no prompt"),
    (["demo", "--samples", "0"], "--samples: must be a number of at least 1, got '0'"),
    (["bench", "--json", "/no/such/folder/x.json"], "/no/such/folder/x.json"),
    (["serve"], "'serve'"),
    ([], "COMMAND"),
])
def test_a_wrong_command_ends_with_one_line(capsys, words, message):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("jaxengine:") == 1 and "Traceback" not in error


def test_a_traceback_is_shown_when_asked_for(folder):
    with pytest.raises(ValueError, match="top_p must be"):
        cli.main(["generate", folder, *PROMPT_OPTIONS, "--top-p=2", "--traceback"])


def test_an_interrupt_ends_with_130(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_generate", interrupted)
    assert cli.main(["generate", "m"]) == 130
    assert one_line_or_word(capsys) == "interrupted\n"


def one_line_or_word(capsys) -> str:
    return capsys.readouterr().err


# -- demo ----------------------------------------------------------------------------------------------------------------------

def flipped(sample, **changes):
    return dataclasses.replace(sample, **changes)


def test_comparing_sees_every_bit(llm):
    samples = llm.generate(PROMPTS, SamplingParams(n=2, max_tokens=4), key=jax.random.key(0))
    drawn = [sample for request in samples for sample in request.outputs]
    assert demo.compare("again", drawn, drawn).holds
    logprobs = drawn[2].token_logprobs.copy()
    logprobs.view(np.uint32)[3] ^= 1
    for wrong in (flipped(drawn[2], token_logprobs=logprobs), flipped(drawn[2], token_ids=[*drawn[2].token_ids[:3], 0]),
                  flipped(drawn[2], token_ids=drawn[2].token_ids[:3], token_logprobs=logprobs[:3])):
        found = demo.compare("again", drawn, [*drawn[:2], wrong, drawn[3]])
        assert not found.holds and str(found).startswith("3 of 4 samples again; first difference: sample 2, ")
    assert not demo.compare("again", drawn, drawn[:3]).holds and not demo.compare("again", drawn[:3], drawn).holds


def test_comparing_tells_the_sign_of_zero():
    sample = lambda zero: demo.CompletionOutput(0, "", [1], np.array([zero], np.float32), "length", None, [])
    assert not demo.compare("again", [sample(0.0)], [sample(-0.0)]).holds


def test_a_verdict_says_what_differs():
    said: list[str] = []
    good, bad = demo.Comparison("alone", 4, 4), demo.Comparison("among others", 3, 4, "sample 1, token 0")
    assert demo._verdict([good], said.append) and not demo._verdict([good, bad], said.append)
    assert said[0].startswith("bit-equal: 4 of 4 samples alone") and said[1].startswith("BITS DIFFER: ") and "sample 1, token 0" in said[1]


def test_tokens_are_marked_by_probability():
    logprobs = np.log(np.array([0.99, 0.6, 0.2, 0.01, 0.99], np.float32))
    sample = demo.CompletionOutput(0, "", [1, 2, 3, 4, 5], logprobs, "stop", None, [], token_texts=["a", "b", "\x1b", "d", "<end>"])
    assert demo.colored(sample, False) == "ab\\x1b~d!|"
    shown = demo.colored(sample, True)
    assert shown.count("\x1b[38;5;") == 5 and "\x1b[38;5;196md\x1b[0m" in shown
    assert demo.colored(dataclasses.replace(sample, token_logprobs=np.full(5, np.nan, np.float32)), False).count("!") == 5


@pytest.mark.slow
def test_the_demo_holds_and_a_lost_bit_fails_it(monkeypatch, capsys):
    assert cli.main(["demo", "--samples=3", "--problems=3", "--no-color"]) == 0
    assert "bit-equal: 9 of 9 samples in the same call again, 9 of 9 samples alone, 9 of 9" in capsys.readouterr().out
    monkeypatch.setattr(demo, "draw_alone", lambda llm, prompts, samples, key: [])
    assert cli.main(["demo", "--samples=2", "--problems=2"]) == 1
    assert "BITS DIFFER" in capsys.readouterr().out


# -- bench ---------------------------------------------------------------------------------------------------------------------

class Clock:
    """A system whose time is a second a call and a tenth of a second a token."""

    name, vocab_size, workloads = "clock", 50, ("decode", "group")

    def __init__(self) -> None:
        self.calls: list[tuple[list[list[int]], list[int]]] = []

    def warm_up(self) -> None:
        pass

    def seconds(self, prompts, lengths) -> float:
        self.calls.append((prompts, lengths))
        return 1.0 + 0.1 * sum(lengths)


def test_decode_is_measured_beyond_the_first_token():
    clock = Clock()
    assert bench.Decode(4, prompt_tokens=10, new_tokens=5).rate(clock, 0) == pytest.approx(10.0)
    assert [(len(prompts), len(prompts[0]), lengths) for prompts, lengths in clock.calls] == [(4, 10, [1] * 4), (4, 10, [5] * 4)]
    assert (bench.Decode(8).new_tokens, bench.Decode(64).new_tokens, bench.Decode(64, new_tokens=3).new_tokens) == (32, 16, 3)


def test_a_group_repeats_its_prompts_and_draws_lengths():
    clock = Clock()
    rate = bench.Group(3, 4, prompt_tokens=10, shortest=2, longest=9).rate(clock, 0)
    ((prompts, lengths),) = clock.calls
    assert len({tuple(prompt) for prompt in prompts}) == 3 and prompts[0] == prompts[3] != prompts[4]
    assert len(lengths) == 12 and set(lengths) <= set(range(2, 10)) and len(set(lengths)) > 1
    assert rate == pytest.approx(sum(lengths) / (1 + 0.1 * sum(lengths)))


def test_no_prompt_comes_twice_and_systems_get_the_same():
    first, second = Clock(), Clock()
    results = bench.measure([first, second], [bench.Decode(2, 20, 3), bench.Group(2, 2, 20, 2, 4)], repeats=2)
    assert first.calls == second.calls and [result.system for result in results] == ["clock"] * 4
    drawn = [tuple(tuple(prompt) for prompt in dict.fromkeys(map(tuple, prompts))) for prompts, _ in first.calls]
    flat = [prompt for prompts in drawn for prompt in prompts]
    assert len(flat) == len(set(flat)) == 2 * 2 * 3 + 2 * 3
    assert [len(result.rates) for result in results] == [2] * 4 and "1.00 times as fast" in bench.table(results)


def test_compilations_are_counted():
    with bench.compilations() as names:
        jax.jit(lambda x: x * 3 + 1)(2.0)
    assert len(names) >= 1
    with bench.compilations() as names:
        pass
    jax.jit(lambda x: x * 5 + 1)(2.0)
    assert names == []


def test_nothing_is_compiled_while_the_clock_runs(llm):
    workloads = [bench.Decode(1, 20, 3), bench.Decode(8, 20, 3), bench.Group(2, 3, 40, 2, 5)]
    results = bench.measure([bench.Ours(llm)], workloads, repeats=2)
    assert [result.compilations for result in results] == [0, 0, 0] and all(len(result.rates) == 2 for result in results)
    record = json.loads(json.dumps(bench.record(llm, "tiny", bench.machine(), results, {}), allow_nan=False))
    assert record["engine"]["max_num_seqs"] == 8 and len(record["results"]) == 3 and record["machine"]["jax"] == jax.__version__


def test_too_small_a_context_is_told(llm):
    with pytest.raises(ValueError, match="raise max_model_len"):
        bench.Ours(llm).seconds([[1] * 200], [100])


def test_the_command_prints_and_writes(folder, llm, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "open_model", lambda model, **_: llm)
    file = tmp_path / "figures.json"
    assert cli.main(["bench", "--model", folder, "--batch", "2", "--workloads", "decode", "--repeats=1", f"--json={file}"]) == 0
    captured = capsys.readouterr()
    assert "decode B=2      jaxengine" in captured.out and f"jax {jax.__version__}" in captured.out
    assert json.loads(file.read_text())["results"][0]["workload"] == "decode B=2"


def test_a_shape_is_a_model(monkeypatch):
    config, _ = random_model(num_hidden_layers=1, dtype="bfloat16")
    monkeypatch.setitem(bench.SHAPES, "small-shape", config)
    opened = bench.open_model("small-shape", dtype="float32", num_pages=80, max_num_seqs=8)
    assert opened.config == dataclasses.replace(config, dtype="float32") and opened.engine_config.num_pages == 80
    with pytest.raises(ValueError, match="dtype must be 'auto' or one of"):
        bench.open_model("small-shape", dtype="int8")


STAND_IN = """
import sys
sys.path.insert(0, {benchmarks!r})
import lines
write = lines.own_stdout()
print("noise that must not reach the answers")
lines.serve(["decode"], {{"stand-in": "1"}}, lambda prompts, lengths: {seconds}, write)
"""


def stand_in(monkeypatch, tmp_path, seconds: str) -> bench.Peer:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN.format(benchmarks=str(ROOT / "benchmarks"), seconds=seconds))
    monkeypatch.setitem(PEERS, "stand-in", str(script))
    return bench.Peer("stand-in", sys.executable, "folder", "float32", 50)


def test_a_peer_answers_line_by_line(monkeypatch, tmp_path, capfd):
    peer = stand_in(monkeypatch, tmp_path, "1.0 + 0.1 * sum(lengths)")
    try:
        results = bench.measure([peer], [bench.Decode(4, 10, 5), bench.Group()], repeats=1)
    finally:
        peer.close()
    assert [(result.workload, result.system, result.compilations) for result in results] == [("decode B=4", "stand-in", None)]
    assert results[0].median == pytest.approx(10.0) and peer.versions == {"stand-in": "1"}
    assert "noise" in capfd.readouterr().err


def test_a_peer_that_ends_is_told(monkeypatch, tmp_path, capfd):
    peer = stand_in(monkeypatch, tmp_path, "sys.exit(3)")
    with pytest.raises(ValueError, match="the peer 'stand-in' ended with code 3: has .* what benchmarks/README.md asks for"):
        peer.seconds([[1]], [1])
    peer.close()


@pytest.mark.reference
def test_transformers_is_a_peer(folder, tmp_path):
    bench.write_config(tmp_path, random_model(num_hidden_layers=1)[0])  # no weights beside it: they are made
    for place in (folder, str(tmp_path)):
        peer = bench.Peer("transformers", sys.executable, place, "float32", 1000)
        assert peer.seconds([[1, 2, 3], [4, 5, 6]], [4, 4]) > 0 and "transformers" in peer.versions
        peer.close()
