"""A simulation of any length: `python tests/simulation --steps 1000000 --seed 0`.

A failure says which seed brings it back.
"""

import argparse
import time
from collections import Counter

from driver import run


def report(seed: int, stats: Counter[str]) -> None:
    if stats["episodes"] % 100 == 0:
        print(
            f"seed {seed}, {time.monotonic() - START:.0f} s: " + ", ".join(f"{stats[name]} {name}" for name in SHOWN),
            flush=True,
        )


SHOWN = ("steps", "requests", "preemptions", "hits", "versions", "restarts")
START = time.monotonic()
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=1_000_000, help="at least so many; the last episode is run to its end")
parser.add_argument("--seed", type=int, default=0, help="of the first episode; each one after it has the next seed")
arguments = parser.parse_args()
total = run(arguments.steps, arguments.seed, report)
for name, count in sorted(total.items()):
    print(f"{count:>12,} {name}")
print(f"{time.monotonic() - START:.1f} s, every invariant held")
