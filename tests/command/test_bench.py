"""The bench: what it counts and what it compiles. In the default suite a stand-in answers for the peers; `-m reference`
runs the script of each peer that is installed."""

import ast
import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import pytest
from conftest import FEW_TILES, random_model

from jaxengine import LLM, SamplingParams
from jaxengine.command import bench, commands, main, parser
from jaxengine.command.workloads import PEERS
from jaxengine.engine import step_variants
from jaxengine.models import loading

PEER_SCRIPTS = pathlib.Path(__file__).parent.parent.parent / "benchmarks" / "peers"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    loading.save(path, *random_model(num_hidden_layers=1))
    return str(path)


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    """With fewer tiles than usual: a warm-up compiles them all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_variants, "TILES", FEW_TILES)
        return bench.open_model(folder, max_model_len=256, max_num_seqs=2, num_pages=100, max_num_batched_tokens=64)


class Clock:
    """A system whose time is a second a call and a tenth of a second a token."""

    name, vocab_size, workloads = "clock", 50, ("decode", "group")

    def __init__(self) -> None:
        self.calls: list[tuple[list[list[int]], list[int]]] = []

    def warm_up(self) -> None:
        pass

    def seconds(self, prompts, lengths, logprobs) -> float:
        self.calls.append((prompts, lengths))
        self.wants_logprobs = logprobs
        return 1.0 + 0.1 * sum(lengths)

    def peak_memory(self) -> int:
        return 2_345_600_000


def test_decode_is_measured_beyond_the_first_token():
    clock = Clock()
    assert bench.Decode(4, prompt_tokens=10, new_tokens=5).figures(clock, 0) == {"tok/s": pytest.approx(10.0)}
    sizes = [(len(prompts), len(prompts[0]), lengths) for prompts, lengths in clock.calls]
    assert sizes == [(4, 10, [1] * 4), (4, 10, [5] * 4)]
    workloads = bench.Decode(8), bench.Decode(64), bench.Decode(64, new_tokens=3)
    assert [workload.new_tokens for workload in workloads] == [32, 16, 3]


def test_a_group_repeats_its_prompts_and_draws_lengths():
    clock = Clock()
    rate = bench.Group(3, 4, prompt_tokens=10, shortest=2, longest=9).figures(clock, 0)["tok/s"]
    ((prompts, lengths),) = clock.calls
    assert len({tuple(prompt) for prompt in prompts}) == 3 and prompts[0] == prompts[3] != prompts[4]
    assert len(lengths) == 12 and set(lengths) <= set(range(2, 10)) and len(set(lengths)) > 1
    assert rate == pytest.approx(sum(lengths) / (1 + 0.1 * sum(lengths))) and clock.wants_logprobs


def test_no_prompt_comes_twice_and_systems_get_the_same():
    first, second = Clock(), Clock()
    results = bench.measure([first, second], [bench.Decode(2, 20, 3), bench.Group(2, 2, 20, 2, 4)], repeats=2)
    assert first.calls == second.calls and [result.system for result in results] == ["clock"] * 4
    drawn = [prompt for prompts, _ in first.calls for prompt in dict.fromkeys(map(tuple, prompts))]
    assert len(drawn) == len(set(drawn)) == 2 * (1 + 2 * 2) + 2 * 3
    assert [len(result.values) for result in results] == [2] * 4 and "1.00 times as fast" in bench.table(results)
    assert [result.peak_memory for result in results] == [2_345_600_000] * 4 and " 2346 " in bench.table(results)
    assert [result.settings["kind"] for result in results] == ["decode"] * 2 + ["group"] * 2
    assert results[0].settings["prompt_tokens"] == 20


class Scripted(Clock):
    """A system whose tokens came at times that are told beforehand."""

    def __init__(self, times: list[list[float]]) -> None:
        self.times = times

    def token_times(self, prompts, lengths, late, before) -> list[list[float]]:
        self.asked = (prompts, lengths, late, before)
        return self.times


def test_a_first_token_and_what_others_wait_for_it():
    """A gap that begins before the prompt was sent or ends after its first token counts whole."""
    workload = bench.FirstToken(decoding=2, prompt_tokens=5, late_tokens=9, new_tokens=7, before=3)
    system = Scripted([[-9.0, -1.0, 0.5, 1.0, 3.5, 9.5], [-1.0, 0.0, 2.0, 4.0, 4.5], [3.0]])
    assert workload.figures(system, 0) == {"s to the first token": 3.0, "s between tokens": 2.5}
    prompts, lengths, late, before = system.asked
    assert ([*map(len, prompts)], lengths, len(late), before) == ([5, 5], [7, 7], 9, 3) and workload.context == 12
    system.times[0] = [-2.9, 0.5, 1.0, 3.5]
    assert workload.figures(system, 0)["s between tokens"] == 3.4
    system.times[0] = [-1.5, 1.0, 9.0]
    assert workload.figures(system, 1)["s between tokens"] == 8.0 and system.asked[2] != late
    with pytest.raises(ValueError, match="7 new tokens are too few"):
        workload.figures(Scripted([[0.0, 3.5], [0.0, 2.5], [3.0]]), 0)
    with pytest.raises(ValueError, match="before between 1 and new_tokens - 1, got 2, 7 and 7"):
        bench.FirstToken(decoding=2, new_tokens=7, before=7)


def test_sizes_are_given_on_the_command_line():
    def workloads(*words: str) -> list:
        return commands.bench_workloads(parser.parser().parse_args(["bench", *words]))

    assert workloads() == [bench.Decode(1), bench.Decode(8), bench.Decode(32), bench.Decode(64), bench.Group()]
    decode = workloads("--workloads", "decode", "--batch", "2", "3", "--prompt-tokens", "128", "9")
    assert [*map(str, decode)] == ["decode B=2", "decode B=3", "decode B=2 at 9", "decode B=3 at 9"]
    assert workloads("--workloads", "group", "first-token", "--groups", "2x3") == [
        bench.Group(2, 3),
        bench.FirstToken(),
    ]
    with pytest.raises(ValueError, match="must be two numbers as in 8x8, got '8'"):
        workloads("--groups", "8")


def test_room_is_what_the_workloads_want():
    assert bench.room([bench.Decode(64), bench.Group()]) == {}
    assert bench.room([bench.Decode(8), bench.FirstToken(new_tokens=64)]) == {"max_model_len": 4097}
    assert bench.room([bench.Decode(100)]) == {"max_num_seqs": 100}
    assert bench.room([bench.Decode(16, 4096)]) == {"max_model_len": 4128, "num_pages": 16 * 4128 // 32 + 65}


def test_a_prompt_that_arrives_late_gets_its_token_while_others_are_decoded(llm):
    workload = bench.FirstToken(decoding=1, prompt_tokens=20, late_tokens=200, new_tokens=80, before=3)
    results = bench.measure([bench.Ours(llm)], [workload], repeats=2)
    assert [(result.figure, result.compilations) for result in results] == [
        ("s to the first token", 0),
        ("s between tokens", 0),
    ]
    (own, late) = bench.Ours(llm).token_times([[1] * 20], [80], [2] * 200, 3)
    assert own == sorted(own) and len(own) == 80 and len(late) == 1
    assert own[2] <= 0 < late[0] and sum(time <= 0 for time in own) < 80 - 200 // 64


def test_compilations_are_counted():
    with bench.compilations() as names:
        jax.jit(lambda x: x * 3 + 1)(2.0)
    assert len(names) >= 1
    with bench.compilations() as names:
        pass
    jax.jit(lambda x: x * 5 + 1)(2.0)
    assert names == []


def test_nothing_is_compiled_while_the_clock_runs(llm):
    workloads = [bench.Decode(1, 20, 3), bench.Decode(4, 20, 3), bench.Group(2, 3, 40, 2, 5)]
    results = bench.measure([bench.Ours(llm)], workloads, repeats=2)
    assert [(result.compilations, len(result.values)) for result in results] == [(0, 2)] * 3
    record = json.loads(json.dumps(bench.record(llm, "tiny", bench.machine(), results, {}), allow_nan=False))
    assert record["engine"]["max_num_seqs"] == 2 and len(record["results"]) == 3
    assert record["machine"]["jax"] == jax.__version__
    assert all(result["peak_memory"] > 50e6 for result in record["results"])


def test_too_small_a_context_is_refused(llm):
    with pytest.raises(ValueError, match="raise max_model_len"):
        bench.Ours(llm).seconds([[1] * 200], [100], logprobs=True)


STAND_IN = """
import sys
sys.path.insert(0, {scripts!r})
import peer_lines
write = peer_lines.own_stdout()
print("noise that must not reach the answers", flush=True)
def token_times(prompts, lengths, late, before):
    return [[token - before + 1 for token in range(length)] for length in lengths] + [[len(late) / 10]]
