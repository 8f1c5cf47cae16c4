"""Teaches the model that ships arithmetic by reward alone, on a CPU: `python -m jaxengine.rl.calc.learn --algorithm grpo`.

It prints accuracy on held-out problems before and after, the reward on the way, and a digest of all that the run has computed: two runs
of one command print the same, and so does one that was stopped and went on from its snapshot (`--snapshots FOLDER`).
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from checkpoints import snapshots
from checkpoints.model_folder import find_folder
from jaxengine.base.keys import seeded
from jaxengine.config import ModelConfig
from jaxengine.engine.contract_digest import weights_digest
from jaxengine.models import loading
from jaxengine.models.params import Decoder
from jaxengine.rl.calc import arithmetic
from jaxengine.rl.calc.arithmetic import Problem
from jaxengine.rl.calc.train import HELD_OUT_PROBLEMS, build_tokenizer, grade, write_tokenizer
from jaxengine.rl.loops.loop import Iteration, Loop, judged_by
from jaxengine.rl.losses import ALGORITHMS
from jaxengine.rl.trainer import Trainer, TrainerConfig, TrainState
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.tokenizer import Tokenizer

MODEL = "calc"
RECENT = 10  # iterations that the reward shown is the mean of
LONGEST_PROMPT, LONGEST_ANSWER = 8, 6  # tokens: "(9-9)*9=", and "-1234" with its end


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that decides a run's bits but for the machine. `rate` is reached after `warm_up` iterations and falls to 0 at the last;
    problems are of the `kinds` named, with numbers of at most `digits` digits.
    """

    algorithm: str = "grpo"
    iterations: int = 200
    prompts: int = 64
    samples: int = 8
    epochs: int = 1
    mini_batches: int = 1
    micro_batches: int = 1
    rate: float = 3e-4
    warm_up: int = 5
    kl: float = 0.0
    kinds: str = " ".join(arithmetic.KINDS)
    digits: int = 3
    seed: int = 0


def build(run: Run) -> tuple[Loop, TrainState]:
    """The loop and the state it begins with. Raises ValueError for kinds of problems that there are not, or of which none is held out."""
    unknown = sorted(set(run.kinds.split()) - set(arithmetic.KINDS))
    if unknown or not run.kinds.split():
        raise ValueError(
            f"kinds must be some of {', '.join(arithmetic.KINDS)}, with spaces between them, got {run.kinds!r}"
        )
    if run.digits < 2 and "mixed" not in run.kinds:
        raise ValueError(
            f"of numbers with one digit only mixed problems are held out: give digits ≥ 2, or mixed among kinds={run.kinds!r}"
        )
    folder = find_folder(MODEL)
    config = loading.read_model_config(folder)
    params = loading.load(folder, config)
    objective = dataclasses.replace(ALGORITHMS[run.algorithm], kl_coefficient=run.kl)
    sampling = SamplingParams(n=run.samples, max_tokens=LONGEST_ANSWER, entropy=True)
    trainer = Trainer(
        config, optimizer(run), TrainerConfig(objective, sampling, run.epochs, run.mini_batches, run.micro_batches)
    )
    width = LONGEST_PROMPT + LONGEST_ANSWER
    room = min(run.prompts * run.samples, 256)
    loop = Loop(
        trainer,
        lambda i: problems(run, i),
        judged_by(lambda _, text, problem: float(arithmetic.is_right(problem, text))),
        width,
        Tokenizer.load(folder),
        params if run.kl else None,
        dict(max_model_len=64, max_num_seqs=room, num_pages=4 * room + 8),
    )
    return loop, trainer.start(params, seeded(run.seed))


def optimizer(run: Run) -> optax.GradientTransformation:
    updates = run.epochs * run.mini_batches
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, run.rate, run.warm_up * updates),
            optax.linear_schedule(run.rate, 0.0, (run.iterations - run.warm_up) * updates),
        ],
        [run.warm_up * updates],
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))


def problems(run: Run, iteration: int) -> list[tuple[str, Problem]]:
    """Prompts and what they are judged by, other ones each iteration, none of them held out."""
    drawn = itertools.islice(_chosen(run, arithmetic.stream(run.seed * 1_000_003 + iteration)), run.prompts)
    return [(problem.prompt, problem) for problem in drawn]


def _chosen(run: Run, stream: Iterable[Problem]) -> Iterator[Problem]:
    """Those of a stream that the run is about."""
    kinds = run.kinds.split()
    return (
        problem
        for problem in stream
        if problem.kind in kinds and max(map(len, re.findall(r"\d+", problem.prompt))) <= run.digits
    )


