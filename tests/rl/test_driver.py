"""What drives a run: it goes on to the same bits, evaluates, keeps, stops early, and heeds signals."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import run_script
from counting_loop import RECORDS, CountingLoop, Numbers, first_state, number_of
from test_trainer import ENGINE, WIDTH, even_share, make, problems, start

from checkpoints import snapshots
from jaxengine.rl.loops.data import FromIterator, InEpochs
from jaxengine.rl.loops.driver import learn
from jaxengine.rl.loops.history import Entry, History
from jaxengine.rl.loops.loop import Loop
from jaxengine.rl.loops.run_folder import RunFolder
from jaxengine.rl.loops.stopping import not_better

SETTINGS = dict(seed=1, rates=(0.5, 0.25))


def counting(**how) -> CountingLoop:
    return CountingLoop(InEpochs(RECORDS, 4), **how)


def evaluate(state) -> dict[str, float]:
    return {"score": number_of(state) % 11}


def in_history(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]


def test_a_run_goes_on_to_the_same_bits_and_history(tmp_path):
    """Sinks, the file and the evaluations of two parts are together those of the whole."""
    how = dict(evaluate=evaluate, evaluate_every=2)
    whole_sink, sink = [], []
    whole_folder = RunFolder(tmp_path / "whole", SETTINGS, every=2)
    whole = learn(counting(), first_state(), 7, folder=whole_folder, sinks=[lambda *x: whole_sink.append(x)], **how)
    for stop, ended_by in ((3, "stop"), (4, "stop"), (None, "iterations"), (None, "iterations")):
        folder = RunFolder(tmp_path / "parts", SETTINGS, every=2)
        parts = learn(counting(), first_state(), 7, folder=folder, stop=stop, sinks=[lambda *x: sink.append(x)], **how)
        assert parts.ended_by == ended_by and parts.is_over == (stop is None)
    assert whole.ended_by == "iterations" and int(parts.state.version) == 7
    np.testing.assert_array_equal(parts.state.master, whole.state.master)
    assert sink == whole_sink == [tuple(entry) for entry in whole.history.entries]
    assert in_history(tmp_path / "parts") == in_history(tmp_path / "whole") == whole.history.records
    assert [step for step, metrics in sink if "evaluation/score" in metrics] == [0, 2, 4, 6, 7]
    assert [step for step, metrics in sink if "reward" in metrics] == [1, 2, 3, 4, 5, 6, 7]
    assert snapshots.steps(tmp_path / "parts") == [6, 7]


KILLED = """
import os, signal, sys
from counting_loop import *
from test_driver import *
def kill(version):
    if version == 5:
        os.kill(os.getpid(), signal.SIGKILL)
