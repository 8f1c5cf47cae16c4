"""The command that teaches calc: it prints the same in another process, and after a stop half way."""

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest

from checkpoints import snapshots
from jaxengine.rl.calc import learn
from jaxengine.rl.calc.arithmetic import is_held_out
from jaxengine.rl.calc.run import ADDED, Run, problems
from jaxengine.rl.loops.run_folder import RunFolder

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


def test_further_problems_are_a_function_of_iteration_and_round():
    run = Run(prompts=20, refill=2)
    drawn = {(i, r): problems(run, i, r) for i in (0, 1) for r in (0, 1, 2)}
    assert problems(run, 1, 2) == drawn[1, 2] and problems(run, 1) == drawn[1, 0]
    assert len({tuple(prompt for prompt, _ in pairs) for pairs in drawn.values()}) == 6
    assert not any(is_held_out(prompt) for pairs in drawn.values() for prompt, _ in pairs)


def test_flags_are_what_the_loop_does(monkeypatch):
    for flags, refill in (([], 0), (["--refill", "2", "--mask-truncated"], 2)):
        monkeypatch.setattr(sys, "argv", ["learn", *flags])
        run = learn.settings(learn._arguments())
        loop, _ = learn.build(run)
        assert loop.refill == refill and loop.trainer.config.mask_truncated == bool(flags)
        assert loop.further is not None and loop.further(3, 1) == problems(run, 3, 1)


def test_a_run_of_before_a_setting_goes_on(tmp_path):
    earlier = {name: value for name, value in dataclasses.asdict(Run()).items() if name not in ADDED}
    (tmp_path / "run.json").write_text(json.dumps(earlier))
    with pytest.raises(ValueError, match="refill=0 there, 1 given"):
        RunFolder(tmp_path, dataclasses.asdict(Run(refill=1)), added=ADDED)
    RunFolder(tmp_path, dataclasses.asdict(Run()), added=ADDED)


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
        (dict(prompts=5, samples=3, mini_batches=2), "5 · 3 = 15 samples are no multiple of mini_batches"),
        (dict(iterations=0), "iterations must be at least 1, got 0"),
        (dict(refill=-1), "refill must be at least 0, got -1"),
        (dict(rate=float("nan")), "rate must be at least 0.0, got nan"),
    ],
)
def test_a_run_without_problems_is_refused(change, error):
    with pytest.raises(ValueError, match=error):
        learn.build(Run(**change))


def test_the_rate_rises_and_falls():
    run = Run(iterations=10, warm_up=2, mini_batches=2, rate=1.0)
    state, sizes = learn.optimizer(run).init(np.ones(1, np.float32)), []
    for _ in range(20):
        change, state = learn.optimizer(run).update(np.full(1, 0.5, np.float32), state)
        sizes.append(-float(change[0]))
    assert sizes[0] == pytest.approx(1 / 5, rel=1e-3) and 0 < sizes[-1] < 0.1
    assert max(sizes) == pytest.approx(1, rel=1e-3) and sizes.index(max(sizes)) == 4


def test_a_short_run_reaches_its_rate():
    run = Run(iterations=4, warm_up=5, rate=1.0)
    state, sizes = learn.optimizer(run).init(np.ones(1, np.float32)), []
    for _ in range(4):
        change, state = learn.optimizer(run).update(np.full(1, 0.5, np.float32), state)
        sizes.append(-float(change[0]))
    np.testing.assert_allclose(sizes, [0.5, 1, 2 / 3, 1 / 3], rtol=1e-3)


def test_help_shows_what_each_setting_means_and_its_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["learn", "--help"])
    with pytest.raises(SystemExit):
        learn.main()
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Run):
        assert f"{field.metadata['help']} (default: {field.default})" in shown
    assert "iterations between snapshots (default: 20)" in shown


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
    for iteration, expected in zip(after, history, strict=True):  # the resumed run's file is whole too
        assert without_seconds(iteration) == without_seconds(expected)
    for iteration in history:
        first = iteration["updates"][0]
        assert first["ratio_mean"] == first["ratio_max"] == 1
        assert first["clip_rate"] == first["kl"] == first["max_delta"] == 0


INTERRUPTED = """
import os, signal, sys
from jaxengine.rl.calc import learn
from jaxengine.rl.loops.loop import Loop
learn.HELD_OUT_PROBLEMS, iterate = 50, Loop.iterate
def interrupted(self, state):
    if int(state.version) == 1:
        os.kill(os.getpid(), signal.SIGINT)
    return iterate(self, state)
Loop.iterate = interrupted
learn.main()
"""


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_done(tmp_path, monkeypatch, capsys):
    """It comes in the second of three iterations, which ends and is kept, though snapshots are due every 20."""
    folder, file = tmp_path / "run", tmp_path / "run.json"
    arguments = [*SMALL[:-1], "20", "--snapshots", str(folder), "--json", str(file)]
    stopped = subprocess.run([sys.executable, "-c", INTERRUPTED, *arguments], capture_output=True, text=True)
    assert stopped.returncode == 130, stopped.stderr
    assert "this iteration ends first; once more ends at once" in stopped.stderr
    assert f"stopped by Ctrl-C after iteration 2 of 3\nkept in {folder}" in stopped.stdout
    before = json.loads(file.read_text())
    assert [iteration["version"] for iteration in before] == [0, 1] and snapshots.steps(folder) == [2]
    with (folder / "history.jsonl").open("a") as lines:
        lines.write('{"version": 2, "rew')  # of a process that died
    monkeypatch.setattr(learn, "HELD_OUT_PROBLEMS", 50)
    monkeypatch.setattr(sys, "argv", ["learn", *arguments])
    learn.main()
    printed = capsys.readouterr()
    assert f"goes on after iteration 2 of 3, from {folder}" in printed.out and "3/3" in printed.err
    after = json.loads(file.read_text())
    assert after[:2] == before and [iteration["version"] for iteration in after] == [0, 1, 2]
    assert len((folder / "history.jsonl").read_text().splitlines()) == 3 + 2  # evaluated before and after
