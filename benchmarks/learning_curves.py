"""Curves of learning on calc, the model that ships: how algorithms compare, what stale weights cost, which rate serves.

    python benchmarks/learning_curves.py algorithms   # seven of them from one start, three seeds each
    python benchmarks/learning_curves.py stale        # samples drawn by weights of 0, 1, 2 and 4 versions before
    python benchmarks/learning_curves.py rates        # a sweep of learning rates, for a short run

Needs matplotlib. Each writes benchmarks/results/learning/NAME.jsonl, a curve a line, and NAME.png beside it. What is
there already is not run again: a stopped command goes on where it was. Prints a Markdown table of where curves end.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxengine.models.params import Decoder
from jaxengine.rl.calc.learn import build, held_out, optimizer
from jaxengine.rl.calc.run import Run
from jaxengine.rl.loops.driver import learn
from jaxengine.rl.loops.loop import Loop
from jaxengine.rl.loops.sinks import ProgressBar
from jaxengine.rl.objective import ALGORITHMS, Objective
from jaxengine.rl.train_state import TrainState
from jaxengine.rl.trainer import Trainer

RESULTS = Path(__file__).parent / "results" / "learning"
SEEDS = 0, 1, 2
LAGS = 1, 2, 4  # versions between the weights that draw and those that learn
TASK: dict[str, Any] = dict(prompts=32, kinds="sum", digits=2)
WINDOW = 10  # iterations that the end of a curve is the mean over
EVALUATE_EVERY = 10  # iterations

# What becomes of the ratio where earlier weights drew: that to the weights that drew, clipped; taken to be 1, as a
# trainer does that computes the old logprobs itself; and that with the importance of what was drawn beside it.
CORRECTIONS: dict[str, dict[str, Any]] = {
    "clipped": {},
    "ignored": dict(correction="truncated", correction_low=1.0, correction_high=1.0),
    "corrected": dict(correction="truncated"),
}


class Arm(NamedTuple):
    """One curve's settings; several seeds make several curves of it."""

    name: str
    run: Run
    objective: Objective
    lag: int = 0


@dataclasses.dataclass(frozen=True)
class StaleLoop(Loop):
    """A loop whose samples are drawn by the weights of `lag` versions before; the first, by the initial weights."""

    lag: int = 0
    policies: dict[int, Decoder] = dataclasses.field(default_factory=dict)  # by version, no more than are needed

    def policy(self, state: TrainState) -> Decoder:
        version = int(state.version)
        self.policies[version] = self.trainer.policy(state)
        self.policies.pop(version - self.lag - 1, None)
        return self.policies[max(0, version - self.lag)]


# -- what is compared --------------------------------------------------------------------------------------------------


def algorithms() -> Iterator[Arm]:
    """Two updates a rollout, so that the clips have something to do."""
    for name, objective in ALGORITHMS.items():
        yield Arm(name, Run(algorithm=name, iterations=100, mini_batches=2, rate=1e-4, **TASK), objective)


def stale() -> Iterator[Arm]:
    """Four updates a rollout, at a rate at which weights move far in a version."""
    run = Run(algorithm="dapo", iterations=50, mini_batches=4, rate=3e-4, **TASK)
    yield Arm("lag 0", run, ALGORITHMS["dapo"])
    for lag in LAGS:
        for name, changes in CORRECTIONS.items():
            yield Arm(f"lag {lag}, {name}", run, dataclasses.replace(ALGORITHMS["dapo"], **changes), lag)


def rates() -> Iterator[Arm]:
    """Of the README's command with eight iterations: does a short run teach, or only disturb?"""
    for rate in 5e-5, 1e-4, 2e-4, 4e-4:
        yield Arm(f"rate {rate:.0e}", Run(iterations=8, kinds="sum", digits=2, rate=rate), ALGORITHMS["grpo"])


COMPARISONS = {"algorithms": algorithms, "stale": stale, "rates": rates}


# -- running -----------------------------------------------------------------------------------------------------------


