"""The worker process of isolation.py: reads samples as lines of JSON, answers each with a line. Run by its path."""

import importlib
import json
import os
import resource
import signal
import sys
from typing import Any

GRACE = 5  # seconds behind the caller's limit after which a worker that nobody ended ends itself
MAX_REASON = 500  # characters


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a reward prints must not look like a reply
    setup = json.loads(sys.stdin.readline())
    sys.path[:] = setup["path"]
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory"], setup["memory"]))
    try:
        from jaxengine.rl.rewards.bounded import finite

        function = getattr(importlib.import_module(setup["module"]), setup["name"])
    except Exception as error:
        return _say(replies, {"error": describe(error)})
    _say(replies, {"ready": True})
    for line in sys.stdin:
        timeout, *sample = json.loads(line)
        # The kernel's alarm, without a handler: it ends even a process that never runs Python code again, whose caller died.
        signal.setitimer(signal.ITIMER_REAL, timeout + GRACE)
        try:
            reply = {"value": finite(function(*sample, **setup["options"]))}
        except Exception as error:
            reply = {"error": describe(error)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        _say(replies, reply)


def describe(error: BaseException) -> str:
    """What went wrong, as the text that is recorded."""
    return f"{type(error).__name__}: {error}"[:MAX_REASON]


def _say(replies: Any, reply: dict[str, Any]) -> None:
    print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
