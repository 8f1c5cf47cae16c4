"""Another engine as a system of the bench."""

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any

from jaxengine.base.machine import peak_memory
from jaxengine.command.workloads import PEERS, Prompts


class Peer:
    """Another engine in an interpreter of its own, which answers tasks line by line (benchmarks/README.md)."""

    def __init__(self, name: str, python: str, folder: str, dtype: str, vocab_size: int, context: int) -> None:
        """Room for `context` tokens of a request."""
        script = Path(__file__).parents[2] / "benchmarks" / "peers" / PEERS[name]
        if not script.is_file():
            raise ValueError(
                f"the peer {name!r} is run by {script}, which is not there: run the bench from a checkout "
                "of the repository"
            )
        self.name, self.vocab_size, self._python = name, vocab_size, python
        # In a session of its own, so that Ctrl-C reaches this process alone, which then ends the peer.
        self._process = subprocess.Popen(
            [python, str(script), folder, "--dtype", dtype, "--max-model-len", str(context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            hello = self._answer()
        except BaseException:
            self.close()
            raise
        self.workloads, self.versions = tuple(hello["workloads"]), hello["versions"]

    def warm_up(self) -> None:
        """Nothing beyond the warm-up of each workload."""

    def seconds(self, prompts: Prompts, lengths: list[int], logprobs: bool) -> float:
        return self._ask({"prompts": prompts, "lengths": lengths, "logprobs": logprobs})["seconds"]

    def token_times(self, prompts: Prompts, lengths: list[int], late: list[int], before: int) -> list[list[float]]:
        return self._ask({"prompts": prompts, "lengths": lengths, "late": late, "before": before})["times"]

    def peak_memory(self) -> int | None:
        return peak_memory(self._process.pid)

    def _ask(self, task: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; _answer raises
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()  # its messages come on standard error
        if not line:
            raise ValueError(
                f"the peer {self.name!r} ended with code {self._process.wait()}: has {self._python} what "
                "benchmarks/README.md asks for?"
            )
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
