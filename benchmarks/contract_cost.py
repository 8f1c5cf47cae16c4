"""What the contract costs: this engine with pinned regions beside the same engine with plain `x @ w`, in lockstep.

    python benchmarks/contract_cost.py [--model qwen3-0.6b-shape] [--batch 1 8 32 64] [--workloads decode group]

Both serve the same requests, in turns step by step, and their order swaps with each step, so that what else the
machine does costs both the same. A cost is the pinned engine's time beyond the plain engine's, given with the
quartiles of the single steps' costs. plain_engine.py describes what is taken out.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Iterator, Sequence

from plain_engine import plain
from stepping import drain, queue, reads_prompts

from jaxengine import LLM
from jaxengine.command import bench
from jaxengine.command.workloads import Decode, Group, Prompts, Workload


@dataclasses.dataclass(frozen=True)
class Step:
    """Seconds of one step on both engines; whether it read prompts."""

    pinned: float
    plain: float
    reads_prompts: bool

    @property
    def cost(self) -> float:
        return self.pinned / self.plain - 1


def lockstep(pinned: LLM, bare: LLM, prompts: Prompts, lengths: list[int]) -> Iterator[Step]:
    """Serve the requests on both, a step on one and then on the other."""
    for llm in (pinned, bare):
        queue(llm, prompts, lengths)
    turn = False
    while pinned.engine.requests:
        kind, spent = reads_prompts(pinned), {}
        for llm in (pinned, bare) if turn else (bare, pinned):
            start = time.perf_counter()
            llm.engine.step()
            spent[llm] = time.perf_counter() - start
        yield Step(spent[pinned], spent[bare], kind)
        turn = not turn
    assert not bare.engine.requests, "the engines had other steps"


def row(name: str, steps: Sequence[Step]) -> str:
    pinned, bare = sum(step.pinned for step in steps), sum(step.plain for step in steps)
    costs = [step.cost for step in steps]
    low, middle, high = statistics.quantiles(costs, n=4) if len(steps) > 1 else costs * 3
    quartiles = f"{low:+.1%} … {middle:+.1%} … {high:+.1%}"
    return f"| {name} | {len(steps)} | {pinned:.1f} | {bare:.1f} | {pinned / bare - 1:+.1%} | {quartiles} |"


def measured(workload: Workload, pinned: LLM, bare: LLM, repeats: int) -> Iterator[str]:
    """The rows of one workload."""
    requests = functools.partial(workload.requests, vocab_size=pinned.config.vocab_size)
    queue(pinned, *requests(-1))
    drain(pinned)
    with plain():  # the plain engine's steps are compiled in here; once both have run, nothing more is compiled
        queue(bare, *requests(-1))
        drain(bare)
    steps: list[Step] = []
    with bench.compilations() as compiled:
        for repeat in range(repeats):
            steps += lockstep(pinned, bare, *requests(repeat))
    for kind, reads in (("with prompts", True), ("decode alone", False)):
        if chosen := [step for step in steps if step.reads_prompts == reads]:
            yield row(f"{workload}, steps {kind}", chosen)
    warning = f" {len(compiled)} functions were compiled meanwhile" if compiled else ""
    yield row(f"{workload}, all", steps) + warning


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-0.6b-shape")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--layers", type=int, help="of a named shape, in place of its own: quicker, and the head's share grows"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--workloads", nargs="+", choices=("decode", "group"), default=("decode", "group"))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.layers:
        shape = bench.SHAPES[arguments.model]
        bench.SHAPES[arguments.model] = dataclasses.replace(shape, num_hidden_layers=arguments.layers)
    pinned = bench.open_model(arguments.model, dtype=arguments.dtype, compile_patience=0)
    with plain():
        bare = LLM.from_params(pinned.config, pinned.params, **dataclasses.asdict(pinned.engine_config))
    each = {"decode": [*map(Decode, arguments.batch)], "group": [Group()]}
    print(", ".join(f"{name} {value}" for name, value in bench.machine().items()), flush=True)
    print("| workload | steps | pinned, s | plain, s | cost | cost of a step: quartiles |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in arguments.workloads:
        for workload in each[name]:
            for line in measured(workload, pinned, bare, arguments.repeats):
                print(line, flush=True)
    if pinned.engine.step_variants.refused:
        print("refused, so not in use:", pinned.engine.step_variants.refused)


if __name__ == "__main__":
    main()