def held_out(config: ModelConfig, params: Decoder, run: Run) -> tuple[float, float]:
    """(share of greedy completions that are right, mean probability that a sampled one is), on 2,000 problems never trained on."""
    asked = list(itertools.islice(_chosen(run, arithmetic.stream(run.seed, "held-out")), HELD_OUT_PROBLEMS))
    right, probability = grade(config, params, build_tokenizer(), asked)
    return float(right.mean()), float(probability.mean())


def learn(
    run: Run,
    loop: Loop,
    state: TrainState,
    *,
    folder: Path | None = None,
    every: int = 0,
    stop: int | None = None,
    report: Callable[[Iteration], Any] = lambda iteration: None,
) -> TrainState:
    """Iterate until `run.iterations` are done, or `stop`, with a snapshot in `folder` after each `every` and at the end; goes on from the
    newest that is there."""
    last = run.iterations if stop is None else min(stop, run.iterations)
    if folder is not None:
        claim(folder, run)
        if snapshots.steps(folder):
            state = snapshots.restore(folder, state)
    while int(state.version) < last:
        state, iteration = loop.iterate(state)
        report(iteration)
        done = int(state.version)
        if folder is not None and every and (done % every == 0 or done == last):
            snapshots.save(folder, done, state)
    return state


def claim(folder: Path, run: Run) -> None:
    """Write the run's settings beside its snapshots; raises ValueError where another run's stand there."""
    path, given = folder / "run.json", dataclasses.asdict(run)
    if path.exists():
        found = json.loads(path.read_text())
        differ = [
            f"{name}={found.get(name)} there, {value} given"
            for name, value in given.items()
            if found.get(name) != value
        ]
        if differ:
            raise ValueError(
                f"{folder} belongs to another run: {'; '.join(differ)}. Give the same settings to go on, or another folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(given, indent=2) + "\n")


def state_digest(state: TrainState) -> str:
    """SHA-256 of every bit of the state: weights, the optimiser's moments, counters and key."""
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state))).hexdigest()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Teach the model that ships arithmetic by reward alone.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in dataclasses.fields(Run):
        choices = sorted(ALGORITHMS) if field.name == "algorithm" else None
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            choices=choices,
            help=" ",
        )  # a blank one, so that the default is shown
    parser.add_argument(
        "--snapshots", type=Path, help="a folder for snapshots; a run goes on from the newest that is there"
    )
    parser.add_argument("--every", type=int, default=20, help="iterations between snapshots")
    parser.add_argument(
        "--stop", type=int, help="end after so many iterations of the run, as if it had been interrupted"
    )
    parser.add_argument("--json", type=Path, help="write every iteration's reward and metrics there")
    parser.add_argument("--out", type=Path, help="write the trained model's folder there, a new one")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    run = Run(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Run)})
    if arguments.out:
        arguments.out.mkdir(parents=True)  # before the training, lest it find its place taken
    loop, state = build(run)
    model, start, history = loop.trainer.model_config, time.monotonic(), []
    mean_reward = lambda: np.mean([iteration.reward for iteration in history[-RECENT:]]) if history else np.nan
    print(
        "held out, before: greedy {:.3f}, sampled {:.3f}".format(*held_out(model, loop.trainer.policy(state), run)),
        flush=True,
    )
    with tqdm(total=run.iterations, desc=run.algorithm, unit="iteration") as bar:

        def report(iteration: Iteration) -> None:
            history.append(iteration)
            bar.set_postfix(reward=f"{mean_reward():.3f}", kl=f"{iteration.updates[-1]['kl']:.4f}", refresh=False)
            bar.update(iteration.version + 1 - bar.n)

        state = learn(
            run, loop, state, folder=arguments.snapshots, every=arguments.every, stop=arguments.stop, report=report
        )
    minutes, policy = (time.monotonic() - start) / 60, loop.trainer.policy(state)
    print("held out, after:  greedy {:.3f}, sampled {:.3f}".format(*held_out(model, policy, run)))
    print(f"{minutes:.1f} minutes; reward of the last {RECENT} iterations {mean_reward():.3f}")
    print(f"weights {weights_digest(policy)[:16]}, state {state_digest(state)[:16]}")
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(x) for x in history]))
    if arguments.out:
        loading.save(arguments.out, model, policy)
        write_tokenizer(arguments.out, build_tokenizer())


if __name__ == "__main__":
    main()
