"""Four threads at one LLM for a while: they generate, stream and drop, abort, extend, update the weights and put the
LLM to sleep. Then every sample that one set of weights drew is drawn again and compared by bits.

    python benchmarks/soak.py [--minutes 10] [--threads 4]

Prints errors (there have to be none), memory at the beginning and at the end, and what was replayed.
"""

import argparse
import collections
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxengine import LLM, SamplingParams
from jaxengine.contract.compare import compare
from jaxengine.coordinate import Coordinate
from jaxengine.models.params import initialise

WEIGHTS, BATCH = 3, 32  # sets of weights; samples that are replayed together


class Soak:
    """The LLM, what the threads saw, and when they stop."""

    def __init__(self, seconds: float) -> None:
        self.llm = LLM("calc", num_pages=96, max_num_seqs=16, max_model_len=256, progress=False)
        self.weights = [self.llm.params]
        for seed in range(1, WEIGHTS):
            self.weights.append(initialise(self.llm.config, jax.random.key(seed), scale=0.1))
        self.digests = []
        for weights in self.weights:
            self.llm.update_params(weights)
            self.digests.append(self.llm.contract().parts["weights"])
        self.stop_at = time.monotonic() + seconds
        self.coordinates: list[Coordinate] = []
        self.done: collections.Counter[str] = collections.Counter()
        self.errors: list[str] = []

    def run(self, seed: int) -> None:
        rng = random.Random(seed)
        actions = [self.generate] * 5 + [self.stream, self.abort, self.extend] * 2 + [self.update, self.sleep]
        while time.monotonic() < self.stop_at:
            action = rng.choice(actions)
            try:
                action(rng)
            except RuntimeError as error:
                if "wake_up()" not in str(error):  # the others' calls while one sleeps
                    self.errors.append(repr(error))
            except Exception as error:
                self.errors.append(repr(error))
            self.done[action.__name__] += 1

    def keep(self, outputs: Any) -> None:
        self.coordinates += [sample.coordinate for output in outputs for sample in output.outputs]

    # -- what a thread does -------------------------------------------------------------------------------------------

    def prompt(self, rng: random.Random) -> list[int]:
        return [rng.randrange(256) for _ in range(rng.choice((1, 15, 16, 33, 70)))]

    def sampling(self, rng: random.Random) -> SamplingParams:
        return SamplingParams(
            n=rng.choice((1, 1, 4)),
            max_tokens=rng.randint(1, 40),
            temperature=rng.choice((0.0, 0.7, 1.0)),
            top_p=rng.choice((1.0, 0.9)),
            repetition_penalty=rng.choice((1.0, 1.2)),
            seed=rng.randrange(2**31),
            ignore_eos=True,
        )

    def generate(self, rng: random.Random) -> None:
        prompts = [self.prompt(rng) for _ in range(rng.randint(1, 4))]
        self.keep(self.llm.generate(prompts, [self.sampling(rng) for _ in prompts]))

    def stream(self, rng: random.Random) -> None:
        stream = self.llm.stream(self.prompt(rng), self.sampling(rng))
        for _ in zip(range(rng.randint(1, 10)), stream, strict=False):
            pass
        stream.close()

    def abort(self, rng: random.Random) -> None:
        last = None
        for last in self.llm.stream(self.prompt(rng), self.sampling(rng).replace(max_tokens=60)):
            self.llm.abort(last.request_id)
        self.keep([last.output] if last is not None and last.output is not None else [])

    def extend(self, rng: random.Random) -> None:
        sampling = self.sampling(rng)
        begun = self.llm.generate([self.prompt(rng)], sampling)
        self.keep(self.llm.extend(begun, sampling.replace(max_tokens=sampling.max_tokens + 20)))

    def update(self, rng: random.Random) -> None:
        self.llm.update_params(rng.choice(self.weights), in_flight=rng.choice(("recompute", "keep")))

    def sleep(self, rng: random.Random) -> None:
        self.llm.sleep(1)
        time.sleep(0.05 * rng.random())
        self.llm.wake_up()

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def replay(self) -> str:
        """Every sample of one set of weights, again."""
        llm, admit, by_weights = self.llm, self.llm.session.admission.replayed, collections.defaultdict(list)
        for coordinate in self.coordinates:
            if coordinate.token_ids and isinstance(coordinate.contract.parts["weights"], str):
                by_weights[coordinate.contract.parts["weights"]].append(coordinate)
        different = 0
        for digest, coordinates in by_weights.items():
            llm.update_params(self.weights[self.digests.index(digest)])
            for first in range(0, len(coordinates), BATCH):
                some = coordinates[first : first + BATCH]
                outputs = llm.session.complete([admit("", coordinate) for coordinate in some])
                for coordinate, output in zip(some, outputs, strict=True):
                    expected = [(coordinate.token_ids, coordinate.token_logprobs)]
                    different += not compare("again", expected, output.outputs).holds
        count = sum(map(len, by_weights.values()))
        return f"{count} of {len(self.coordinates)} samples had one set of weights: {different} differ when drawn again"


def resident() -> float:
    """This process's memory in MB, as Linux tells it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmRSS"))


def watched(stop_at: float, report: Callable[[float], None]) -> None:
    while time.monotonic() < stop_at:
        time.sleep(10)
        report(resident())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=4)
    arguments = parser.parse_args()
    soak, memory = Soak(60 * arguments.minutes), []
    soak.llm.generate([[1]], SamplingParams(max_tokens=20))
    threads = [threading.Thread(target=soak.run, args=(seed,)) for seed in range(arguments.threads)]
    threads.append(threading.Thread(target=watched, args=(soak.stop_at, memory.append)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    soak.llm.engine.scheduler.check_integrity()
    third = max(len(memory) // 3, 1)
    print(f"{arguments.minutes} minutes, {arguments.threads} threads: {dict(soak.done)}")
    print(f"errors: {len(soak.errors)} {collections.Counter(soak.errors).most_common(5)}")
    print(f"memory in MB: after a third {max(memory[:third]):.0f}, at the end {max(memory[-third:]):.0f} (peaks)")
    print(soak.replay())


if __name__ == "__main__":
    main()
