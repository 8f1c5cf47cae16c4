"""Teaches the model that ships, "calc", arithmetic by reward alone, on a CPU: `python -m jaxengine.rl.calc.learn`.

It prints the accuracy on held-out problems before and after, the reward as it goes, and a digest of the final state.
Two runs of one command print the same digest, and so does a run that was stopped and then continued from its snapshot
in the folder that `--snapshots` names. Ctrl-C and SIGTERM stop it after the iteration that is under way.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
from tqdm import tqdm

from checkpoints.model_folder import find_folder
from jaxengine.base.keys import seeded
from jaxengine.config import ModelConfig
from jaxengine.engine.contract_digest import weights_digest
from jaxengine.models import loading
from jaxengine.models.params import Decoder
from jaxengine.rl.calc import arithmetic
from jaxengine.rl.calc.arithmetic import Problem
from jaxengine.rl.calc.model import build_tokenizer, write_tokenizer
from jaxengine.rl.calc.run import ADDED, Run, check, held_out_problems, problems
from jaxengine.rl.calc.train import HELD_OUT_PROBLEMS, grade
from jaxengine.rl.global_norm import clip_by_global_norm
from jaxengine.rl.loops import sinks
from jaxengine.rl.loops.driver import Outcome, learn
from jaxengine.rl.loops.loop import Loop, judged_by
from jaxengine.rl.loops.run_folder import RunFolder
from jaxengine.rl.loops.sinks import RECENT, ProgressBar, Sink
from jaxengine.rl.objective import ALGORITHMS
from jaxengine.rl.train_state import TrainerConfig, TrainState
from jaxengine.rl.trainer import Trainer
from jaxengine.sampling_params import SamplingParams
from jaxengine.text.tokenizer import Tokenizer

MODEL = "calc"
LONGEST_PROMPT, LONGEST_ANSWER = 8, 6  # tokens: "(9-9)*9=", and "-1234" with its end token


def build(run: Run) -> tuple[Loop, TrainState]:
    """The loop and its initial state. Raises ValueError for unknown kinds of problems, and where none is held out."""
    check(run)
    folder = find_folder(MODEL)
    model_config = loading.read_model_config(folder)
    params = loading.load(folder, model_config)
    trainer = Trainer(model_config, optimizer(run), _trainer_config(run))
    max_num_seqs = min(run.prompts * run.samples, 256)

    loop = Loop(
        trainer=trainer,
        problems=functools.partial(problems, run),
        judge=judged_by(reward),
        length=LONGEST_PROMPT + LONGEST_ANSWER,
        tokenizer=Tokenizer.load(folder),
        reference=params if run.kl else None,
        engine=dict(max_model_len=64, max_num_seqs=max_num_seqs, num_pages=4 * max_num_seqs + 8),
        refill=run.refill,
        further=functools.partial(problems, run),
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
        mask_truncated=run.mask_truncated,
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
        flag, meaning = f"--{field.name.replace('_', '-')}", field.metadata["help"]
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true", help=meaning)
            continue
        parser.add_argument(flag, type=type(field.default), default=field.default, choices=choices, help=meaning)
    parser.add_argument("--snapshots", type=Path, help="a folder for snapshots; a run continues from the newest in it")
    parser.add_argument("--every", type=int, default=20, help="iterations between snapshots")
    parser.add_argument("--evaluate-every", type=int, default=0, help="iterations between evaluations; 0: no others")
    parser.add_argument("--stop", type=int, help="end after so many iterations of the run, as Ctrl-C would")
    parser.add_argument("--json", type=Path, help="write reward and metrics of all iterations there, also on Ctrl-C")
    parser.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="write metrics there, for TensorBoard")
    parser.add_argument("--wandb", metavar="PROJECT", help="log metrics to Weights & Biases")
    parser.add_argument("--out", type=Path, help="write the trained model's folder there, a new one")
    return parser.parse_args()


def settings(arguments: argparse.Namespace) -> Run:
    return Run(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Run)})


def main() -> None:
    arguments = _arguments()
    run = settings(arguments)
    if arguments.out:
        arguments.out.mkdir(parents=True)  # now, because after the training it is too late to fail
    loop, state = build(run)
    start, folder, done = time.monotonic(), None, 0
    if arguments.snapshots is not None:
        folder = RunFolder(arguments.snapshots, dataclasses.asdict(run), every=arguments.every, added=ADDED)
        done = folder.step
    if done:
        print(f"goes on after iteration {done} of {run.iterations}, from {arguments.snapshots}")

    def evaluate(state: TrainState) -> dict[str, float]:
        greedy, sampled = held_out(loop.trainer.model_config, loop.trainer.policy(state), run)
        return {"greedy": greedy, "sampled": sampled}

    with ProgressBar(run.iterations, done=done, name=run.algorithm) as bar:
        outcome = learn(
            loop,
            state,
            run.iterations,
            folder=folder,
            sinks=[bar, _print_accuracy, *_further_sinks(arguments, run)],
            evaluate=evaluate,
            evaluate_every=arguments.evaluate_every,
            stop=arguments.stop,
        )
    iterations, policy = outcome.history.iterations, loop.trainer.policy(outcome.state)
    if arguments.json:
        arguments.json.write_text(json.dumps(iterations))
    if not outcome.is_over:
        _say_how_to_go_on(outcome, run, arguments.snapshots)
    if outcome.ended_by in signal.Signals.__members__:
        raise SystemExit(128 + signal.Signals[outcome.ended_by])
    reward = float(np.mean([iteration["reward"] for iteration in iterations[-RECENT:]])) if iterations else math.nan
    print(f"{(time.monotonic() - start) / 60:.1f} minutes; reward of the last {RECENT} iterations {reward:.3f}")
    print(f"weights {weights_digest(policy)[:16]}, state {state_digest(outcome.state)[:16]}")
    if arguments.out:
        loading.save(arguments.out, loop.trainer.model_config, policy)
        write_tokenizer(arguments.out, build_tokenizer())


def _further_sinks(arguments: argparse.Namespace, run: Run) -> list[Sink]:
    further = []
    if arguments.tensorboard is not None:
        further.append(sinks.TensorBoard(arguments.tensorboard))
    if arguments.wandb is not None:
        further.append(sinks.WeightsAndBiases(project=arguments.wandb, config=dataclasses.asdict(run)))
    return further


def _print_accuracy(step: int, metrics: dict[str, float]) -> None:
    """A sink that prints evaluations, above the bar."""
    if "evaluation/greedy" in metrics:
        greedy, sampled = metrics["evaluation/greedy"], metrics["evaluation/sampled"]
        tqdm.write(f"held out, after {step} iterations: greedy {greedy:.3f}, sampled {sampled:.3f}")
        sys.stdout.flush()


def _say_how_to_go_on(outcome: Outcome, run: Run, folder: Path | None) -> None:
    by = {"SIGINT": "Ctrl-C", "stop": "--stop"}.get(outcome.ended_by, outcome.ended_by)
    print(f"stopped by {by} after iteration {int(outcome.state.version)} of {run.iterations}")
    if folder is None:
        print("nothing was kept: give --snapshots FOLDER to be able to go on")
    else:
        print(f"kept in {folder}: the same command goes on from there, to the bits of a run that was not stopped")


if __name__ == "__main__":
    main()
