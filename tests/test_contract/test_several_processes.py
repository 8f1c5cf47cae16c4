"""C10: several processes with one device each have the bits of one, and none waits for one that is gone or astray."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import NATIVE

from jaxengine.engine.lockstep import EXIT_CODE

HERE = pathlib.Path(__file__).parent
LIMIT = 600  # seconds for processes that compile on a busy machine
SOON = 40  # seconds from a trouble to the end of all: the timeout of 5, twice the grace, and room

pytestmark = NATIVE


def start(count: int, *words: str) -> list[subprocess.Popen]:
    """The processes of one job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE.parent)))}

    def one(index: int) -> subprocess.Popen:
        line = [sys.executable, str(HERE / "one_of_processes.py"), *map(str, (count, index, port)), *words]
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)

    return [one(index) for index in range(count)]


def ended(processes: list[subprocess.Popen], limit: float) -> list[tuple[str, str]]:
    """What each printed; all are gone afterwards."""
    try:
        return [process.communicate(timeout=limit) for process in processes]
    finally:
        for process in processes:
            process.kill()


def answers(count: int, dtype: str, kind: str = "bits") -> list[dict]:
    """Of each process."""
    processes = start(count, kind, dtype)
    printed = ended(processes, LIMIT)
    assert [process.returncode for process in processes] == [0] * count, printed
    return [json.loads(out.splitlines()[-1])[dtype] for out, _ in printed]


@pytest.mark.parametrize(
    ("dtype", "count"),
    [
        pytest.param("float32", 2, marks=pytest.mark.slow),
        pytest.param("float32", 4, marks=pytest.mark.long),
        pytest.param("bfloat16", 2, marks=pytest.mark.long),
        pytest.param("bfloat16", 4, marks=pytest.mark.long),
    ],
)
def test_bits_of_one(dtype, count):
    (one,) = answers(1, dtype)
    assert one["equal"] and answers(count, dtype) == [one] * count


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.long)])
def test_replicas_of_several_processes_have_the_bits_of_one(count):
    """Each half of the processes has a replica; every process returns what all replicas answered."""
    (one,) = answers(1, "float32")
    assert answers(count, "float32", "replicas") == [one] * count


@pytest.mark.slow
def test_verify_names_the_processes():
    for out, err in ended(start(2, "verified"), LIMIT):
        *_, axes, holds = out.splitlines()
        assert (json.loads(axes), holds) == ({"C9": True, "C10": True}, "True"), err


TOLD = {
    "killed": "",  # the collective operation breaks, or the other is silent: whichever is first
    "stopped": "process 1 showed no sign of life",
    "fails": "process 1 failed with OSError: a planted failure",
    "corrupted": "differs between processes",
    "other key": "differs between processes",
}


IN_CI = "killed", "corrupted"


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in IN_CI else pytest.mark.long) for kind in TOLD]
)
def test_trouble_in_one_ends_all(kind):
    processes = start(2, kind)
    try:
        for process in processes:
            assert any(line == "ready\n" for line in process.stdout), process.stderr.read()
        begun = time.monotonic()
        if kind == "stopped":
            ((out, err),) = ended(processes[:1], SOON)
            processes[1].send_signal(signal.SIGKILL)
        else:
            (out, err), *_ = ended(processes, SOON)
        print(f"{kind}: {time.monotonic() - begun:.1f} s\n{err}")
    finally:
        for process in processes:
            process.kill()
    assert "returned" not in out and TOLD[kind] in err
    assert processes[0].returncode not in (0, None)
    if TOLD[kind] == "differs between processes":
        assert processes[0].returncode == EXIT_CODE and "process 0: " in err and "process 1: " in err
