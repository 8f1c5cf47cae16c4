"""Teaches the model that ships, "calc", arithmetic by reward alone, on a CPU: `python -m jaxengine.rl.calc.learn`.

It prints the accuracy on held-out problems before and after, the reward as it goes, and a digest of the final state.
Two runs of one command print the same digest, and so does a run that was stopped and then continued from its snapshot
in the folder that `--snapshots` names. Ctrl-C stops it after the iteration that is under way.
"""

import argparse
import dataclasses
import hashlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from checkpoints import snapshots
from checkpoints.model_folder import find_folder
from jaxengine.base.keys import seeded
from jaxengine.base.signals import noted
from jaxengine.config import ModelConfig
from jaxengine.engine.contract_digest import weights_digest
from jaxengine.models import loading
from jaxengine.models.params import Decoder
from jaxengine.rl.calc import arithmetic
from jaxengine.rl.calc.arithmetic import Problem
from jaxengine.rl.calc.model import build_tokenizer, write_tokenizer
from jaxengine.rl.calc.run import Run, check, held_out_problems, problems
from jaxengine.rl.calc.train import HELD_OUT_PROBLEMS, grade
from jaxengine.rl.global_norm import clip_by_global_norm
from jaxengine.rl.loops import history
from jaxengine.rl.loops.loop import Iteration, Loop, judged_by
from jaxengine.rl.objective import ALGORITHMS
from jaxengine.rl.train_state import TrainerConfig, TrainState
from jaxengine.rl.trainer import Trainer
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.tokenizer import Tokenizer

MODEL = "calc"
RECENT = 10  # iterations that the displayed reward is the mean of
HISTORY = "history.jsonl"  # beside the snapshots
CTRL_C = "\nCtrl-C: this iteration ends first; once more ends at once"
LONGEST_PROMPT, LONGEST_ANSWER = 8, 6  # tokens: "(9-9)*9=", and "-1234" with its end token


def build(run: Run) -> tuple[Loop, TrainState]:
    """The loop and its initial state. Raises ValueError for unknown kinds of problems, and where none is held out."""
    check(run)
    folder = find_folder(MODEL)
    model_config = loading.read_model_config(folder)
    params = loading.load(folder, model_config)
    trainer = Trainer(model_config, optimizer(run), _trainer_config(run))
    max_num_seqs = min(run.prompts * run.samples, 256)

    def problems_of_iteration(iteration: int) -> list[tuple[str, Problem]]:
        return problems(run, iteration)

    loop = Loop(
        trainer=trainer,
        problems=problems_of_iteration,
        judge=judged_by(reward),
        length=LONGEST_PROMPT + LONGEST_ANSWER,
        tokenizer=Tokenizer.load(folder),
        reference=params if run.kl else None,
        engine=dict(max_model_len=64, max_num_seqs=max_num_seqs, num_pages=4 * max_num_seqs + 8),
    )
    return loop, trainer.start(params, seeded(run.seed))


def reward(prompt: str, completion: str, problem: Problem) -> float:
    """1.0 where the completion is right, else 0.0."""
    return float(arithmetic.is_right(problem, completion))


def _trainer_config(run: Run) -> TrainerConfig:
    return TrainerConfig(
        objective=dataclasses.replace(ALGORITHMS[run.algorithm], kl_coefficient=run.kl),
        sampling=SamplingParams(n=run.samples, max_tokens=LONGEST_ANSWER, entropy=True),
        epochs=run.epochs,
        mini_batches=run.mini_batches,
        micro_batches=run.micro_batches,
    )


def optimizer(run: Run) -> optax.GradientTransformation:
    """Adam with a clipped gradient; its rate is a function of the number of updates."""
    updates = run.epochs * run.mini_batches  # of an iteration
    rising_for = min(run.warm_up, run.iterations // 4) * updates
    rising = optax.linear_schedule(run.rate / (rising_for + 1), run.rate, rising_for)
    falling = optax.linear_schedule(run.rate, 0.0, run.iterations * updates - rising_for)
    rate = optax.join_schedules([rising, falling], [rising_for])
    return optax.chain(clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))


def held_out(model_config: ModelConfig, params: Decoder, run: Run) -> tuple[float, float]:
    """(share of greedy completions that are right, mean probability that a sampled one is), on held-out problems."""
    unseen = held_out_problems(run, HELD_OUT_PROBLEMS)
    right, probability = grade(model_config, params, build_tokenizer(), unseen)
    return float(right.mean()), float(probability.mean())


def learn(
    run: Run,
    loop: Loop,
    state: TrainState,
    *,
    folder: Path | None = None,
    every: int = 0,
    stop: int | None = None,
    is_asked_to_stop: Callable[[], bool] = lambda: False,
    report: Callable[[Iteration], Any] | None = None,
) -> TrainState:
    """The state after `run.iterations` iterations, after `stop` of them, or when it is asked to stop; `report` is
    called after each.

    With a `folder`, one that `resumed` has claimed for the run, each iteration is written down there, and so is a
    snapshot every `every` iterations and at the end.
    """
    last = run.iterations if stop is None else min(stop, run.iterations)
    while int(state.version) < last and not is_asked_to_stop():
        state, iteration = loop.iterate(state)
        if folder is not None:
            history.append(folder / HISTORY, iteration)
        if report is not None:
            report(iteration)
        if folder is not None and every and int(state.version) % every == 0:
            snapshots.save(folder, int(state.version), state)
    if folder is not None and int(state.version) not in snapshots.steps(folder):
        snapshots.save(folder, int(state.version), state)
    return state


