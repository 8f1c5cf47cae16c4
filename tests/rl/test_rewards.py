"""Rewards: values in order, and a failure of any kind is that of one sample."""

import importlib.util
import os
import signal
import threading
import time
from pathlib import Path

import bad_rewards
import numpy as np
import pytest

from jaxengine.outputs import CompletionOutput, RequestOutput
from jaxengine.rl.rewards import (
    Isolated,
    ProgramLimits,
    Rewards,
    compute_rewards,
    exact_match,
    judging,
    math_equivalence,
    python_program,
    regular_expression,
)


def outputs(*texts: list[str], finish_reason: str = "stop") -> list[RequestOutput]:
    requests = []
    for i, completions in enumerate(texts):
        samples = [
            CompletionOutput(j, text, [1], np.zeros(1, np.float32), finish_reason, None, [])
            for j, text in enumerate(completions)
        ]
        requests.append(RequestOutput(str(i), f"prompt {i}", [1], samples, True))
    return requests


def judge(reward, texts: list[str], answer="four", **how) -> Rewards:
    return compute_rewards(outputs(texts), [answer], reward, **how)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    """Whether a process that was killed ends within a minute. It is no child, so that it cannot be waited for."""
    deadline = time.monotonic() + 60
    while alive(pid) and time.monotonic() < deadline:
        os.sched_yield()
    return not alive(pid)


# -- what is computed --------------------------------------------------------------------------------------------------


def test_samples_are_judged_in_order_and_in_parallel():
    together = threading.Barrier(3, timeout=60)  # breaks unless three rewards run at the same time

    def reward(prompt, completion, answer):
        if completion in "abc":
            together.wait()
        time.sleep(0.02 if completion == "a" else 0)
        return float(f"{prompt[-1]}{answer}{'abcdef'.index(completion)}")

    judged = compute_rewards(outputs(["a", "b", "c"], [], ["d", "e"]), ["1", "2", "3"], reward, workers=3)
    assert (
        judged.values.tolist() == [10, 11, 12, 233, 234] and judged.values.dtype == np.float32 and not judged.failures
    )


def test_exact_match():
    assert judge(exact_match, ["42", " 42\n", "4 2", "", "421"], 42).values.tolist() == [1, 1, 0, 0, 0]


def test_regular_expression():
    reward = regular_expression(r"#### *(-?\d+)")
    assert judge(reward, ["#### 7 no, #### 8", "#### 8, #### 7", "8", "####8\n"], 8).values.tolist() == [1, 0, 0, 1]
    assert judge(regular_expression("<b>.*</b>"), ["a <b>c</b>", "<b>"]).values.tolist() == [1, 0]
    with pytest.raises(ValueError, match="is no regular expression: missing"):
        regular_expression("(")


def test_a_regular_expression_without_end_fails_alone():
    judged = judge(regular_expression("(?:a+)+$"), ["aaa", "a" * 64 + "!", "aa"], timeout=1.0)
    assert judged.values.tolist() == [1, 0, 1] and judged.failures == {
        1: "matches: TimeoutError: the reward took longer than 1 s"
    }


# -- rewards that go wrong ---------------------------------------------------------------------------------------------

FAILURES = {
    "raise": "KeyError: 'no such luck'",
    "exit": "3",
    "none": "ValueError: a reward must be a finite number, got None",
    "nan": "got nan",
    "text": "got '1.0'",
    "hang": "TimeoutError: the reward took longer than 1 s",
}
ALONE = {"die": "ended with SIGSEGV", "busy": "took longer than 1 s", "memory": "MemoryError"}


@pytest.mark.parametrize("isolated", [False, True], ids=["thread", "process"])
def test_a_reward_that_goes_wrong_fails_one_sample(isolated):
    reward = Isolated(bad_rewards.by_completion, more=0.5) if isolated else bad_rewards.by_completion
    expected = FAILURES | (ALONE if isolated else {})
    texts = [text for bad in expected for text in ("good", bad)]
    judged = judge(reward, texts, timeout=1.0, failed=-1.0)
    assert judged.values.tolist() == [4.5 if isolated else 4.0, -1.0] * len(expected)
    assert judged.failures.keys() == set(range(1, len(texts), 2))
    for row, reason in zip(sorted(judged.failures), expected.values(), strict=True):
        assert reason in judged.failures[row]
    assert f"{len(expected)} failed, the first in row 1: " in repr(judged)


