"""The curves of learning that are committed: how they are made, and that they are there."""

import dataclasses
import json

import pytest

from benchmarks import learning_curves


@pytest.mark.slow  # .ci/run has what draws there
def test_a_comparison_runs_goes_on_and_draws_with_weights_of_before(monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="pip install -e '.[notebooks]' brings what draws")
    pyplot.switch_backend("agg")

    def arms():
        (one,) = [arm for arm in learning_curves.stale() if arm.name == "lag 2, clipped"]
        run = dataclasses.replace(one.run, iterations=3, prompts=4, rate=1e-3, warm_up=0)
        for lag in 0, 2:
            yield one._replace(name=f"lag {lag}", run=run, lag=lag)

    monkeypatch.setattr(learning_curves, "RESULTS", tmp_path)
    monkeypatch.setattr(learning_curves, "SEEDS", (0,))
    monkeypatch.setattr(learning_curves, "COMPARISONS", {"small": arms})
    fresh, late = learning_curves.curves("small")
    assert fresh["steps"] == late["steps"] == [0, 3]
    assert len(fresh["reward"]) == len(late["reward"]) == 3
    # The first iteration is the same; then one learns from samples of the weights that began, which are further away.
    assert fresh["reward"][0] == late["reward"][0] and fresh["kl"][0] == late["kl"][0]
    assert late["kl"] != fresh["kl"]
    kept = (tmp_path / "small.jsonl").read_text()
    assert [json.loads(line) for line in kept.splitlines()] == [fresh, late]
    monkeypatch.setattr(learning_curves, "build", None)  # a second command builds nothing
    assert learning_curves.curves("small") == [fresh, late]
    learning_curves.draw([fresh, late], tmp_path / "small.png")
    assert (tmp_path / "small.png").stat().st_size > 10_000
    assert "| lag 2 |" in learning_curves.table([fresh, late])


@pytest.mark.parametrize("name", ["algorithms", "stale", "rates"])
def test_what_is_committed_is_whole(name):
    lines = (learning_curves.RESULTS / f"{name}.jsonl").read_text().splitlines()
    found = [(each["name"], each["seed"]) for each in map(json.loads, lines)]
    wanted = [(arm.name, seed) for arm in learning_curves.COMPARISONS[name]() for seed in learning_curves.SEEDS]
    assert sorted(found) == sorted(wanted)
    assert (learning_curves.RESULTS / f"{name}.png").exists()
