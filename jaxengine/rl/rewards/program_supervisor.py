"""Runs one program under limits and ends it with all its children. A process of its own, run by its path: the standard library alone.

Reads the job as JSON from its input, writes the program's process id on one line and the verdict on the next: "0" and other return
codes, or what limit was met. As its descendants' subreaper (Linux) it finds those too that left the program's process group.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
LOOK_EVERY = 0.01  # seconds
LIMITS = {
    "cpu_seconds": resource.RLIMIT_CPU,
    "memory": resource.RLIMIT_AS,
    "file_bytes": resource.RLIMIT_FSIZE,
    "open_files": resource.RLIMIT_NOFILE,
}


def main() -> None:
    job = json.load(sys.stdin)
    limits = job["limits"]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with open(job["stdin"], "rb") as given, open(job["stdout"], "wb") as written:
        # preexec_fn is safe: this process has one thread.
        program = subprocess.Popen(
            job["command"],
            cwd=job["folder"],
            env=job["environment"],
            stdin=given,
            stdout=written,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: _limit(limits),
        )
    print(program.pid, flush=True)
    verdict = _watch(program, time.monotonic() + job["timeout"], limits["processes"])
    _end_all(program)
    print(verdict, flush=True)


def _limit(limits: dict[str, int]) -> None:
    for name, kind in LIMITS.items():
        resource.setrlimit(kind, (limits[name], limits[name]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.getuid():  # the kernel holds root to no number of processes: _watch does
        allowed = _threads_of_user() + limits["processes"]
        resource.setrlimit(resource.RLIMIT_NPROC, (allowed, allowed))


def _watch(program: subprocess.Popen, deadline: float, processes: int) -> str:
    while program.poll() is None:
        if time.monotonic() > deadline:
            return "timeout"
        if len(_descendants(os.getpid())) > processes:
            return "processes"
        time.sleep(LOOK_EVERY)
    return str(program.returncode)


def _end_all(program: subprocess.Popen) -> None:
    """Kill until nothing is left; the dead are collected, for they count as children until then."""
    while True:
        try:
            os.killpg(program.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        for pid in _descendants(os.getpid()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _descendants(pid: int) -> list[int]:
    """Process ids below `pid`, where the system tells them (Linux)."""
    children = [int(child) for file in _texts(f"/proc/{pid}/task", "*/children") for child in file.split()]
    return children + [below for child in children for below in _descendants(child)]


def _threads_of_user() -> int:
    """Threads that run as this user, which is what the kernel's limit counts; 0 where the system does not tell."""
    of_user = [text for text in _texts("/proc", "[0-9]*/status") if f"Uid:\t{os.getuid()}\t" in text]
    return sum(int(line.split()[1]) for text in of_user for line in text.splitlines() if line.startswith("Threads:"))


def _texts(folder: str, pattern: str) -> list[str]:
    """The files' contents, of processes that still are."""
    texts = []
    for path in Path(folder).glob(pattern):
        try:
            texts.append(path.read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return texts


if __name__ == "__main__":
    main()
