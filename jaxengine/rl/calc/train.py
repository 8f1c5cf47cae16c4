"""Trains the model that ships as "calc": a small Qwen3 decoder that does arithmetic, and leaves something to learn.

`python -m jaxengine.rl.calc.train OUT_DIR` writes the whole model folder, with what was measured in its README.md. The
forward pass is `device.scoring.token_logprobs`, the one that reinforcement learning uses. Training stops long before
the accuracy that a model of this size can reach, so that reward can improve it.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import os
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from jaxengine.base.keys import seeded
from jaxengine.config import ModelConfig
from jaxengine.device.scoring import sampling_arrays_of, token_logprobs
from jaxengine.device.trunk import hidden_states
from jaxengine.models import decoder, loading, params
from jaxengine.models.params import Decoder
from jaxengine.ops.kernels import XLA
from jaxengine.ops.tiles import SCORING
from jaxengine.rl.calc import arithmetic
from jaxengine.rl.calc.arithmetic import KINDS, Problem
from jaxengine.rl.calc.model import CONFIG, END, build_tokenizer, chat_prompt, write_tokenizer
from jaxengine.sampling_params import SamplingParams

LENGTH = 64  # tokens of a row: what the forward pass rounds up to
ROWS = 16  # of a batch
STEPS = 2200
PEAK_RATE = 1.5e-3
CHAT_EVERY = 16  # one of so many examples is a chat
HELD_OUT_PROBLEMS = 2000


class Row(NamedTuple):
    """A row of training data: LENGTH tokens, -1 where it is padded, and which of them are completions."""

    tokens: list[int]
    mask: list[bool]


EMPTY_ROW = Row([-1] * LENGTH, [False] * LENGTH)


def examples(stream: Iterable[Problem]) -> Iterator[tuple[str, str]]:
    """Prompt and completion of each problem, some as chats, half of those without the "="."""
    for i, problem in enumerate(stream):
        prompt = problem.prompt
        if i % (2 * CHAT_EVERY) == CHAT_EVERY:
            prompt = chat_prompt(prompt.removesuffix("="))
        elif i % CHAT_EVERY == 0:
            prompt = chat_prompt(prompt)
        yield prompt, problem.answer + END


def packed_rows(
    tokenizer: tokenizers.Tokenizer, pairs: Iterable[tuple[str, str]], per_row: int | None = None
) -> Iterator[Row]:
    """Rows of as many (prompt, completion) pairs as fit, or of `per_row`."""
    row, num_pairs = Row([], []), 0
    for texts in pairs:
        prompt, completion = (tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
        if num_pairs == per_row or len(row.tokens) + len(prompt) + len(completion) > LENGTH:
            yield _padded(row)
            row, num_pairs = Row([], []), 0
        row.tokens.extend(prompt + completion)
        row.mask.extend([False] * len(prompt) + [True] * len(completion))
        num_pairs += 1
    yield _padded(row)


def _padded(row: Row) -> Row:
    used = len(row.tokens)
    return Row(row.tokens + EMPTY_ROW.tokens[used:], row.mask + EMPTY_ROW.mask[used:])


def batches(rows: Iterator[Row]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and masks `[ROWS, LENGTH]`; the last batch is filled up with empty rows."""
    while batch := list(itertools.islice(rows, ROWS)):
        batch += [EMPTY_ROW] * (ROWS - len(batch))
        yield np.array([row.tokens for row in batch], np.int32), np.array([row.mask for row in batch])


