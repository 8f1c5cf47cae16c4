"""What a new process costs: seconds to load a model and to have its first 16 tokens.

    python benchmarks/cold_start.py calc FOLDER … [--cores 1 2]

The first process of a row finds no compiled step; the second finds those of the first. Each has a cache folder that is
deleted afterwards, and nothing of the user's is read or written.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

NEW_PROCESS = """
import json, sys, time
start = time.perf_counter()
from jaxengine import LLM, SamplingParams
llm = LLM(sys.argv[1], progress=False)
loaded = time.perf_counter()
llm.generate(["12+30="], SamplingParams(max_tokens=16, ignore_eos=True, seed=1), use_tqdm=False)
print(json.dumps([loaded - start, time.perf_counter() - loaded]))
"""


def seconds(model: str, cores: int, cache: str) -> tuple[float, float]:
    """(to load, imports among it; to the last of 16 tokens) of a new process on so many of this one's cores."""
    allowed = sorted(os.sched_getaffinity(0))[:cores]
    done = subprocess.run(
        [sys.executable, "-c", NEW_PROCESS, model],
        env=os.environ | {"XDG_CACHE_HOME": cache},
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    load, generate = json.loads(done.stdout.splitlines()[-1])
    return load, generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names or folders")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    print("| model | cores | process | load | 16 tokens | together |\n|---|---|---|---|---|---|", flush=True)
    for model in arguments.models:
        name = os.path.basename(model.rstrip("/"))
        for cores in arguments.cores:
            with tempfile.TemporaryDirectory() as cache:
                for process in ("first", "second"):
                    load, generate = seconds(model, cores, cache)
                    row = f"{load:.1f} | {generate:.1f} | {load + generate:.1f}"
                    print(f"| {name} | {cores} | {process} | {row} |", flush=True)


if __name__ == "__main__":
    main()
