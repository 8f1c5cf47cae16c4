"""A reward for Python programs: run what the model wrote, with its tests, in a process with limits."""

import contextlib
import dataclasses
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxengine.rl.rewards.bounded import Bounded
from jaxengine.rl.rewards.isolation import how_it_ended

SUPERVISOR = Path(__file__).with_name("program_supervisor.py")
GRACE = 10.0  # seconds that the supervisor has to end the program after its time limit
FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class ProgramLimits:
    """What one run of a program may use. Raises ValueError naming the field where one is less than 1."""

    cpu_seconds: int = 10
    memory: int = 1 << 30  # bytes of address space of each process
    file_bytes: int = 1 << 20  # of each file that it writes, and of its output
    open_files: int = 64
    processes: int = 8  # at the same time, the program among them

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be at least 1, got {getattr(self, field.name)}")


class ProgramCheck(Bounded):
    """1.0 where the completion's program passes the answer's tests, within its limits and in time; else 0.0.

    The program is the last fenced block of Python in the completion, or the whole completion. Tests are Python source
    that runs after the program (`"assert add(1, 2) == 3"`), or a mapping from inputs to expected outputs, compared
    without white space at the end. A program that ends the interpreter before the tests have ended fails. The limits
    protect the machine's resources and nothing else: the program runs with your rights to files and network.
    """

    def __init__(self, limits: ProgramLimits) -> None:
        self.limits = limits

    def within(self, timeout: float, prompt: Any, completion: str, answer: Any, **facts: Any) -> float:
        deadline = time.monotonic() + timeout
        blocks = FENCED.findall(completion)
        program = blocks[-1] if blocks else completion
        if isinstance(answer, str):
            passed = f"passed {secrets.token_hex(16)}"
            output = self._output(f"{program}\n{answer}\nprint({passed!r})\n", "", deadline)
            return float(output is not None and output.rstrip().endswith(passed))
        if isinstance(answer, Mapping):
            return float(
                all(_same(self._output(program, text, deadline), expected) for text, expected in answer.items())
            )
        raise TypeError(
            f"the tests of a program are Python source or a mapping from inputs to outputs, got {type(answer).__name__}"
        )

    def _output(self, source: str, text: str, deadline: float) -> str | None:
        """What the program prints for the input `text`; None where it fails or breaks a limit."""
        with tempfile.TemporaryDirectory(prefix="jaxengine-program-", ignore_cleanup_errors=True) as name:
            folder = Path(name)
            (folder / "work").mkdir()
            (folder / "program.py").write_text(source, "utf-8", "replace")
            (folder / "input").write_text(text, "utf-8")
            job = {
                "command": [sys.executable, "-I", str(folder / "program.py")],
                "folder": str(folder / "work"),
                "environment": {"HOME": str(folder / "work"), "TMPDIR": str(folder / "work"), "PATH": os.defpath},
                "stdin": str(folder / "input"),
                "stdout": str(folder / "output"),
                "limits": dataclasses.asdict(self.limits),
                "timeout": deadline - time.monotonic(),
            }
            if _supervised(job) != "0":
                return None
            return (folder / "output").read_text("utf-8", "replace")


def _supervised(job: dict[str, Any]) -> str:
    """The supervisor's verdict. Raises ChildProcessError where the supervisor ends, which a program may kill."""
    with subprocess.Popen(
        [sys.executable, "-I", str(SUPERVISOR)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as supervisor:
        try:
            written, _ = supervisor.communicate(json.dumps(job), timeout=job["timeout"] + GRACE)
        except subprocess.TimeoutExpired:
            supervisor.kill()
            written, _ = supervisor.communicate()
    pid, _, verdict = written.partition("\n")
    if not verdict:
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.killpg(int(pid), signal.SIGKILL)
        raise ChildProcessError(f"the program's supervisor ended with {how_it_ended(supervisor.returncode)}")
    return verdict.strip()


def _same(output: str | None, expected: str) -> bool:
    return output is not None and output.rstrip() == expected.rstrip()
