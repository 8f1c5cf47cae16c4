"""Rewards that go wrong, for worker processes to import."""

import os
import signal
import subprocess
import sys
import time


def by_completion(prompt, completion, answer, **options):
    """Does what the completion names; any other completion gets the length of the answer."""
    if completion == "raise":
        raise KeyError("no such luck")
    if completion == "exit":
        sys.exit(3)
    if completion == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if completion == "hang":
        time.sleep(10_000)
    if completion == "busy":
        return 9 ** (9**9)  # keeps the interpreter lock
    if completion == "memory":
        return len(bytes(1 << 40))
    if completion == "print":
        print('{"value": 99.0}')
    values = {"none": None, "nan": float("nan"), "text": "1.0", "process": os.getpid()}
    return values.get(completion, len(answer) + options.get("more", 0))


def with_child(prompt, completion, answer):
    """Starts a process that does not end with it, writes its id to the file `answer`, and hangs."""
    child = subprocess.Popen(["sleep", "10000"])
    with open(answer, "w") as file:
        file.write(str(child.pid))
    time.sleep(10_000)


def by_facts(prompt, completion, answer, *, finish_reason, num_tokens, token_ids, more=0):
    """Not bad: it tells what a sample's reward may ask for, as one number."""
    return 100 * (finish_reason == "length") + 10 * num_tokens + token_ids[0] + more