def test_a_loop_without_end_is_interrupted():
    ended = threading.Event()

    def reward(prompt, completion, answer):
        try:
            while True:
                pass
        finally:
            ended.set()

    assert list(judge(reward, ["x"], timeout=0.2).failures) == [0]
    assert ended.wait(60)


def test_what_a_worker_prints_is_no_reply():
    assert judge(Isolated(bad_rewards.by_completion), ["print"]).values.tolist() == [4]


def test_workers_are_kept_and_killed_with_their_children(tmp_path):
    reward = Isolated(bad_rewards.by_completion)

    def pid_of(reward: Isolated) -> int:
        return int(reward(None, "process", ""))

    first = pid_of(reward)
    assert pid_of(reward) == first and alive(first)
    reward.close()
    assert not alive(first) and pid_of(reward) != first
    second = pid_of(reward)
    del reward
    assert not alive(second)

    note = tmp_path / "pid"
    assert "TimeoutError" in judge(Isolated(bad_rewards.with_child), ["x"], str(note), timeout=2.0).failures[0]
    assert ends(int(note.read_text()))


def test_a_worker_that_reads_nothing_takes_no_longer_than_the_limit():
    """A pipe holds 64 KiB: what is longer waits for a reader."""
    reward, replies = Isolated(bad_rewards.by_completion), []
    pid = int(reward(None, "process", ""))
    os.kill(pid, signal.SIGSTOP)
    try:
        asking = threading.Thread(target=lambda: replies.append(judge(reward, ["x" * (1 << 20)], timeout=1.0)))
        asking.start()
        asking.join(60)
        assert replies and "took longer than 1 s" in replies[0].failures[0]
    finally:
        if alive(pid):  # the writer would wait for ever
            os.kill(pid, signal.SIGKILL)
    assert judge(reward, ["x" * (1 << 20)]).values.tolist() == [4]  # by a new worker, in many parts


def test_what_a_worker_cannot_import_is_refused():
    with pytest.raises(ValueError, match="cannot import test_rewards.*put the function at the top"):
        Isolated(lambda prompt, completion, answer: 1.0)
    with pytest.raises(TypeError, match="not JSON serializable"):
        Isolated(bad_rewards.by_completion, more={1, 2})


def test_an_answer_that_is_no_json_fails_one_sample():
    judged = compute_rewards(outputs(["good"], ["good"]), ["four", {1, 2}], Isolated(bad_rewards.by_completion))
    assert judged.values.tolist() == [4, 0] and "not JSON serializable" in judged.failures[1]


def test_an_engines_error_is_not_judged():
    judged = compute_rewards(outputs(["42"], finish_reason="error"), ["42"], exact_match)
    assert judged.values.tolist() == [0] and judged.failures == {0: "the engine ended the sample with an error: None"}


def test_wrong_calls_are_refused():
    with pytest.raises(ValueError, match="2 answers for 1 prompts: give one each"):
        compute_rewards(outputs(["x"]), [1, 2], exact_match)
    with pytest.raises(ValueError, match="timeout must be more than 0 seconds, got 0"):
        judge(exact_match, ["x"], timeout=0)
    assert len(compute_rewards([], [], exact_match).values) == 0


# -- mathematics -------------------------------------------------------------------------------------------------------


def test_math_equivalence():
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install 'jaxengine[rl]'")
    texts = ["so it is $\\frac{1}{2}$", "\\boxed{0.5}", "0.25", "I do not know", "$\\frac{2}{4}$"]
    judged = judge(math_equivalence(), texts, "\\frac{1}{2}")
    assert judged.values.tolist() == [1, 1, 0, 0, 1] and not judged.failures
    assert judge(math_equivalence(), ["the answer is 42"], 42).values.tolist() == [1]
    assert "no mathematical expression in the answer" in judge(math_equivalence(), ["42"], "").failures[0]
    assert judge(math_equivalence(), ["$(x+1)^2$", "$x^2+2x$"], "x^2+2x+1").values.tolist() == [1, 0]