def curve(arm: Arm, seed: int, trainer: Trainer) -> dict[str, Any]:
    """One run: its reward and entropy an iteration, and greedy and sampled accuracy on held-out problems."""
    run = dataclasses.replace(arm.run, seed=seed)
    loop, state = build(run)
    fields = {field.name: getattr(loop, field.name) for field in dataclasses.fields(loop)}
    loop = StaleLoop(**fields | {"trainer": trainer}, lag=arm.lag)

    def evaluate(state: TrainState) -> dict[str, float]:
        greedy, sampled = held_out(trainer.model_config, trainer.policy(state), run)
        return {"greedy": greedy, "sampled": sampled}

    with ProgressBar(run.iterations, name=f"{arm.name}, seed {seed}") as bar:
        outcome = learn(loop, state, run.iterations, evaluate=evaluate, evaluate_every=EVALUATE_EVERY, sinks=[bar])
    evaluations = [(step, metrics) for step, metrics in outcome.history.entries if "evaluation/greedy" in metrics]
    iterations = outcome.history.iterations
    return {
        "name": arm.name,
        "seed": seed,
        "reward": [round(each["reward"], 4) for each in iterations],
        "entropy": [round(each["entropy"], 4) for each in iterations],
        "kl": [round(each["updates"][-1]["kl"], 5) for each in iterations],
        "steps": [step for step, _ in evaluations],
        "greedy": [round(metrics["evaluation/greedy"], 4) for _, metrics in evaluations],
        "sampled": [round(metrics["evaluation/sampled"], 4) for _, metrics in evaluations],
    }


def curves(name: str) -> list[dict[str, Any]]:
    """All curves of a comparison, those that the file has among them."""
    path = RESULTS / f"{name}.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(each["name"], each["seed"]) for each in found}
    path.parent.mkdir(parents=True, exist_ok=True)
    for arm in COMPARISONS[name]():
        seeds = [seed for seed in SEEDS if (arm.name, seed) not in done]
        if not seeds:
            continue
        loop, _ = build(arm.run)
        config = dataclasses.replace(loop.trainer.config, objective=arm.objective)
        trainer = Trainer(loop.trainer.model_config, optimizer(arm.run), config)  # one, so that it compiles once
        for seed in seeds:
            found.append(curve(arm, seed, trainer))
            with path.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")
        jax.clear_caches()
    return found


# -- showing -----------------------------------------------------------------------------------------------------------


def table(found: list[dict[str, Any]]) -> str:
    """Where the curves of each name end: the mean over seeds, and the lowest and the highest."""
    lines = [
        f"| {len(SEEDS)} seeds | reward, last {WINDOW} | greedy before → after | sampled before → after | entropy |",
        "|---|---|---|---|---|",
    ]
    for name, seeds in by_name(found).items():
        rewards = [float(np.mean(each["reward"][-WINDOW:])) for each in seeds]
        entropy = np.mean([np.mean(each["entropy"][-WINDOW:]) for each in seeds])
        held = [_before_and_after(seeds, of) for of in ("greedy", "sampled")]
        lines.append(f"| {name} | {_spread(rewards)} | {held[0]} | {held[1]} | {entropy:.3f} |")
    return "\n".join(lines)


def by_name(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for each in found:
        groups.setdefault(each["name"], []).append(each)
    return groups


def _before_and_after(seeds: list[dict[str, Any]], of: str) -> str:
    return f"{np.mean([each[of][0] for each in seeds]):.3f} → {_spread([each[of][-1] for each in seeds])}"


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Reward, held-out accuracy and entropy over iterations: the mean over seeds, and the band that they lie in."""
    from matplotlib import pyplot  # an extra: the runs need none

    figure, axes = pyplot.subplots(1, 3, figsize=(16, 5), layout="constrained")
    colours = pyplot.get_cmap("tab10" if len(by_name(found)) <= 10 else "tab20").colors
    for colour, (name, seeds) in zip(colours, by_name(found).items(), strict=False):
        smooth = [_smoothed(each["reward"]) for each in seeds]
        _band(axes[0], range(1, len(smooth[0]) + 1), smooth, name, colour)
        _band(axes[1], seeds[0]["steps"], [each["sampled"] for each in seeds], name, colour)
        _band(axes[2], range(1, len(smooth[0]) + 1), [_smoothed(each["entropy"]) for each in seeds], name, colour)
    titles = f"reward (mean of {WINDOW})", "held-out accuracy, sampled", f"entropy, nats a token (mean of {WINDOW})"
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="iterations")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _band(axis: Any, steps: Sequence[int], values: list[Any], name: str, colour: Any) -> None:
    stacked = np.array(values)
    axis.plot(steps, stacked.mean(0), label=name, color=colour)
    axis.fill_between(steps, stacked.min(0), stacked.max(0), color=colour, alpha=0.12, linewidth=0)


def _smoothed(values: list[float]) -> np.ndarray:
    """The mean of each value and those before it in the window."""
    return np.array([np.mean(values[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(values))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=COMPARISONS)
    name = parser.parse_args().comparison
    found = curves(name)
    draw(found, RESULTS / f"{name}.png")
    print(table(found))


if __name__ == "__main__":
    main()