loop = CountingLoop(FromIterator(Numbers(), 3), at=kill)
learn(loop, first_state(), 8, folder=RunFolder(sys.argv[1], SETTINGS, every=2), evaluate=evaluate)
"""


def test_a_killed_run_goes_on_with_the_same_data(tmp_path):
    """It is killed in the sixth iteration, two of which are after the newest snapshot; its iterator has moved on."""
    whole = learn(CountingLoop(FromIterator(Numbers(), 3)), first_state(), 8, evaluate=evaluate)
    here = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent), *sys.path])
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=os.environ | {"PYTHONPATH": here})
    assert killed.returncode == -signal.SIGKILL
    assert snapshots.steps(tmp_path) == [2, 4] and len(in_history(tmp_path)) == 1 + 5
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"version": 5, "rew')
    loop = CountingLoop(FromIterator(Numbers(), 3))
    parts = learn(loop, first_state(), 8, folder=RunFolder(tmp_path, SETTINGS, every=2), evaluate=evaluate)
    np.testing.assert_array_equal(parts.state.master, whole.state.master)
    assert parts.history.records == whole.history.records == in_history(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("position*")) == [
        "position_00000006.json",
        "position_00000008.json",
    ]


def test_problems_with_and_without_a_position_are_no_replacement_for_each_other(tmp_path):
    for name, given, others in (
        ("iterator", FromIterator(Numbers(), 4), InEpochs(RECORDS, 4)),
        ("records", InEpochs(RECORDS, 4), FromIterator(Numbers(), 4)),
    ):
        learn(CountingLoop(given), first_state(), 1, folder=RunFolder(tmp_path / name, SETTINGS))
        with pytest.raises(ValueError, match="position of its problems"):
            learn(CountingLoop(others), first_state(), 2, folder=RunFolder(tmp_path / name, SETTINGS))


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def number(request):
    """A signal that ends no process, but this test, where nothing notes it."""

    def unexpected(number: int, frame: object) -> None:
        pytest.fail(f"{signal.Signals(number).name} was not noted")

    before = signal.signal(request.param, unexpected)
    yield request.param
    assert signal.signal(request.param, before) is unexpected, "the handler of before has not come back"


def test_a_signal_ends_the_run_after_its_iteration(tmp_path, capsys, number):
    """What it would have evaluated is left for later."""
    loop = counting(at=lambda version: signal.raise_signal(number) if version == 1 else None)
    how = dict(evaluate=evaluate, evaluate_every=2)
    outcome = learn(loop, first_state(), 5, folder=RunFolder(tmp_path, SETTINGS), **how)
    assert outcome.ended_by == number.name and int(outcome.state.version) == 2 and snapshots.steps(tmp_path) == [2]
    assert f"{number.name}: this iteration ends first" in capsys.readouterr().err
    assert not outcome.history.has_evaluation(2)
    outcome = learn(counting(), first_state(), 5, folder=RunFolder(tmp_path, SETTINGS), **how)
    whole = learn(counting(), first_state(), 5, **how)
    assert number_of(outcome.state) == number_of(whole.state)
    assert outcome.history.records == whole.history.records


def test_a_second_signal_ends_at_once():
    def twice(version: int) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        learn(counting(at=twice), first_state(), 5)


def test_a_run_in_another_thread():
    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(learn(counting(), first_state(), 2)))
    thread.start()
    thread.join()
    assert outcomes[0].ended_by == "iterations"


def test_a_run_stops_early_where_it_would_have_without_a_stop(tmp_path):
    rewards = [0.1, 0.4, 0.3, 0.2, 0.4, 0.5, 0.5]
    how = dict(stop_when=not_better("reward", 3), evaluate=evaluate)
    for stop in (3, 4, None, None):  # the last has nothing left to do
        folder = RunFolder(tmp_path, SETTINGS)
        outcome = learn(counting(rewards=rewards), first_state(), 7, folder=folder, stop=stop, **how)
    assert outcome.ended_by == "stop_when" and int(outcome.state.version) == 5
    assert [entry.step for entry in outcome.history.entries if "evaluation/score" in entry.metrics] == [0, 5]


@pytest.mark.parametrize(
    "values, times, lower, stops",
    [
        ([0.5], 1, False, False),
        ([0.5, 0.5], 1, False, True),
        ([0.5, 0.6, 0.55, 0.58], 2, False, True),
        ([0.5, 0.6, 0.55, 0.61], 2, False, False),
        ([0.5, 0.4, 0.3], 2, True, False),
        ([0.3, 0.4, 0.5], 2, True, True),
        ([0.5, math.nan], 1, False, True),
        ([math.nan, 0.1], 1, False, False),
    ],
)
def test_not_better(values, times, lower, stops):
    history = [Entry(2 * i, {"evaluation/score": x}) for i, x in enumerate(values)] + [Entry(1, {"reward": 9.0})]
    assert not_better("evaluation/score", times, lower_is_better=lower)(history) is stops


def test_a_metric_that_never_comes_is_named():
    with pytest.raises(ValueError, match="no metric 'rewards' .*did you mean 'reward'"):
        learn(counting(), first_state(), 3, stop_when=not_better("rewards", 2))


def test_a_folder_of_another_run_is_refused(tmp_path):
    RunFolder(tmp_path / "new", dict(seed=1, rate=0.25))
    RunFolder(tmp_path / "new", dict(seed=1, rate=0.25))
    for others in (dict(seed=2, rate=0.5), dict(rate=0.25), dict(seed=1, rate=0.25, more=3)):
        with pytest.raises(ValueError, match="belongs to another run: .* there, .* given"):
            RunFolder(tmp_path / "new", others)
    with pytest.raises(ValueError, match=r"seed=1 there, 2 given; rate=0.25 there, 0.5 given"):
        RunFolder(tmp_path / "new", dict(seed=2, rate=0.5))


def test_a_setting_that_is_newer_than_the_folder(tmp_path):
    """A run without its name is one that had the value of before, and no other."""
    RunFolder(tmp_path, dict(seed=1))
    for more in (dict(refill=2), dict(refill=0, rate=0.5)):
        with pytest.raises(ValueError, match="belongs to another run"):
            RunFolder(tmp_path, dict(seed=1) | more, added=dict(refill=0))
    RunFolder(tmp_path, dict(seed=1, refill=0), added=dict(refill=0))
    assert json.loads((tmp_path / "run.json").read_text()) == dict(seed=1, refill=0)
    with pytest.raises(ValueError, match="refill=0 there, 2 given"):
        RunFolder(tmp_path, dict(seed=1, refill=2), added=dict(refill=2))


def test_a_second_process_in_the_folder_is_refused(tmp_path):
    """It names the first and changes nothing there; afterwards it may, in this process and in another."""
    told = []

    def ask(version: int) -> None:
        if version == 2:
            told.append(run_script("rl/second_process.py", str(tmp_path)))

    first = learn(counting(at=ask), first_state(), 3, folder=RunFolder(tmp_path, SETTINGS, every=1))
    assert len(told) == 1 and f"{tmp_path} is in use by process {os.getpid()} " in told[0]["error"]
    assert in_history(tmp_path) == first.history.records and snapshots.steps(tmp_path) == [2, 3]
    assert learn(counting(), first_state(), 4, folder=RunFolder(tmp_path, SETTINGS)).ended_by == "iterations"
    assert run_script("rl/second_process.py", str(tmp_path)) == {"version": 9}


def test_a_run_that_fails_lets_go_of_its_folder(tmp_path):
    def fail(version: int) -> None:
        assert version < 1, "stand-in"

    with pytest.raises(AssertionError, match="stand-in") as failed:  # it keeps the frames of the run
        learn(counting(at=fail), first_state(), 3, folder=RunFolder(tmp_path, SETTINGS))
    assert learn(counting(), first_state(), 3, folder=RunFolder(tmp_path, SETTINGS)).is_over and failed


def test_snapshots_are_shown_to_a_hook(tmp_path):
    seen = []
    folder = RunFolder(tmp_path, SETTINGS, every=2, keep=1, on_snapshot=lambda state, path: seen.append((state, path)))
    learn(counting(), first_state(), 5, folder=folder)
    assert [(int(state.version), path.name) for state, path in seen] == [
        (2, "step_00000002"),
        (4, "step_00000004"),
        (5, "step_00000005"),
    ]
    assert snapshots.steps(tmp_path) == [5]


def test_an_evaluation_that_is_missing_is_named():
    with pytest.raises(ValueError, match="evaluate_every=5 needs evaluate"):
        learn(counting(), first_state(), 5, evaluate_every=5)


def test_what_was_measured_after_a_snapshot_leaves_the_file(tmp_path):
    path, (_, iteration) = tmp_path / "history.jsonl", counting().iterate(first_state())
    history, fields = History(path), dataclasses.asdict(iteration)
    for record in ({"version": 0, "evaluation": {"x": 1.0}}, fields, {"version": 1, "evaluation": {"x": 2.0}}):
        history.add(record)
    history.add(fields | {"version": 1})
    with path.open("a") as file:
        file.write('{"version": 2, "rew')
    assert [entry.step for entry in History.kept(path, 1).entries] == [0, 1, 1]
    assert (
        History.kept(path, 0).entries == [Entry(0, {"evaluation/x": 1.0})]
        and in_history(tmp_path) == history.records[:1]
    )


def test_a_model_goes_on_to_the_same_bits(tmp_path):
    trainer = make(epochs=2, mini_batches=2, micro_batches=2)
    loop = Loop(
        trainer, InEpochs([pair for i in range(3) for pair in problems(i)], 4), even_share, WIDTH, engine=ENGINE
    )
    whole = learn(loop, start(trainer), 2)
    for stop in (1, None):
        parts = learn(loop, start(trainer), 2, folder=RunFolder(tmp_path, {}), stop=stop)
    jax.tree.map(np.testing.assert_array_equal, parts.state, whole.state)
    assert all(entry.metrics["kl_first"] == 0 for entry in whole.history.entries)