def test_math_without_end_fails_alone():
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install 'jaxengine[rl]'")
    judged = judge(math_equivalence(), ["$2$", "$9^{9^{9^{9}}}$", "$2$"], "2", timeout=5.0)
    assert judged.values.tolist() == [1, 0, 1] and list(judged.failures) == [1]


def test_without_math_verify_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'jaxengine\[rl\]'"):
        judging.math_equivalence()


# -- programs ----------------------------------------------------------------------------------------------------------

ADD = "def add(a, b):\n    return a + b\n"
TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
PROGRAMS = {
    ADD: 1,
    f"Here:\n```python\n{ADD}```\nand done": 1,
    f"```python\nno\n```\n```py\n{ADD}```": 1,
    "def add(a, b):\n    return a - b\n": 0,
    "not python": 0,
    "": 0,
    ADD + "raise SystemExit(0)": 0,
    ADD + "import os; os._exit(0)": 0,
    ADD + "'''": 0,
    ADD + "if True:": 0,
    "def add(a, b):\n    while True: pass": 0,
    ADD + "import time; time.sleep(1000)": 0,
    ADD + "x = bytes(1 << 32)": 0,
    ADD + "open('x', 'wb').write(bytes(1 << 22))": 0,
    ADD + "[open('x', 'w') for _ in range(1)]": 1,
    ADD + "files = [open('x', 'w') for _ in range(200)]": 0,
    ADD + "print(input())": 0,
}


def test_programs():
    judged = judge(python_program(), list(PROGRAMS), TESTS, timeout=4.0, workers=2)
    assert judged.values.tolist() == list(PROGRAMS.values()) and not judged.failures


def test_a_program_is_judged_by_its_output():
    program = "n = int(input())\nprint(n * n)\n"
    judged = judge(python_program(), [program, "print(9)", program + "exit(1)"], {"3\n": "9\n", "4": "16"})
    assert judged.values.tolist() == [1, 0, 0]
    assert "Python source or a mapping" in judge(python_program(), [program], 9).failures[0]


def test_a_spinning_program_is_stopped_by_its_processor_time():
    began = time.process_time()
    judged = judge(python_program(ProgramLimits(cpu_seconds=1)), ["while True: pass"], "", timeout=600.0)
    assert judged.values.tolist() == [0] and time.process_time() - began < 60


ESCAPE = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(10000)"], start_new_session=True)
with open({note!r}, "w") as file:
    file.write(str(child.pid))
{then}
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="only Linux lists a process's descendants")
@pytest.mark.parametrize("then", ["time.sleep(10000)", "pass"], ids=["hangs", "ends"])
def test_children_end_with_their_program(tmp_path, then):
    note = tmp_path / "pid"
    judge(python_program(), [ESCAPE.format(note=str(note), then=then)], "", timeout=2.0)
    assert not alive(int(note.read_text()))


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="only Linux lists a process's descendants")
def test_too_many_processes_are_one_failure(tmp_path):
    bomb = "import os, time\nfor _ in range(40): os.fork() or time.sleep(1000)\ntime.sleep(60)"  # until the next check
    assert judge(python_program(), [bomb], "", timeout=600.0).values.tolist() == [0]


def test_a_program_that_kills_its_supervisor_is_killed_too(tmp_path):
    note = tmp_path / "pid"
    program = (
        f"import os, time\nopen({str(note)!r}, 'w').write(str(os.getpid()))\nos.kill(os.getppid(), 9)\ntime.sleep(1000)"
    )
    assert "supervisor ended with SIGKILL" in judge(python_program(), [program], "").failures[0]
    assert ends(int(note.read_text()))


def test_limits_are_checked():
    with pytest.raises(ValueError, match="memory must be at least 1, got 0"):
        ProgramLimits(memory=0)