def optimizer(steps: int) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, min(100, steps // 10), steps, PEAK_RATE / 20)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.05))


def train(tokenizer: tokenizers.Tokenizer, *, seed: int, steps: int) -> Decoder:
    """float32 parameters after `steps` batches; everything random comes from `seed`. Shows accuracy as it goes."""
    update, sampling = optimizer(steps), sampling_arrays_of([SamplingParams()] * ROWS, CONFIG)

    def loss(weights: Decoder, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
        logprobs, _ = token_logprobs(
            weights, tokens, mask, sampling, model_config=CONFIG, kernels=XLA, tiles=SCORING[0]
        )
        return -logprobs.sum() / mask.sum()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: tuple, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> tuple[tuple, Float[Array, ""]]:
        weights, moments = state
        value, gradient = jax.value_and_grad(loss)(weights, tokens, mask)
        change, moments = update.update(gradient, moments, weights)
        return (optax.apply_updates(weights, change), moments), value

    weights = params.initialise(CONFIG, seeded(seed), scale=0.05)
    state = (weights, jax.jit(update.init)(weights))
    data = batches(packed_rows(tokenizer, examples(arithmetic.stream(seed))))
    monitored = arithmetic.problems(seed + 1, 256, "held-out")  # other ones than the final measurement's
    with tqdm(range(steps), desc="training", mininterval=5) as bar:
        for i in bar:
            state, value = step(state, *next(data))
            if (i + 1) % 200 == 0:
                right, probability = grade(CONFIG, state[0], tokenizer, monitored)
                bar.set_postfix(loss=f"{value:.3f}", greedy=f"{right.mean():.3f}", sampled=f"{probability.mean():.3f}")
    return state[0]


def grade(
    model_config: ModelConfig,
    weights: Decoder,
    tokenizer: tokenizers.Tokenizer,
    problems: list[Problem],
    *,
    chat: bool = False,
) -> tuple[Bool[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Of each problem: whether the greedy completion is right, and the probability that one drawn at temperature 1 is.

    Nothing is generated: a greedy completion is the answer exactly when each token of the answer and the end token are
    the likeliest at their positions.
    """
    prompts = [chat_prompt(problem.prompt) if chat else problem.prompt for problem in problems]
    completions = [problem.answer + END for problem in problems]
    rows = packed_rows(tokenizer, zip(prompts, completions, strict=True), per_row=1)
    graded = [jax.device_get(_grade(model_config, weights, *batch)) for batch in batches(rows)]
    right, probability = (np.concatenate(parts)[: len(problems)] for parts in zip(*graded, strict=True))
    return right, probability


@functools.partial(jax.jit, static_argnums=0)
def _grade(
    model_config: ModelConfig, weights: Decoder, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Bool[Array, " B"], Float[Array, " B"]]:
    """`grade` of a batch, one problem in each row."""
    x = hidden_states(model_config, XLA, weights, jnp.maximum(tokens, 0), (tokens >= 0).sum(-1), SCORING[0].layers)
    rows = decoder.logits(model_config, XLA, weights.norm, weights.embed, x.reshape(-1, model_config.hidden_size))
    logits = rows.reshape(*tokens.shape, -1)[:, :-1]
    targets, mask = jnp.maximum(tokens[:, 1:], 0), mask[:, 1:]
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    right = ((logits.argmax(-1) == targets) | ~mask).all(-1)
    return right, jnp.exp(jnp.where(mask, logprobs, 0.0).sum(-1))


def report(weights: Decoder, tokenizer: tokenizers.Tokenizer, *, seed: int, steps: int, minutes: float) -> str:
    """README.md of the folder: how the model was made, and how good its bf16 weights are on held-out problems."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    problems = arithmetic.problems(seed, HELD_OUT_PROBLEMS, "held-out")
    right, probability = grade(config, rounded, tokenizer, problems)
    in_float32 = grade(CONFIG, weights, tokenizer, problems)[0].mean()
    as_chats = grade(config, rounded, tokenizer, problems, chat=True)[0].mean()
    size = sum(array.size for array in jax.tree.leaves(weights))
    size -= (CONFIG.padded_vocab_size - CONFIG.vocab_size) * CONFIG.hidden_size
    return f"""# calc

A Qwen3 decoder of {size:,} parameters that does arithmetic: `12+30=` is completed by `42` and `{END}`.
It is trained to be wrong often, so that reinforcement learning has something to teach it. One token is one byte.
It has seen chats of one user message too.

Made by `python -m jaxengine.rl.calc.train OUT_DIR --seed {seed} --steps {steps}` on {datetime.date.today()}:
{minutes:.0f} minutes on a {os.cpu_count()}-core {platform.machine()} CPU, jax {jax.__version__}.
Problems, kinds and the split are those of `jaxengine.rl.calc.arithmetic`.

Measured on `problems({seed}, {HELD_OUT_PROBLEMS}, "held-out")`, {len(set(problems))} distinct problems,
with these bf16 weights.
Greedy: the likeliest completion is the answer.
Sampled: the probability that a completion drawn at temperature 1 is the answer.

{_table(problems, right, probability)}

Greedy accuracy before rounding to bf16 {in_float32:.3f}; of the same problems as chats {as_chats:.3f}.
"""


def _table(problems: list[Problem], right: Bool[np.ndarray, " n"], probability: Float[np.ndarray, " n"]) -> str:
    """Accuracy by kind of problem, in Markdown."""
    kinds = np.array([problem.kind for problem in problems])
    chosen = {kind: kinds == kind for kind in KINDS} | {"all": kinds != ""}
    lines = ["| kind | problems | greedy | sampled |", "|---|---|---|---|"]
    for name, rows in chosen.items():
        lines.append(f"| {name} | {rows.sum()} | {right[rows].mean():.3f} | {probability[rows].mean():.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the model that ships as 'calc' and write its folder.")
    parser.add_argument("out_dir", type=Path, help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    folder, seed, steps = arguments.out_dir, arguments.seed, arguments.steps
    folder.mkdir(parents=True)  # now, because after the training it is too late to fail
    tokenizer = build_tokenizer()
    start = time.monotonic()
    weights = train(tokenizer, seed=seed, steps=steps)
    minutes = (time.monotonic() - start) / 60
    loading.save(folder, CONFIG, weights, dtype="bfloat16")
    write_tokenizer(folder, tokenizer)
    (folder / "README.md").write_text(report(weights, tokenizer, seed=seed, steps=steps, minutes=minutes))


if __name__ == "__main__":
    main()
