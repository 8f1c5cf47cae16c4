"""torch in an interpreter of its own: whether it is there, and its attention."""

import json
import subprocess
from pathlib import Path
from typing import Any

from accelerator_stages import here

PEERS = Path(__file__).parents[1] / "peers"


def missing(python: str, module: str) -> str | None:
    """Why the module cannot be measured on this device beside ours, or None where it can."""
    if here.platform() == "tpu":
        return "torch does not run on a TPU here"
    try:
        asks = f"import torch, {module}; print(torch.cuda.is_available())"
        found = subprocess.run([python, "-c", asks], capture_output=True, text=True)
    except OSError as error:
        return str(error)
    if found.returncode:
        return (found.stderr.strip().splitlines() or [f"code {found.returncode}"])[-1]
    return None if here.platform() == "cpu" or "True" in found.stdout else "its torch has no CUDA"


class TorchAttention:
    """peers/peer_torch_attention.py, started once."""

    def __init__(self, python: str) -> None:
        command = [python, str(PEERS / "peer_torch_attention.py")]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.hello: dict[str, Any] = self._answer()

    def seconds(self, attention: dict[str, Any]) -> float:
        """Of one call; `attention` as kernel_rows.Row.sdpa."""
        print(json.dumps(attention), file=self._process.stdin, flush=True)
        return self._answer()["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"torch's interpreter ended with code {self._process.wait()}")
        return json.loads(line)
