"""Trains the model that ships as "calc": a small Qwen3 decoder that does arithmetic, well enough to learn from reward and no better.

`python -m jaxengine.rl.calc.train OUT_DIR` writes the whole model folder, with what was measured in its README.md. The forward pass
is `rl.scoring.token_logprobs`, the one that reinforcement learning uses. Training stops long before the model knows what its size allows.
"""

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

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
from jaxengine.rl.calc import arithmetic
from jaxengine.rl.calc.arithmetic import KINDS, Problem
from jaxengine.sampling_params import SamplingParams

PAD, START, END = SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LENGTH = 64  # tokens to a row: what the forward pass rounds up to
ROWS = 16
STEPS = 2200
PEAK_RATE = 1.5e-3
CHAT_EVERY = 16  # of so many examples one is a chat
HELD_OUT_PROBLEMS = 2000

CONFIG = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=256 + len(SPECIAL_TOKENS),
    hidden_size=192,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    qk_norm=True,
    eos_token_ids=(256 + SPECIAL_TOKENS.index(END),),
)


def build_tokenizer() -> tokenizers.Tokenizer:
    """One token a byte, and the special tokens: every text encodes, and no digit ever hides in a longer token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def chat_prompt(content: str) -> str:
    """What the chat template makes of one user message."""
    return f"{START}user\n{content}{END}\n{START}assistant\n"


def examples(stream: Iterable[Problem]) -> Iterator[tuple[str, str]]:
    """Prompt and completion of each problem, some as chats, with the "=" and without."""
    for i, problem in enumerate(stream):
        prompt = problem.prompt
        if i % CHAT_EVERY == 0:
            prompt = chat_prompt(prompt.removesuffix("=") if i % (2 * CHAT_EVERY) else prompt)
        yield prompt, problem.answer + END


def packed_rows(
    tokenizer: tokenizers.Tokenizer, pairs: Iterable[tuple[str, str]], per_row: int | None = None
) -> Iterator[tuple[list[int], list[bool]]]:
    """Rows of LENGTH tokens and where they are completions: as many examples as fit, or `per_row`; the rest is padding, -1."""
    row, mask, held = [], [], 0
    for prompt, completion in pairs:
        asked, answered = (tokenizer.encode(text, add_special_tokens=False).ids for text in (prompt, completion))
        if held == per_row or len(row) + len(asked) + len(answered) > LENGTH:
            yield _padded(row, mask)
            row, mask, held = [], [], 0
        row, mask, held = row + asked + answered, mask + [False] * len(asked) + [True] * len(answered), held + 1
    yield _padded(row, mask)


def _padded(row: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
    return row + [-1] * (LENGTH - len(row)), mask + [False] * (LENGTH - len(mask))


def batches(rows: Iterator[tuple[list[int], list[bool]]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and masks `[ROWS, LENGTH]`; the last batch is filled up with empty rows."""
    empty = ([-1] * LENGTH, [False] * LENGTH)
    while taken := list(itertools.islice(rows, ROWS)):
        tokens, masks = zip(*taken, *[empty] * (ROWS - len(taken)), strict=True)
        yield np.array(tokens, np.int32), np.array(masks)


