"""The worker process of isolation.py: answers each sample, a line of JSON, with a line of JSON. Run by its path."""

import importlib
import json
import os
import resource
import signal
import sys
from typing import Any

GRACE = 5  # seconds after the caller's limit until a worker that was not killed ends itself
MAX_REASON = 500  # characters


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that what a reward prints is not taken for a reply
    setup = json.loads(sys.stdin.readline())
    sys.path[:] = setup["path"]
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory"], setup["memory"]))
    try:
        from jaxengine.rl.rewards.bounded import finite

        function = getattr(importlib.import_module(setup["module"]), setup["name"])
    except Exception as error:
        return _send(replies, {"error": describe(error)})
    _send(replies, {"ready": True})
    for line in sys.stdin:
        timeout, facts, *sample = json.loads(line)
        # Without a handler the alarm ends the process even where Python code never runs again and the caller is gone.
        signal.setitimer(signal.ITIMER_REAL, timeout + GRACE)
        try:
            reply = {"value": finite(function(*sample, **setup["options"], **facts))}
        except Exception as error:
            reply = {"error": describe(error)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(replies, reply)


def describe(error: BaseException) -> str:
    """The text that is recorded for an error."""
    return f"{type(error).__name__}: {error}"[:MAX_REASON]


def _send(replies: Any, reply: dict[str, Any]) -> None:
    print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
