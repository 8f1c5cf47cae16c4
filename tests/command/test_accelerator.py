"""benchmarks/accelerator.py on a CPU: all stages run with tiny shapes, none takes another with it, checks can fail."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import matmul
from pallas_kernels.cases.matmul import MatmulCase
from pallas_kernels.implementations import choose
from pallas_kernels.matmul_reference import plain

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
HEAD = "from accelerator_stages.measurement import Measurement\n"
PLANTED = {
    "sound": "def measurements(_): return [Measurement('a', lambda: [{'µs': 1.5, 'holds': True}])]",
    "fails": "def measurements(_): return [Measurement('b', lambda: 1 / 0), Measurement('c', lambda: [{'x': 2}])]",
    "wrong": "def measurements(_): return [Measurement('d', lambda: [{'holds': False}])]",
    "broken": "raise ImportError('planted')",
    "crashes": """
import os, signal
def crash():
    yield {'x': 3}
    os.kill(os.getpid(), signal.SIGSEGV)
def measurements(_): return [Measurement('e', crash), Measurement('f', lambda: [{'x': 4}])]""",
    "hangs": """
import threading
wait = threading.Event().wait
def measurements(_): return [Measurement('g', wait), Measurement('h', lambda: [{'x': 5}])]""",
}


@pytest.fixture
def stages(monkeypatch):
    """What the benchmark imports, importable."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from accelerator_stages import supervise

    return supervise


@pytest.fixture
def planted(stages, monkeypatch, tmp_path):
    """Stages without jax, of which some go wrong, and their settings."""
    from accelerator_stages.measurement import Settings

    for name, text in PLANTED.items():
        (tmp_path / f"planted_{name}.py").write_text(HEAD + text)
    (tmp_path / "stages").mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    listed = [stages.Stage(name, name.title(), f"planted_{name}", 1, 0.01) for name in PLANTED]
    return listed, Settings(True, "", str(tmp_path))


def run(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "accelerator.py"), *words]
    return subprocess.run(command, capture_output=True, text=True)


def results(folder: Path) -> dict[str, list[dict]]:
    """The rows of each stage of a run in which all went well."""
    found = run("--minutes=600", f"--out={folder}", "--torch-python=no-such-interpreter")
    text = (folder / "results.md").read_text()
    assert found.returncode == 0, f"{found.stdout}\n{found.stderr}\n{text}"
    stages = json.loads((folder / "results.json").read_text())["stages"]
    assert "FAILS" not in text and all(f"## {stage['title']} (" in text for stage in stages)
    rows = {stage["name"]: stage["rows"] for stage in stages}
    assert not [row for each in rows.values() for row in each if "skipped" in row.get("note", "")]
    return rows


@pytest.mark.slow
def test_every_stage_gives_its_results(tmp_path):
    rows = results(tmp_path)
    assert len(rows) == 11
    assert [row["is"] for row in rows["machine"] if row["what"] == "device"] == ["cpu", "1 of cpu"]
    for name in ("row-tiles", "captured", "kernels", "contract"):
        assert [row["holds"] for row in rows[name] if "holds" in row], f"{name} checks nothing"
    assert {row["axis"] for row in rows["contract"] if "axis" in row} >= {f"C{i}" for i in (1, 2, 3, 4, 5, 6, 7, 11)}
    assert rows["decode-8b"][0]["µs"] > 0 and "does not fit" in rows["decode-8b"][-1]["note"]
    assert rows["trace"][0]["calls"] > 1
    assert rows["prefill"][0]["share of peak"] > 0 and rows["decode-0.6b"][0]["tokens/s"] > 0
    assert "not there: " in rows["beside-xla"][0]["note"] and rows["beside-xla"][1]["times as fast as XLA"] > 0
    assert {row["system"] for row in rows["beside-transformers"]} == {"jaxengine"}


