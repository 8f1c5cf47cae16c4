"""benchmarks/scaling.py: which figures of the bench's files make a line."""

import dataclasses

import pytest

from benchmarks import scaling
from jaxengine.command.bench import Decode, Group, Result

DECODE, CONTEXT, GROUPS, CORES = scaling.PANELS


def result(workload, system: str, *rates: float | None) -> dict:
    settings = {"kind": workload.kind} | dataclasses.asdict(workload)
    return dataclasses.asdict(Result(str(workload), settings, system, "tok/s", list(rates), 0, None))


def file(threads: int, *results: dict) -> dict:
    return {"machine": {"threads": threads}, "results": list(results)}


FILES = [
    file(2, result(Decode(1), "a", 10.0, 30.0), result(Decode(8), "a", 60.0), result(Decode(8), "b", 90.0)),
    file(2, result(Decode(1), "a", 14.0, None), result(Decode(8, 1024), "a", 50.0), result(Decode(8, 4096), "a", 40.0)),
    file(1, result(Decode(8), "a", 35.0)),
    file(2, result(Group(4, 1), "a", 5.0), result(Group(4, 16), "a", 9.0), result(Group(8, 8), "a", 7.0)),
]
POINTS = scaling.measured(FILES)


@pytest.mark.parametrize(
    "panel, fixed, lines",
    [
        (CONTEXT, {"batch": 8, "threads": 2}, {"a": [(128, 60.0), (1024, 50.0), (4096, 40.0)], "b": [(128, 90.0)]}),
        (GROUPS, {"prompts": 4, "threads": 2}, {"a": [(1, 5.0), (16, 9.0)]}),
        (CORES, {"batch": 8, "prompt_tokens": 128}, {"a": [(1, 35.0), (2, 60.0)], "b": [(2, 90.0)]}),
        (DECODE, {"prompt_tokens": 128, "threads": 2}, {"a": [(1, 14.0), (8, 60.0)], "b": [(8, 90.0)]}),
    ],
)
def test_a_line_differs_in_its_x_alone_and_joins_the_runs_of_all_files(panel, fixed, lines):
    assert scaling.lines(panel, POINTS) == (fixed, lines)


def test_a_workload_that_no_file_has_is_named():
    with pytest.raises(ValueError, match="no file has a result of the workload 'group'"):
        scaling.lines(GROUPS, scaling.measured(FILES[:3]))


def test_figures_in_seconds_are_left_out():
    slow = result(Decode(1), "a", 99.0) | {"figure": "s to the first token"}
    assert scaling.measured([file(2, slow)]) == []


def test_the_same_figures_draw_the_same_file(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra notebooks")
    for name in ("one.svg", "two.svg"):
        scaling.draw(POINTS, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
