"""Runs one program under limits, and ends it and all its children. Run by its path; imports the standard library alone.

Reads the job as JSON from its input. Writes the program's process id on one line and the verdict on the next: the
return code ("0"), or the limit that was broken. It is the subreaper of its descendants (Linux), so it finds those that
left the program's process group.
"""

import ctypes
import functools
import json
import os
import re
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
    with open(job["stdin"], "rb") as stdin, open(job["stdout"], "wb") as stdout:
        # preexec_fn is safe, because this process has one thread.
        program = subprocess.Popen(
            job["command"],
            cwd=job["folder"],
            env=job["environment"],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=functools.partial(_limit, limits),
        )
    print(program.pid, flush=True)
    verdict = _watch(program, time.monotonic() + job["timeout"], limits["processes"])
    _end_all(program)
    print(verdict, flush=True)


def _limit(limits: dict[str, int]) -> None:
    for name, kind in LIMITS.items():
        resource.setrlimit(kind, (limits[name], limits[name]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.getuid():  # the kernel does not limit root's processes; _watch does
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
    """Kill until no child is left; dead children are collected, because they count as children until then."""
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
    """Ids of the processes that descend from `pid`; none where the system does not list them (it is not Linux)."""
    descendants = []
    for text in _texts(f"/proc/{pid}/task", "*/children"):
        for child in map(int, text.split()):
            descendants += [child, *_descendants(child)]
    return descendants


def _threads_of_user() -> int:
    """Threads that run as this user, which the kernel's limit counts; 0 where the system does not list them."""
    count = 0
    for text in _texts("/proc", "[0-9]*/status"):
        threads = re.search(r"^Threads:\s*(\d+)", text, re.MULTILINE)
        if threads and f"Uid:\t{os.getuid()}\t" in text:
            count += int(threads[1])
    return count


def _texts(folder: str, pattern: str) -> list[str]:
    """Contents of the files that match, without those of processes that have just ended."""
    texts = []
    for path in Path(folder).glob(pattern):
        try:
            texts.append(path.read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return texts


if __name__ == "__main__":
    main()