@pytest.mark.reference
def test_torch_is_measured_where_it_is(tmp_path):
    pytest.importorskip("torch", reason="needs torch")
    assert run("--minutes=600", f"--out={tmp_path}", "--only", "beside-xla", "beside-transformers").returncode == 0
    text = (tmp_path / "results.md").read_text()
    assert "| transformers |" in text and "times as fast as torch" in text


def test_no_stage_takes_another_with_it(planted, stages, tmp_path):
    from accelerator_stages.report import gather

    listed, settings = planted
    seconds = stages.run_all(listed, settings, 600, lambda seconds: None)
    report = gather(listed, settings, {"commit": "abc"}, seconds)
    report.write(tmp_path)
    rows = {stage["name"]: stage["rows"] for stage in json.loads((tmp_path / "results.json").read_text())["stages"]}
    assert rows["sound"] == [{"what": "a", "µs": 1.5, "holds": True}]
    assert rows["fails"] == [
        {"what": "b", "note": "failed: ZeroDivisionError: division by zero"},
        {"what": "c", "x": 2},
    ]
    assert rows["broken"][0]["note"].startswith("ended: the process ended with code 1") and len(rows["broken"]) == 1
    assert [row.get("x") for row in rows["crashes"]] == [3, None, 4] and "SIGSEGV" in rows["crashes"][1]["note"]
    assert rows["hangs"][0]["note"].startswith("cut: nothing came for") and rows["hangs"][1] == {"what": "h", "x": 5}
    assert report.failed == ["d"] and report.broken == ["b", "broken", "e", "g"]
    text = (tmp_path / "results.md").read_text()
    assert "- checks: 2, failed: d; ended in an error: b, broken, e, g" in text and "| d | **FAILS** |" in text


def test_what_has_no_time_is_named(planted, stages):
    from accelerator_stages.report import gather

    listed, settings = planted
    stages.run_all(listed[:2], settings, 0, lambda seconds: None)
    for stage in gather(listed[:2], settings, {}, {}).stages:
        assert stage["rows"] == [{"what": stage["name"], "note": "skipped: for time"}]


def test_a_run_that_is_cut_leaves_what_it_had(planted, stages):
    """In the middle of the stage that hangs, whose process ends too."""
    from accelerator_stages.events import read, under_way
    from accelerator_stages.report import gather

    listed, settings = [planted[0][0], planted[0][-1]], planted[1]

    def looked(seconds: dict[str, float]) -> None:
        gather(listed, settings, {}, seconds).write(Path(settings.folder))
        if under_way(read(stages.events_file(listed[1], settings))):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run_all(listed, settings, 600, looked)
    written = json.loads((Path(settings.folder) / "results.json").read_text())["stages"]
    assert written[0]["rows"] == [{"what": "a", "µs": 1.5, "holds": True}]
    file = stages.events_file(listed[1], settings)
    with file.open("a") as lines:
        lines.write('{"event": "row", "na')
    assert under_way(read(file)) == "g", "a line that was cut off hides the others"


def test_other_bits_fail(stages, monkeypatch):
    """Checks of one row's bits, on a product that depends on the number of rows."""
    from accelerator_stages import kernel_bits, row_tiles

    def planted(x, w, bias, residual, sizes, out_dtype):
        return plain(x, w, bias, residual) * (1 + 2.0**-20 * x.shape[0])

    monkeypatch.setitem(matmul.BODIES, "pallas_interpret", matmul.each_leaf(planted))
    (row,) = kernel_bits.check(MatmulCase(9, 64, 32), choose("pallas_interpret"))
    assert row["holds"] is False and row["parts as in the batch"] == "0 of 3"
    off = jax.jit(lambda x, w: planted(x, w[None], None, None, None, None))
    exact = jax.jit(lambda x, w: jnp.repeat(plain(x[-1:], w[None], None, None), len(x), axis=0))
    case = dataclasses.replace(MatmulCase(9, 64, 32), dtype="float32")
    assert [is_same for _, is_same in row_tiles.compared(case, {16: exact, 64: exact}, True)] == [True, True]
    assert [is_same for _, is_same in row_tiles.compared(case, {16: exact, 64: off}, True)] == [True, False]
