"""What every peer's script shares: it says hello, then answers each line of standard input with one of standard output.

hello   {"workloads": ["decode"], "versions": {"transformers": "5.23.0"}}
task    {"prompts": [[token id, …], …], "lengths": [new tokens of each prompt, …],
         "logprobs": of the sampled tokens, or not}
answer  {"seconds": wall time of the whole call}

The workload first-token sends one more prompt, for one token, once each of the others has `before` tokens:
task    {"prompts": …, "lengths": …, "late": [token id, …], "before": tokens}
answer  {"times": [[when each token came, in seconds from the sending of `late`, …] of each prompt and last of `late`]}
"""

import argparse
import json
import os
import sys
from collections.abc import Callable

Prompts = list[list[int]]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with what the bench says to every peer."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--max-model-len", type=int, default=2048, help="tokens of a request that there is room for")
    return parser


def serve(
    workloads: list[str],
    versions: dict[str, str],
    answers: Callable[[dict], None],
    seconds: Callable[..., float],
    token_times: Callable[..., list[list[float]]] | None = None,
) -> None:
    """Answer tasks until standard input ends."""
    answers({"workloads": workloads, "versions": versions})
    for line in sys.stdin:
        task = json.loads(line)
        answers({"times": token_times(**task)} if "late" in task else {"seconds": seconds(**task)})


def own_stdout() -> Callable[[dict], None]:
    """A writer of JSON lines to the real standard output; whatever else prints there then goes to standard error."""
    real = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(message: dict) -> None:
        print(json.dumps(message), file=real, flush=True)

    return write
