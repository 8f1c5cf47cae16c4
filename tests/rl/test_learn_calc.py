"""The command that teaches calc: it prints the same in another process, and after a stop half way."""

import json
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from jaxengine.rl.calc import learn
from jaxengine.rl.calc.arithmetic import is_held_out
from jaxengine.rl.calc.run import Run, problems

SMALL = "--iterations 3 --prompts 8 --samples 4 --epochs 2 --mini-batches 2 --digits 1 --every 1".split()
FEW_HELD_OUT = "from jaxengine.rl.calc import learn; learn.HELD_OUT_PROBLEMS = 50; learn.main()"


def test_problems_are_other_ones_each_iteration_and_never_held_out():
    run = Run(prompts=50, digits=2)
    first, second = problems(run, 0), problems(run, 1)
    assert first == problems(run, 0) != second and len(first) == 50
    for prompt, problem in first + second:
        assert prompt == problem.prompt and not is_held_out(prompt) and not re.search(r"\d{3}", prompt)
    longest = [problem for i in range(40) for problem in problems(Run(), i)]
    assert max(len(prompt) for prompt, _ in longest) == learn.LONGEST_PROMPT
    assert max(len(problem.answer) for _, problem in longest) < learn.LONGEST_ANSWER  # the end token is one more


def test_problems_are_of_the_kinds_asked_for():
    run = Run(prompts=50, digits=2, kinds="sum product")
    assert {problem.kind for _, problem in problems(run, 0)} == {"sum", "product"}


@pytest.mark.parametrize(
    "change, error",
    [
        (
            dict(kinds="sums"),
            r"kinds must be some of sum, difference, product, mixed, with spaces between them, got 'sums'",
        ),
        (dict(kinds=""), "kinds must be some of"),
        (dict(kinds="sum", digits=1), "only mixed problems are held out"),
    ],
)
def test_a_run_without_problems_is_refused(change, error):
    with pytest.raises(ValueError, match=error):
        learn.build(Run(**change))


def test_a_folder_of_another_run_is_refused(tmp_path):
    learn.claim(tmp_path / "new", Run(seed=1))
    learn.claim(tmp_path / "new", Run(seed=1))
    with pytest.raises(
        ValueError, match=r"belongs to another run: rate=.* there, 0.5 given; seed=1 there, 2 given\. Give the same"
    ):
        learn.claim(tmp_path / "new", Run(seed=2, rate=0.5))


def test_the_rate_rises_and_falls():
    run = Run(iterations=10, warm_up=2, mini_batches=2, rate=1.0)
    state, sizes = learn.optimizer(run).init(np.ones(1, np.float32)), []
    for _ in range(20):
        change, state = learn.optimizer(run).update(np.full(1, 0.5, np.float32), state)
        sizes.append(-float(change[0]))
    assert sizes[0] == 0 and 0 < sizes[-1] < 0.1
    assert max(sizes) == pytest.approx(1, rel=1e-3) and sizes.index(max(sizes)) == 4


def without_seconds(iteration: dict) -> dict:
    return {name: value for name, value in iteration.items() if name not in ("generating", "learning")}


@pytest.mark.parametrize(
    "algorithm", [pytest.param("grpo", marks=pytest.mark.slow), pytest.param("ppo", marks=pytest.mark.long)]
)
def test_the_same_bits_in_another_process_and_after_a_stop(tmp_path, monkeypatch, capsys, algorithm):
    def other_process(arguments: list[str]) -> str:
        command = [sys.executable, "-c", FEW_HELD_OUT, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def here(arguments: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["learn", *arguments])
        learn.main()
        return capsys.readouterr().out

    def command(run: Callable[[list[str]], str], name: str, folder: str, *more: str) -> tuple[str, list[dict]]:
        file = tmp_path / f"{name}.json"
        options = ["--algorithm", algorithm, "--snapshots", str(tmp_path / folder), "--json", str(file)]
        printed = run([*SMALL, *options, *more])
        digest = re.search(r"weights \w{16}, state \w{16}", printed)
        assert digest is not None, printed
        return digest[0], json.loads(file.read_text())

    monkeypatch.setattr(learn, "HELD_OUT_PROBLEMS", 50)
    whole, history = command(other_process, "whole", "one")
    _, before = command(here, "stopped", "other", "--stop", "1")
    resumed, after = command(here, "resumed", "other")
    assert resumed == whole
    assert len(before) == 1 and len(history) == 3
    for iteration, expected in zip(before + after, history, strict=True):
        assert without_seconds(iteration) == without_seconds(expected)
    for iteration in history:
        first = iteration["updates"][0]
        assert first["ratio_mean"] == first["ratio_max"] == 1
        assert first["clip_rate"] == first["kl"] == first["max_delta"] == 0
