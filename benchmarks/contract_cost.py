"""What the contract costs: this engine with pinned regions beside the same engine with plain `x @ w`, in one run, in turns.

    python benchmarks/contract_cost.py [--model qwen3-0.6b-shape] [--batch 1 8 32 64] [--workloads decode group] [--repeats 3]

plain_engine.py says what is taken out.
"""
import argparse
import dataclasses

from plain_engine import plain

from jaxengine import bench


class Plain(bench.Ours):
    """The engine without pinning as a system of the bench."""

    name = "plain"

    def warm_up(self) -> None:
        """Run each size once: nothing is compiled outside of `plain`."""
        for count in (2, 8, 32, 64):
            self.seconds([[1] * 16] * count, [2] * count, False)
        for length in (30, 120, 500):
            self.seconds([[2] * length], [2], False)

    def seconds(self, prompts, lengths, logprobs) -> float:
        with plain():
            return super().seconds(prompts, lengths, logprobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-0.6b-shape")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--workloads", nargs="+", choices=("decode", "group"), default=("decode", "group"))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    pinned = bench.open_model(arguments.model, dtype=arguments.dtype, compile_patience=0)
    with plain():
        bare = bench.LLM.from_params(pinned.config, pinned.params, **dataclasses.asdict(pinned.engine_config))
    print(", ".join(f"{name} {value}" for name, value in bench.machine().items()), flush=True)
    each = {"decode": [*map(bench.Decode, arguments.batch)], "group": [bench.Group()]}
    workloads = [workload for name in arguments.workloads for workload in each[name]]
    results = bench.measure([bench.Ours(pinned), Plain(bare)], workloads, arguments.repeats, lambda text: print(text, flush=True))
    print(bench.table(results))
    if pinned.engine.programs.refused:
        print("refused, so not in use:", pinned.engine.programs.refused)


if __name__ == "__main__":
    main()
