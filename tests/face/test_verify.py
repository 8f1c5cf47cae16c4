"""verify(): the checks hold on a sound engine, and name the axis, the token and the bits if pinning is taken out."""

import json

import numpy as np
import pytest
from conftest import make_llm, random_model

from benchmarks.plain_engine import plain
from jaxengine.command import main
from jaxengine.contract.verify import Axis, Outcome, verify
from jaxengine.engine.session import Session
from jaxengine.models import loading

AXES = {"C1", "C2", "C3", "C4", "C5", "C6", "C7", "C11", "drift"}


@pytest.fixture(scope="module")
def sound(tiny):
    return verify(tiny.session, quick=True, samples=12)


def test_a_sound_engine_holds(sound):
    assert sound and {check.axis for check in sound.checks} == AXES
    assert all(check.holds for check in sound.checks), str(sound)
    found = {check.what: check.found for check in sound.checks}
    assert found["temperature 0, 12 times among random traffic"] == "1 different of 12"
    assert "max |Δlogprob| 0.0, KL 0.0" in found["score against generate"]
    assert int(found["preempted and recomputed"].split(", ")[-1].split()[0]) > 0
    assert ", 0 tokens from the cache" not in found["hits on prompt pages"]


def test_its_forms(sound):
    assert str(sound).splitlines()[-1] == f"the contract holds: {len(sound.checks)} checks"
    assert json.loads(json.dumps(sound.to_json()))["holds"] is True
    page = sound._repr_html_()
    assert page.count("<tr>") == len(sound.checks) and "FAILS" not in page


def test_the_engine_is_as_before(tiny, sound):
    assert not tiny.engine.has_work and tiny.engine_config.overlap
    tiny.engine.scheduler.check_integrity()


@pytest.mark.slow
def test_taken_out_pinning_is_named():
    """The control of every axis: the engine with plain products in place of regions, and which axes then move bits."""
    with plain():
        llm = make_llm(*random_model("Qwen3", dtype="float32", num_hidden_layers=2), compile_patience=0, kernels="xla")
        found = verify(llm.session, quick=True, samples=24)
    failed = {check.axis: check.found for check in found.checks if not check.holds}
    assert {"C2", "C3", "C4", "C5", "C6", "C11"} <= failed.keys(), str(found)
    assert "first difference: sample " in failed["C2"] and "logprob bits" in failed["C2"]
    assert "the contract FAILS on C" in str(found) and "FAILS" in found._repr_html_()


def test_a_wrong_score_is_named(tiny, monkeypatch):
    score = Session.score

    def wrong(self, *given, **how):
        logprobs, entropies = score(self, *given, **how)
        return np.nextafter(logprobs, np.float32(0)), entropies

    monkeypatch.setattr(Session, "score", wrong)
    found = {check.axis: check for check in verify(tiny.session, quick=True, samples=4).checks}
    assert not found["C11"].holds and "first difference: sample 0, token 0" in found["C11"].found


def test_a_busy_engine_and_too_few_samples_are_refused(tiny):
    with pytest.raises(ValueError, match="samples must be at least 2"):
        tiny.verify(samples=1)
    stream = tiny.stream([1, 2, 3])
    next(stream)
    with pytest.raises(ValueError, match="requests under way"):
        tiny.verify(quick=True)
    stream.close()


@pytest.mark.parametrize("holds", [True, False])
def test_the_command(tmp_path, capsys, monkeypatch, holds):
    """What it prints, writes and exits with. The checks themselves are planted: they are tested above."""
    path, model = tmp_path / "verified.json", str(tmp_path / "model")
    loading.save(model, *random_model(num_hidden_layers=1))
    planted = Axis("C2", "planted", lambda: Outcome(holds, "2 different of 8"))
    monkeypatch.setattr("jaxengine.contract.verify._axes", lambda *given: [planted])
    options = ["--quick", "--samples=8", "--max-model-len=256", "--no-progress", f"--json={path}"]
    assert main.main(["verify", model, *options]) == (0 if holds else 1)
    assert ("the contract holds: 1 checks" if holds else "the contract FAILS on C2") in capsys.readouterr().out
    assert json.loads(path.read_text())["holds"] is holds
