"""What an iteration of GRPO costs: seconds to generate and to learn, with one set of kernels beside others.

    python benchmarks/grpo_iteration.py calc FOLDER … [--kernels cpu xla] [--iterations 3] [--batch 8x8] [--tokens 64]

Each set of kernels has a loop of its own, from the same weights and problems: prompts of 32 random tokens, completions
of exactly so many. They take turns iteration by iteration; the first, in which everything compiles, is not counted.
Rewards are as good as random, because what is learnt does not matter here. The last column says whether the first
update of each iteration is on-policy to the bit: every ratio 1, and KL 0.
"""

import argparse
import random
import statistics
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from checkpoints.model_folder import find_folder
from jaxengine.command.options import group
from jaxengine.command.workloads import random_prompts
from jaxengine.config import ModelConfig
from jaxengine.models import loading
from jaxengine.models.params import Decoder
from jaxengine.outputs import RequestOutput
from jaxengine.rl.given_rewards import Given
from jaxengine.rl.loops.loop import Iteration, Loop
from jaxengine.rl.train_state import TrainerConfig
from jaxengine.rl.trainer import Trainer
from jaxengine.sampling_params import SamplingParams

PROMPT_TOKENS = 32


def loop_of(kernels: str, model_config: ModelConfig, sizes: tuple[int, int, int]) -> Loop:
    prompts, samples, tokens = sizes

    def problems(i: int) -> list[tuple[Any, Any]]:
        drawn = random_prompts(random.Random(i), prompts, PROMPT_TOKENS, model_config.vocab_size)
        return [({"prompt_token_ids": prompt}, None) for prompt in drawn]

    sampling = SamplingParams(n=samples, max_tokens=tokens, ignore_eos=True)
    config = TrainerConfig(sampling=sampling, micro_batches=prompts)
    trainer = Trainer(model_config, optax.adamw(1e-6), config, kernels=kernels)
    length = PROMPT_TOKENS + tokens
    engine = dict(max_model_len=length, max_num_seqs=prompts * samples)
    return Loop(trainer=trainer, problems=problems, judge=judge, length=length, engine=engine)


def judge(outputs: Sequence[RequestOutput], answers: Sequence[Any]) -> Given:
    """A number between 0 and 1 from a sample's tokens, the same for the same tokens."""
    samples = [np.asarray(completion.token_ids, np.int32) for output in outputs for completion in output.outputs]
    return np.array([zlib.crc32(tokens.tobytes()) / 2**32 for tokens in samples], np.float32)


def on_policy(iteration: Iteration) -> str:
    first = iteration.updates[0]
    exact = first["ratio_mean"] == first["ratio_max"] == 1 and first["kl"] == 0
    return "yes" if exact else f"no: ratio up to {first['ratio_max']}, kl {first['kl']}"


def measured(loops: dict[str, Loop], params: Decoder, iterations: int) -> dict[str, list[Iteration]]:
    """The iterations of each loop after its first."""
    states = {name: loop.trainer.start(params, jax.random.key(0)) for name, loop in loops.items()}
    done: dict[str, list[Iteration]] = {name: [] for name in loops}
    for _ in range(1 + iterations):
        for name, loop in loops.items():
            states[name], iteration = loop.iterate(states[name])
            done[name].append(iteration)
    return {name: of_one[1:] for name, of_one in done.items()}


def seconds(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names or folders")
    parser.add_argument("--kernels", nargs="+", default=["cpu", "xla"])
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--batch", type=group, default=(8, 8), metavar="PxS", help="prompts x samples")
    parser.add_argument("--tokens", type=int, default=64, help="of a completion")
    arguments = parser.parse_args()
    print("| model | kernels | generating, s | learning, s | together | on-policy exactly |\n|---|---|---|---|---|---|")
    for model in arguments.models:
        folder = find_folder(model)
        model_config = loading.read_model_config(folder)
        sizes = *arguments.batch, arguments.tokens
        loops = {kernels: loop_of(kernels, model_config, sizes) for kernels in arguments.kernels}
        params = loading.load(folder, model_config)
        for kernels, iterations in measured(loops, params, arguments.iterations).items():
            generating, learning = [x.generating for x in iterations], [x.learning for x in iterations]
            together = [x + y for x, y in zip(generating, learning, strict=True)]
            columns = map(seconds, (generating, learning, together))
            exact = ", ".join(sorted({on_policy(x) for x in iterations}))
            print("|", " | ".join((folder.name, kernels, *columns, exact)), "|", flush=True)


if __name__ == "__main__":
    main()
