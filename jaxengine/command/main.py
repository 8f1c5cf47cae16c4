"""The command line: `jaxengine demo`, `generate`, `serve`, `verify`, `bench` and `plan`. It parses and prints; the work
is done elsewhere.

What a user gets wrong ends with one line on standard error and code 2, an interrupt with code 130.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from jaxengine.command.parser import parser

USER_ERRORS = (ValueError, TypeError, OSError, MemoryError, NotImplementedError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    arguments = argparse.Namespace(traceback=False)
    try:
        parser().parse_args(argv, arguments)
        return arguments.command(arguments)
    except SystemExit as stop:  # argparse's own end, after --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has ended: `jaxengine generate … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except USER_ERRORS as error:
        if arguments.traceback:
            raise
        print(f"jaxengine: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