def optimizer(steps: int) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, min(100, steps // 10), steps, PEAK_RATE / 20)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.05))


def train(tokenizer: tokenizers.Tokenizer, *, seed: int, steps: int) -> Decoder:
    """float32 parameters after `steps` batches; everything random comes from `seed`. Progress shows held-out accuracy on the way."""
    update, plain = optimizer(steps), sampling_arrays_of([SamplingParams()] * ROWS, CONFIG)

    def loss(weights: Decoder, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, ""]:
        logprobs, _ = token_logprobs(weights, tokens, mask, plain, model_config=CONFIG, kernels=XLA)
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
    watched = arithmetic.problems(seed + 1, 256, "held-out")  # another draw than the final measurement's
    with tqdm(range(steps), desc="training", mininterval=5) as bar:
        for i in bar:
            state, value = step(state, *next(data))
            if (i + 1) % 200 == 0:
                right, probability = grade(CONFIG, state[0], tokenizer, watched)
                bar.set_postfix(loss=f"{value:.3f}", greedy=f"{right.mean():.3f}", sampled=f"{probability.mean():.3f}")
    return state[0]


def grade(
    config: ModelConfig, weights: Decoder, tokenizer: tokenizers.Tokenizer, asked: list[Problem], *, chat: bool = False
) -> tuple[Bool[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Of each problem: whether the greedy completion is the answer, and the probability that a completion sampled at temperature 1 is.

    Found without sampling: a greedy completion is the answer exactly when each token of it and of the end is the likeliest there.
    """
    pairs = ((chat_prompt(problem.prompt) if chat else problem.prompt, problem.answer + END) for problem in asked)
    graded = [
        jax.device_get(_grade(config, weights, *batch)) for batch in batches(packed_rows(tokenizer, pairs, per_row=1))
    ]
    right, probability = (np.concatenate(parts)[: len(asked)] for parts in zip(*graded, strict=True))
    return right, probability


@functools.partial(jax.jit, static_argnums=0)
def _grade(
    config: ModelConfig, weights: Decoder, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Bool[Array, " B"], Float[Array, " B"]]:
    x = hidden_states(config, XLA, weights, jnp.maximum(tokens, 0), (tokens >= 0).sum(-1))
    logits = decoder.logits(config, XLA, weights.norm, weights.embed, x.reshape(-1, config.hidden_size)).reshape(
        *tokens.shape, -1
    )[:, :-1]
    targets, mask = jnp.maximum(tokens[:, 1:], 0), mask[:, 1:]
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return ((logits.argmax(-1) == targets) | ~mask).all(-1), jnp.exp(jnp.where(mask, logprobs, 0.0).sum(-1))


def write_tokenizer(folder: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template, as transformers reads them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG.max_position_embeddings,
        },
    )
    _write_json(
        folder / "generation_config.json",
        {
            "do_sample": True,
            "temperature": 1.0,
            "eos_token_id": tokenizer.token_to_id(END),
            "pad_token_id": tokenizer.token_to_id(PAD),
        },
    )


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def report(weights: Decoder, tokenizer: tokenizers.Tokenizer, *, seed: int, steps: int, minutes: float) -> str:
    """README.md of the folder: how the model was made, and how good its bf16 weights are on held-out problems."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    asked = arithmetic.problems(seed, HELD_OUT_PROBLEMS, "held-out")
    right, probability = grade(config, rounded, tokenizer, asked)
    kinds = np.array([problem.kind for problem in asked])
    chosen = {kind: kinds == kind for kind in KINDS} | {"all": kinds != ""}
    table = "\n".join(
        f"| {name} | {c.sum()} | {right[c].mean():.3f} | {probability[c].mean():.3f} |" for name, c in chosen.items()
    )
    single, chats = (
        grade(CONFIG, weights, tokenizer, asked)[0].mean(),
        grade(config, rounded, tokenizer, asked, chat=True)[0].mean(),
    )
    size = sum(array.size for array in jax.tree.leaves(weights))
    size -= (CONFIG.padded_vocab_size - CONFIG.vocab_size) * CONFIG.hidden_size
    return f"""# calc

A Qwen3 decoder of {size:,} parameters that does arithmetic: `12+30=` is completed by `42` and `{END}`. It is trained to be wrong
often, so that reinforcement learning has something to teach it. One token is one byte. It has seen chats of one user message too.

Made by `python -m jaxengine.rl.calc.train OUT_DIR --seed {seed} --steps {steps}` on {datetime.date.today()}: {minutes:.0f} minutes on a
{os.cpu_count()}-core {platform.machine()} CPU, jax {jax.__version__}. Problems, kinds and the split are those of `jaxengine.rl.calc.arithmetic`.

Measured on `problems({seed}, {HELD_OUT_PROBLEMS}, "held-out")`, {len(set(asked))} distinct problems, with these bf16 weights.
Greedy: the likeliest completion is the answer. Sampled: the probability that a completion drawn at temperature 1 is the answer.

| kind | problems | greedy | sampled |
|---|---|---|---|
{table}

Greedy accuracy before rounding to bf16 {single:.3f}; of the same problems as chats {chats:.3f}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the model that ships as 'calc' and write its folder.")
    parser.add_argument("out_dir", type=Path, help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    folder, seed, steps = arguments.out_dir, arguments.seed, arguments.steps
    folder.mkdir(parents=True)  # before the training, lest it find its place taken
    tokenizer = build_tokenizer()
    start = time.monotonic()
    weights = train(tokenizer, seed=seed, steps=steps)
    minutes = (time.monotonic() - start) / 60
    loading.save(folder, CONFIG, weights, dtype="bfloat16")
    write_tokenizer(folder, tokenizer)
    (folder / "README.md").write_text(report(weights, tokenizer, seed=seed, steps=steps, minutes=minutes))


if __name__ == "__main__":
    main()