workloads = ["decode", "first-token"]
peer_lines.serve(workloads, {{"stand-in": "1"}}, write, lambda prompts, lengths, logprobs: {seconds}, token_times)
"""


def name_stand_in(monkeypatch, tmp_path, seconds: str) -> None:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN.format(scripts=str(PEER_SCRIPTS), seconds=seconds))
    monkeypatch.setitem(PEERS, "stand-in", str(script))


def stand_in(monkeypatch, tmp_path, seconds: str) -> bench.Peer:
    name_stand_in(monkeypatch, tmp_path, seconds)
    return bench.Peer("stand-in", sys.executable, "folder", "float32", 50, 64)


def test_the_command_prints_and_writes(folder, llm, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "open_model", lambda model, **_: llm)
    name_stand_in(monkeypatch, tmp_path, "1.0 + 0.1 * sum(lengths)")
    file = tmp_path / "figures.json"
    words = ["--batch", "2", "--workloads", "decode", "--repeats=1", "--peer", "stand-in", f"--json={file}"]
    assert main.main(["bench", "--model", folder, *words]) == 0
    captured, written = capsys.readouterr(), json.loads(file.read_text())
    assert "decode B=2          jaxengine" in captured.out and f"jax {jax.__version__}" in captured.out
    assert "peak MB" in captured.out
    assert [result["workload"] for result in written["results"]] == ["decode B=2"] * 2
    assert [result["system"] for result in written["results"]] == ["jaxengine", "stand-in"]
    assert written["peers"] == {"stand-in": {"stand-in": "1"}}
    ours, theirs = (result["peak_memory"] for result in written["results"])
    assert ours > theirs > 1e6  # the stand-in is a bare interpreter


def test_a_shape_is_a_model(monkeypatch):
    config, _ = random_model(num_hidden_layers=1, dtype="bfloat16")
    monkeypatch.setitem(bench.SHAPES, "small-shape", config)
    opened = bench.open_model("small-shape", dtype="float32", num_pages=80, max_num_seqs=8)
    assert opened.config == dataclasses.replace(config, dtype="float32").with_leaves()
    assert opened.engine_config.num_pages == 80
    with pytest.raises(ValueError, match="dtype must be 'auto' or one of"):
        bench.open_model("small-shape", dtype="int8")


def test_a_peer_answers_line_by_line(monkeypatch, tmp_path, capfd):
    peer = stand_in(monkeypatch, tmp_path, "1.0 + 0.1 * sum(lengths)")
    try:
        workloads = [bench.Decode(4, 10, 5), bench.Group(), bench.FirstToken(2, 10, 30, new_tokens=9, before=3)]
        results = bench.measure([peer], workloads, repeats=1)
    finally:
        peer.close()
    result, first, gap = results
    assert (first.median, gap.median, first.peak_memory) == (3.0, 1.0, gap.peak_memory)
    assert (result.workload, result.system, result.compilations) == ("decode B=4 at 10", "stand-in", None)
    assert result.median == pytest.approx(10.0) and peer.versions == {"stand-in": "1"}
    assert "noise" in capfd.readouterr().err


def test_a_peer_that_ends_is_an_error(monkeypatch, tmp_path, capfd):
    peer = stand_in(monkeypatch, tmp_path, "sys.exit(3)")
    with pytest.raises(ValueError, match="the peer 'stand-in' ended with code 3: .*benchmarks/README.md"):
        peer.seconds([[1]], [1], logprobs=False)
    peer.close()


def shadowed(names: set[str]) -> set[str]:
    """Those that the standard library or an installed package has, and those that transformers looks for.

    The folder of a peer's script comes first on its sys.path, so a file there is imported in place of a package that is
    installed, or that transformers would otherwise find missing.
    """
    lookups = pathlib.Path(importlib.util.find_spec("transformers").origin).parent / "utils" / "import_utils.py"
    constants = {node.value for node in ast.walk(ast.parse(lookups.read_text())) if isinstance(node, ast.Constant)}
    return {name for name in names if name in sys.stdlib_module_names | constants or importlib.util.find_spec(name)}


def test_no_peer_script_shadows_a_package():
    names = {path.stem for path in PEER_SCRIPTS.iterdir() if path.name != "__pycache__"}
    assert len(names) > len(PEERS) and not shadowed(names)
    assert shadowed({"kernels", "json", "numpy", "peer_lines"}) == {"kernels", "json", "numpy"}


@pytest.mark.reference
@pytest.mark.parametrize("has_weights", [True, False])
@pytest.mark.parametrize("name", sorted(PEERS))
def test_the_script_of_an_installed_peer_measures(name, has_weights, folder, tmp_path, pytestconfig):
    """On a folder with weights, and on config.json alone, for which the peer makes them."""
    python = pytestconfig.getoption("peer_python")
    needed = [name, "gguf" if name == "llama_cpp" else "torch"]
    finds = f"import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, {needed})))"
    if subprocess.run([python, "-c", finds]).returncode:
        pytest.skip(f"{python} lacks one of {needed}: name an interpreter that has them, with --peer-python")
    bench.write_config(tmp_path, random_model(num_hidden_layers=1)[0])
    peer = bench.Peer(name, python, folder if has_weights else str(tmp_path), "float32", 1000, 256)
    try:
        late = bench.FirstToken(2, 10, 100, new_tokens=20, before=3)
        results = bench.measure([peer], [bench.Decode(2, 10, 5), bench.Group(2, 2, 20, 2, 4), late], repeats=1)
    finally:
        peer.close()
    measured = dict.fromkeys(result.workload.split()[0] for result in results)
    assert list(measured) == list(peer.workloads) and name in peer.versions


@pytest.mark.reference
def test_llama_cpp_computes_the_same_model(folder, llm, pytestconfig):
    """Its likeliest tokens, of the file that the peer writes for it, are ours; its cache holds float16."""
    python = pytestconfig.getoption("peer_python")
    if subprocess.run([python, "-c", "import gguf, llama_cpp"], capture_output=True).returncode:
        pytest.skip(f"{python} lacks llama_cpp or gguf: name an interpreter that has them, with --peer-python")
    prompts = [[(7 * i + 13 * p) % 1000 for i in range(20)] for p in range(8)]
    code = (
        "import json, sys, peer_llama_cpp as peer\n"
        "folder, prompts = json.load(sys.stdin)\n"
        "context = peer.open_context(peer.open_model(folder, 'float32'), len(prompts), 25)\n"
        "print(json.dumps(peer.complete(context, prompts, 5, peer.greedy)))"
    )
    given = json.dumps([folder, prompts])
    environment = {"PYTHONPATH": str(PEER_SCRIPTS)}
    found = subprocess.run([python, "-c", code], input=given, capture_output=True, text=True, env=environment)
    theirs = json.loads(found.stdout)
    greedy = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    assert sum(output.outputs[0].token_ids == own for output, own in zip(outputs, theirs, strict=True)) >= 7


@pytest.mark.reference
def test_torchs_attention_answers():
    """The peer of benchmarks/accelerator.py."""
    pytest.importorskip("torch", reason="needs torch")
    task = dict(sequences=2, context=40, chunk=3, heads=4, kv_heads=2, head_dim=8, dtype="float32", window=5)
    found = subprocess.run(
        [sys.executable, str(PEER_SCRIPTS / "peer_torch_attention.py")],
        input=json.dumps(task) + "\n",
        capture_output=True,
        text=True,
        check=True,
    )
    hello, answer = map(json.loads, found.stdout.splitlines())
    assert hello["device"] == "cpu" and answer["seconds"] > 0
