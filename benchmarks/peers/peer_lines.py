"""What every peer's script shares: it says hello, then answers each line of standard input with one of standard output.

hello   {"workloads": ["decode"], "versions": {"transformers": "5.23.0"}}
task    {"prompts": [[token id, …], …], "lengths": [new tokens of each prompt, …],
         "logprobs": of the sampled tokens, or not}
answer  {"seconds": wall time of the whole call}
"""

import json
import os
import sys
from collections.abc import Callable

Prompts = list[list[int]]


def serve(
    workloads: list[str], versions: dict[str, str], seconds: Callable[..., float], answers: Callable[[dict], None]
) -> None:
    """Answer tasks until standard input ends."""
    answers({"workloads": workloads, "versions": versions})
    for line in sys.stdin:
        task = json.loads(line)
        answers({"seconds": seconds(**task)})


def own_stdout() -> Callable[[dict], None]:
    """A writer of JSON lines to the real standard output; whatever else prints there then goes to standard error."""
    real = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(message: dict) -> None:
        print(json.dumps(message), file=real, flush=True)

    return write