def resumed(run: Run, state: TrainState, folder: Path) -> tuple[TrainState, list[dict[str, Any]]]:
    """(the newest snapshot in the folder, or `state` where there is none; the iterations before it).

    Raises ValueError where the folder has another run's settings.
    """
    claim(folder, run)
    if snapshots.steps(folder):
        state = snapshots.restore(folder, state)
    return state, history.kept(folder / HISTORY, int(state.version))


def claim(folder: Path, run: Run) -> None:
    """Write the run's settings beside its snapshots. Raises ValueError where the folder has another run's settings."""
    path, settings = folder / "run.json", dataclasses.asdict(run)
    if path.exists():
        earlier = json.loads(path.read_text())
        changed = [name for name, value in settings.items() if earlier.get(name) != value]
        if changed:
            differences = "; ".join(f"{name}={earlier.get(name)} there, {settings[name]} given" for name in changed)
            raise ValueError(
                f"{folder} belongs to another run: {differences}. Give the same settings to go on, or another folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n")


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
        flag = f"--{field.name.replace('_', '-')}"
        blank = " "  # with a help text, the formatter shows the default
        parser.add_argument(flag, type=type(field.default), default=field.default, choices=choices, help=blank)
    parser.add_argument("--snapshots", type=Path, help="a folder for snapshots; a run continues from the newest in it")
    parser.add_argument("--every", type=int, default=20, help="iterations between snapshots")
    parser.add_argument("--stop", type=int, help="end after so many iterations of the run, as Ctrl-C would")
    parser.add_argument("--json", type=Path, help="write reward and metrics of all iterations there, also on Ctrl-C")
    parser.add_argument("--out", type=Path, help="write the trained model's folder there, a new one")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    run = Run(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Run)})
    if arguments.out:
        arguments.out.mkdir(parents=True)  # now, because after the training it is too late to fail
    loop, state = build(run)
    model_config, start = loop.trainer.model_config, time.monotonic()
    done: list[dict[str, Any]] = []
    if arguments.snapshots is not None:
        state, done = resumed(run, state, arguments.snapshots)
        if int(state.version):
            print(f"goes on after iteration {int(state.version)} of {run.iterations}, from {arguments.snapshots}")
    _print_accuracy("before: ", held_out(model_config, loop.trainer.policy(state), run))
    bar = tqdm(total=run.iterations, initial=int(state.version), desc=run.algorithm, unit="iteration")
    with bar, noted(signal.SIGINT, CTRL_C, then=signal.default_int_handler) as is_asked_to_stop:
        bar.set_postfix_str("the first iteration compiles")

        def report(iteration: Iteration) -> None:
            done.append(dataclasses.asdict(iteration))
            bar.set_postfix(_shown(done), refresh=False)
            bar.update(iteration.version + 1 - bar.n)

        state = learn(
            run,
            loop,
            state,
            folder=arguments.snapshots,
            every=arguments.every,
            stop=arguments.stop,
            is_asked_to_stop=is_asked_to_stop,
            report=report,
        )
        was_stopped = is_asked_to_stop()
    if arguments.json:
        arguments.json.write_text(json.dumps(done))
    if was_stopped:
        _say_how_to_go_on(int(state.version), run, arguments.snapshots)
        raise SystemExit(128 + signal.SIGINT)
    minutes, policy = (time.monotonic() - start) / 60, loop.trainer.policy(state)
    _print_accuracy("after:  ", held_out(model_config, policy, run))
    print(f"{minutes:.1f} minutes; reward of the last {RECENT} iterations {_mean_reward(done):.3f}")
    print(f"weights {weights_digest(policy)[:16]}, state {state_digest(state)[:16]}")
    if arguments.out:
        loading.save(arguments.out, model_config, policy)
        write_tokenizer(arguments.out, build_tokenizer())


def _mean_reward(done: list[dict[str, Any]]) -> float:
    """Of the last RECENT iterations; NaN where there is none."""
    return float(np.mean([iteration["reward"] for iteration in done[-RECENT:]])) if done else float("nan")


def _shown(done: list[dict[str, Any]]) -> dict[str, str]:
    """What stands beside the bar: the mean reward of RECENT iterations, and of the last one what else is watched."""
    last = done[-1]
    return {
        "reward": f"{_mean_reward(done):.3f}",
        "entropy": f"{last['entropy']:.3f}",
        "kl": f"{last['updates'][-1]['kl']:.4f}",
        "length": f"{last['length']:.1f}",
    }


def _say_how_to_go_on(version: int, run: Run, folder: Path | None) -> None:
    print(f"stopped by Ctrl-C after iteration {version} of {run.iterations}")
    if folder is None:
        print("nothing was kept: give --snapshots FOLDER to be able to go on")
    else:
        print(f"kept in {folder}: the same command goes on from there, to the bits of a run that was not stopped")


def _print_accuracy(when: str, accuracy: tuple[float, float]) -> None:
    print("held out, {}greedy {:.3f}, sampled {:.3f}".format(when, *accuracy), flush=True)


if __name__ == "__main__":
    main()
